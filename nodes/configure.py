"""Configure Quantization: the user's choices as a recipe."""

from collections.abc import Callable
from contextlib import suppress

from comfy_api.latest import io

from ..quant_core import FORMATS, Recipe
from ..quant_core.errors import RecipeError
from ..quant_core.formats import GRANULARITIES, Codec, with_granularity
from ..quant_core.formats.rotation import GROUP_SIZES
from ..quant_core.recipes import MEASURED, MEASURED_CHOOSES, MEASURED_ONLY, PRESETS, recommended_format
from ..quant_core.recipes.presets import AUTO, NONE
from ..quant_core.rounding import ROUNDINGS
from . import host
from .ui.schema import OptionsType, RecipeType, check_inputs, schema, widget

__all__ = ["ConfigureQuantization"]

_FORMATS = [*FORMATS, AUTO, MEASURED]
_GRANULARITIES = [AUTO, *GRANULARITIES]
_CONVROT = {"off": None, "on": True, AUTO: AUTO, **{str(size): size for size in GROUP_SIZES}}


class ConfigureQuantization(io.ComfyNode):
    """See the schema."""

    @classmethod
    def define_schema(cls):
        matters = _matters_for()
        return schema(
            node_id="LearnedRoundingConfigure",
            display_name="Configure Quantization",
            description="What to make of a model: format, keep list and rounding.",
            search_aliases=["convrot", "recipe"],
            inputs=[
                widget(
                    io.Combo,
                    id="format",
                    options=_FORMATS,
                    default=AUTO,
                    tooltip="Format of the quantized layers: FP8 is loaded by older ComfyUI too, INT8 is more precise and faster on most consumer cards. "
                    "auto takes what suits this card: INT8 per row with ConvRot, or FP8; measured chooses for each layer with a calibration.",
                ),
                widget(
                    io.Combo,
                    id="granularity",
                    options=_GRANULARITIES,
                    default=AUTO,
                    matters_for=matters["granularity"],
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
                    matters_for=matters["full_precision_matrix_mult"],
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="FP8 only: ask ComfyUI to decode weights instead of multiplying in FP8.",
                ),
                # Saved workflows hold values by place: new widgets come last.
                widget(
                    io.Combo,
                    id="convrot",
                    matters_for=matters["convrot"],
                    options=list(_CONVROT),
                    default="off",
                    optional=True,
                    tooltip="INT8 per row: rotate the inputs in groups of 256, 64 or 16 channels, so that outliers spread; "
                    "on takes the largest that divides, a number the largest up to it, auto whichever has the least error.",
                ),
                widget(
                    io.Float,
                    id="target_size",
                    matters_for=matters["target_size"],
                    default=0.0,
                    min=0.0,
                    max=10000.0,
                    step=0.1,
                    round=0.001,
                    optional=True,
                    tooltip="Format measured: how large the file may be, in GB. "
                    "0: as large as the target error asks for, or 5 % larger than with every layer in 8 bits.",
                ),
                widget(
                    io.Float,
                    id="target_error",
                    matters_for=matters["target_error"],
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    round=0.00001,
                    optional=True,
                    advanced=True,
                    tooltip="Format measured: how large the relative error of the model's output may be; "
                    "as few bytes as that takes are spent. 0: not asked for.",
                ),
                widget(
                    io.Boolean,
                    id="block_formats",
                    matters_for=matters["block_formats"],
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Format measured: try the block-wise formats too, which need this node pack to load.",
                ),
                widget(
                    io.String,
                    id="layer_config",
                    matters_for=matters["layer_config"],
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip='Rules for single layers, in JSON: {"img_mlp": {"format": "int8", "convrot": true}, "final_layer": "skip"}. '
                    "Patterns are regular expressions; the most specific one decides, before preset and keep list.",
                ),
                OptionsType.Input(
                    "options", optional=True, tooltip="From Rounding Options; without it every option has its default."
                ),
            ],
            outputs=[RecipeType.Output(display_name="recipe", tooltip="For Learned Round Quantize.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        format=None,
        granularity=None,
        keep=None,
        full_precision_matrix_mult=None,
        convrot=None,
        target_size=None,
        target_error=None,
        block_formats=None,
        layer_config=None,
    ):
        # Of what comes from another node, which is None, the default is assumed, which contradicts nothing.
        def check(format):
            _recipe(
                format,
                granularity or AUTO,
                convrot or "off",
                keep or "",
                layer_config or "",
                full_precision_matmul=full_precision_matrix_mult or False,
                target_size=target_size or None,
                target_error=target_error or None,
                block_formats=block_formats or False,
            )

        return check_inputs(check, format)

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
        target_size=0.0,
        target_error=0.0,
        block_formats=False,
        layer_config="",
        options=None,
    ) -> io.NodeOutput:
        recipe = _recipe(
            format,
            granularity,
            convrot,
            keep,
            layer_config,
            rounding=rounding,
            **(options or {}),
            preset=preset,
            heur=heur,
            full_precision_matmul=full_precision_matrix_mult,
            seed=seed,
            target_size=target_size or None,
            target_error=target_error or None,
            block_formats=block_formats,
        )
        return io.NodeOutput(recipe)


def _recipe(format: str, granularity: str, convrot: str, keep: str, layer_config: str, **others) -> Recipe:
    """The recipe of what the widgets say; ``others`` are its own arguments. Raises RecipeError when they contradict each other."""
    granularity = None if granularity == AUTO else granularity
    convrot = _CONVROT[convrot] if convrot in _CONVROT else convrot
    if format == AUTO:
        suits = recommended_format(int8=host.supports_format("int8_tensorwise"))
        rotation = suits.convrot if granularity in (None, suits.granularity) else None
        format, granularity, convrot = suits.format, granularity or suits.granularity, convrot or rotation
    if format != MEASURED:
        format = with_granularity(format, granularity)
    return Recipe(
        format=format,
        granularity=granularity,
        convrot=convrot,
        keep=tuple(line.strip() for line in keep.splitlines() if line.strip()),
        layer_config=layer_config.strip(),
        **others,
    )


def _matters_for() -> dict[str, list[dict]]:
    """Widget → for which formats and granularities it acts, see :func:`~.schema.widget`."""
    return {
        **dict.fromkeys(MEASURED_ONLY, [{"format": [MEASURED]}]),
        **dict.fromkeys(MEASURED_CHOOSES, [{"format": {"not": [MEASURED]}}]),
        "granularity": [{"format": [format for format in _FORMATS if _has_choice(_encodings(format))]}],
        "convrot": _where(lambda encoding: encoding.granularity in encoding.format.rotated),
        "full_precision_matrix_mult": _where(lambda encoding: encoding.format.full_precision_matmul == "choice"),
    }


def _where(acts: Callable[[Codec], bool]) -> list[dict]:
    """For which formats and granularities something acts."""
    conditions = []
    for format in _FORMATS:
        encodings = _encodings(format)
        if names := [name for name, encoding in encodings.items() if acts(encoding)]:
            conditions.append({"format": [format], **({"granularity": names} if _has_choice(encodings) else {})})
    return conditions


def _encodings(format: str) -> dict[str, Codec]:
    """Granularity → how layers then stand in a file, for those that this choice of format has."""
    found = {}
    for granularity in _GRANULARITIES:
        with suppress(RecipeError):
            found[granularity] = _recipe(format, granularity, "off", "", "").codec
    return found


def _has_choice(encodings: dict[str, Codec]) -> bool:
    return len({encoding.granularity for encoding in encodings.values()}) > 1
