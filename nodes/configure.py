"""Configure Quantization: the user's choices as a recipe."""

from comfy_api.latest import io

from ..quant_core import FORMATS, Recipe
from ..quant_core.formats import GRANULARITIES, find_format, sibling
from ..quant_core.formats.rotation import GROUP_SIZES
from ..quant_core.recipes import PRESETS
from ..quant_core.recipes.presets import AUTO, NONE
from ..quant_core.rounding import ROUNDINGS
from .schema import OptionsType, RecipeType, schema, widget

__all__ = ["ConfigureQuantization"]

_CONVROT = {"off": None, "on": True, AUTO: AUTO, **{str(size): size for size in GROUP_SIZES}}


class ConfigureQuantization(io.ComfyNode):
    """See the schema."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingConfigure",
            display_name="Configure Quantization",
            description="What to make of a model: format, keep list and rounding.",
            search_aliases=["fp8", "int8", "convrot", "quantize", "convert", "recipe"],
            inputs=[
                widget(
                    io.Combo,
                    id="format",
                    options=list(FORMATS),
                    default=Recipe.format,
                    tooltip="Format of the quantized layers: FP8 is loaded by older ComfyUI too, INT8 is more precise and faster on most consumer cards.",
                ),
                widget(
                    io.Combo,
                    id="granularity",
                    options=[AUTO, *GRANULARITIES],
                    default=AUTO,
                    tooltip="What shares a scale: the whole tensor, a row or a square block; auto takes the format's own (INT8: row).",
                ),
                widget(
                    io.Combo,
                    id="preset",
                    options=[AUTO, NONE, *PRESETS],
                    default=AUTO,
                    tooltip="Which sensitive layers stay in full precision: auto recognises the model by its layer names.",
                ),
                widget(
                    io.Int,
                    id="seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=False,
                    tooltip="Same seed and same model give the same file, byte for byte.",
                ),
                widget(
                    io.Combo,
                    id="rounding",
                    options=list(ROUNDINGS),
                    default=Recipe.rounding,
                    optional=True,
                    advanced=True,
                    tooltip="; ".join(f"{name}: {text}" for name, text in ROUNDINGS.items()) + ".",
                ),
                widget(
                    io.String,
                    id="keep",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Regular expressions, one a line: layers whose name one of them finds also stay in full precision.",
                ),
                widget(
                    io.Boolean,
                    id="heur",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Also keep layers whose shape gains little speed when quantized.",
                ),
                widget(
                    io.Boolean,
                    id="full_precision_matrix_mult",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="FP8 only: ask ComfyUI to decode weights instead of multiplying in FP8.",
                ),
                # Saved workflows hold values by place: new widgets come last.
                widget(
                    io.Combo,
                    id="convrot",
                    options=list(_CONVROT),
                    default="off",
                    optional=True,
                    tooltip="INT8 per row: rotate the inputs in groups of 256, 64 or 16 channels, so that outliers spread; "
                    "on takes the largest that divides, a number the largest up to it, auto whichever has the least error.",
                ),
                OptionsType.Input(
                    "options", optional=True, tooltip="From Rounding Options; without it every option has its default."
                ),
            ],
            outputs=[RecipeType.Output(display_name="recipe", tooltip="For Learned Round Quantize.")],
        )

    @classmethod
    def execute(
        cls,
        format,
        granularity,
        preset,
        seed,
        rounding=Recipe.rounding,
        keep="",
        heur=False,
        full_precision_matrix_mult=False,
        convrot="off",
        options=None,
    ) -> io.NodeOutput:
        own = find_format(format)
        if granularity != AUTO and granularity not in own.granularities:
            format = (sibling(own, granularity) or own).name
        return io.NodeOutput(
            Recipe(
                rounding=rounding,
                **(options or {}),
                format=format,
                granularity=None if granularity == AUTO else granularity,
                convrot=_CONVROT[convrot] if convrot in _CONVROT else convrot,
                preset=preset,
                keep=tuple(line.strip() for line in keep.splitlines() if line.strip()),
                heur=heur,
                full_precision_matmul=full_precision_matrix_mult,
                seed=seed,
            )
        )
