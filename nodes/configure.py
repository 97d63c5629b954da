"""Configure Quantization: the user's choices as a recipe."""

from contextlib import suppress
from typing import Any

from comfy_api.latest import io

from ..quant_core import Recipe
from ..quant_core.errors import RecipeError
from ..quant_core.formats import GRANULARITIES, MEASURED, Codec
from ..quant_core.formats.cards import CARDS
from ..quant_core.recipes import choose_format, recommend_format
from ..quant_core.recipes.layers import parse_rules
from ..quant_core.recipes.option_table import CONVROT, FORMAT_OPTIONS, OPTION_TABLE, FormatOption
from ..quant_core.recipes.presets import AUTO
from . import host
from .ui.option_widgets import option_widget
from .ui.schema import OptionsType, RecipeType, check_inputs, schema

__all__ = ["ConfigureQuantization"]

_FORMATS = FORMAT_OPTIONS["format"].choices
_GRANULARITIES = [AUTO, *GRANULARITIES]
_OFF = "off"
_ADVANCED = {"optional": True, "advanced": True}
# Recipe field → settings of its widget. Saved workflows hold values by position: new widgets come last.
_WIDGETS = {
    "format": {"default": AUTO},
    "granularity": {"default": AUTO, "options": _GRANULARITIES, "note": "auto: that of the format."},
    "preset": {},
    "seed": {"min": 0, "max": 2**32 - 1, "control_after_generate": False},
    "rounding": _ADVANCED,
    "keep": {"multiline": True, "note": "One per line.", **_ADVANCED},
    "heur": _ADVANCED,
    "full_precision_matmul": {"id": "full_precision_matrix_mult", **_ADVANCED},
    "convrot": {
        "default": AUTO,
        "optional": True,
        "note": "off with format auto or a short name, and auto for formats other than INT8 per row: the rotation that comes with the format.",
    },
    "target_size": {
        "default": 0.0,
        "min": 0.0,
        "max": 10000.0,
        "step": 0.1,
        "round": 0.001,
        "optional": True,
        "note": "0: not given.",
    },
    "target_error": {
        "default": 0.0,
        "min": 0.0,
        "max": 10.0,
        "step": 0.001,
        "round": 0.00001,
        "note": "0: not given.",
        **_ADVANCED,
    },
    "block_formats": _ADVANCED,
    "layer_config": {"multiline": True, **_ADVANCED},
    "bits": {"step": 2, **_ADVANCED},
    "linear_dtype": _ADVANCED,
    "card": {"default": AUTO, "options": [AUTO, *CARDS], "note": "auto: this card.", **_ADVANCED},
    "target_time": {
        "default": 0.0,
        "min": 0.0,
        "max": 10.0,
        "step": 0.01,
        "round": 0.001,
        "note": "0: not given.",
        **_ADVANCED,
    },
}
_DEFAULTS: dict[str, Any] = {name: FORMAT_OPTIONS[name].default for name in ("bits", "linear_dtype")}  # as if not given


class ConfigureQuantization(io.ComfyNode):
    """See the schema."""

    @classmethod
    def define_schema(cls):
        table = {name: option for options in OPTION_TABLE.values() for name, option in options.items()}
        return schema(
            node_id="LearnedRoundingConfigure",
            display_name="Configure Quantization",
            description="Format, keep list and rounding for Learned Round Quantize.",
            inputs=[
                *(
                    option_widget(
                        **{"id": name, "option": table[name], "matters_for": _matters_for(table[name]), **settings}
                    )
                    for name, settings in _WIDGETS.items()
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
        bits=None,
        linear_dtype=None,
        card=None,
        target_time=None,
        rounding=None,
    ):
        # None: the value comes from another node. Its default contradicts nothing; without a format only patterns are checked.
        def check(keep, layer_config):
            if format is None:
                parse_rules(_split_patterns(keep), layer_config)
                return
            _make_recipe(
                format,
                granularity or AUTO,
                convrot or _OFF,
                keep,
                layer_config,
                full_precision_matmul=full_precision_matrix_mult or False,
                target_size=target_size or None,
                target_error=target_error or None,
                block_formats=block_formats or False,
                bits=bits,
                linear_dtype=linear_dtype,
                card=card or AUTO,
                target_time=target_time or None,
                rounding=rounding or OPTION_TABLE["Rounding"]["rounding"].default,
            )

        return check_inputs(check, keep or "", layer_config or "")

    @classmethod
    def execute(
        cls,
        format,
        granularity,
        preset,
        seed,
        rounding=OPTION_TABLE["Rounding"]["rounding"].default,
        keep="",
        heur=False,
        full_precision_matrix_mult=False,
        convrot=_OFF,
        target_size=0.0,
        target_error=0.0,
        block_formats=False,
        layer_config="",
        bits=_DEFAULTS["bits"],
        linear_dtype=_DEFAULTS["linear_dtype"],
        card=AUTO,
        target_time=0.0,
        options=None,
    ) -> io.NodeOutput:
        recipe = _make_recipe(
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
            bits=bits,
            linear_dtype=linear_dtype,
            card=card,
            target_time=target_time or None,
        )
        return io.NodeOutput(recipe)


def _make_recipe(
    format: str,
    granularity: str,
    convrot: str,
    keep: str,
    layer_config: str,
    *,
    full_precision_matmul: bool = False,
    block_size: int | None = None,
    bits: int | None = None,
    linear_dtype: str | None = None,
    card: str = AUTO,
    **others,
) -> Recipe:
    """The recipe of the widgets; ``others`` are arguments of :class:`Recipe`.

    Raises:
        RecipeError: the values contradict each other.
    """
    scale = None if granularity == AUTO else granularity
    rotation = CONVROT.get(convrot, convrot) or None
    if format == AUTO:
        best = recommend_format(int8=host.supports_format("int8_tensorwise"))
        format = best.name
        rotation = rotation or (best.convrot if scale in (None, best.granularity) else None)
    config = choose_format(
        format,
        scale,
        **({} if convrot == AUTO else {"convrot": rotation}),
        sibling=True,
        block_size=block_size,
        full_precision_matmul=full_precision_matmul,
        bits=None if bits == _DEFAULTS["bits"] else bits,
        linear_dtype=None if linear_dtype == _DEFAULTS["linear_dtype"] else linear_dtype,
    )
    return Recipe(
        config,
        keep=_split_patterns(keep),
        layer_config=layer_config.strip(),
        card=None if card == AUTO else card,
        **others,
    )


def _split_patterns(keep: str) -> tuple[str, ...]:
    """Patterns of the keep list, one per line."""
    return tuple(line.strip() for line in keep.splitlines() if line.strip())


def _matters_for(option) -> list[dict] | None:
    """Formats, granularities and roundings that the option applies to, as conditions of :func:`~.schema.widget`; None: all."""
    if not isinstance(option, FormatOption):
        return None
    always, conditions = [], []
    for format in _FORMATS:
        codecs = _find_codecs(format)
        names = [name for name, codec in codecs.items() if option.applies(codec)]
        if len(names) == len(codecs):
            always.append(format)
        elif names:
            conditions.append({"format": [format], "granularity": names})
    if option.roundings:
        conditions.append({"rounding": list(option.roundings)})
    return [*([{"format": always}] if always else []), *conditions]


def _find_codecs(format: str) -> dict[str, Codec | None]:
    """Granularity → codec of layers, for the granularities of this format; None for format measured."""
    if format == MEASURED:
        return {AUTO: None}
    found = {}
    for granularity in _GRANULARITIES:
        with suppress(RecipeError):
            found[granularity] = _make_recipe(format, granularity, _OFF, "", "").format.codec
    return found
