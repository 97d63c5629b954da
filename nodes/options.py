"""Rounding Options: options of the rounding that Configure Quantization leaves at their defaults."""

from comfy_api.latest import io

from ..quant_core import Recipe
from ..quant_core.formats import FORMATS, FormatConfig
from ..quant_core.recipes.option_table import FORMAT_OPTIONS
from ..quant_core.recipes.presets import AUTO
from ..quant_core.rounding import OPTIONS
from .ui.option_widgets import option_widget
from .ui.schema import OptionsType, check_inputs, schema

__all__ = ["RoundingOptions"]

_DEFAULT = -1  # value of a number that is not given
_NOT_GIVEN = [AUTO, _DEFAULT, False]  # every switch is off by default
_GRADIENT = [
    "optimizer",
    *(name for name, option in OPTIONS.items() if option.gradient),
]  # any of them: gradient rounding
_GPTQ_AND_GRADIENT = "reconstructed"
_BLOCK_FORMAT = next(name for name in FORMATS if FormatConfig(name).block_size)  # any format with a block size
_SMOOTHED_FORMAT = next(name for name in FORMATS if FormatConfig(name).smoothed)
_LATER = {
    "block_size": FORMAT_OPTIONS["block_size"],
    "smoothing": OPTIONS["smoothing"],
    "beam_width": OPTIONS["beam_width"],
}  # in the order of their releases
_TABLE = {name: option for name, option in OPTIONS.items() if name not in _LATER} | _LATER


def _make_widget(name: str):
    """The widget of an option; its default means that the option is not given."""
    option = _TABLE[name]
    settings = {"optional": True, "matters_for": _matters_for(name), "details": True}
    if option.choices:
        return option_widget(
            name, option, default=AUTO, options=list(dict.fromkeys([AUTO, *option.choices])), **settings
        )
    if option.kind is bool:
        return option_widget(name, option, **settings)
    limits = {"default": _DEFAULT, "min": _DEFAULT, "max": min(option.high, 10**6)}
    steps = {"step": 0.001, "round": False} if option.kind is float else {}
    return option_widget(name, option, f"{_DEFAULT}: not given.", **limits, **steps, **settings)


def _matters_for(name: str) -> list[dict] | None:
    """Values of the other options for which this one acts, see :func:`~.schema.widget`; None: any."""
    option = OPTIONS.get(name)
    if option is None:
        return None
    if option.needs:
        other, value = option.needs
        return [{other: [value]}]
    if option.gradient:
        return [{other: {"not": _NOT_GIVEN}} for other in _GRADIENT]
    return None


class RoundingOptions(io.ComfyNode):
    """See the schema."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingOptions",
            display_name="Rounding Options",
            description="Options of the rounding, for Configure Quantization. An option without effect is refused; one that is not given has its default.",
            inputs=[_make_widget(name) for name in _TABLE],
            outputs=[OptionsType.Output(display_name="options", tooltip="For Configure Quantization.")],
        )

    @classmethod
    def validate_inputs(cls, **chosen):
        return check_inputs(
            lambda *_: Recipe(_find_format(chosen), rounding=_find_rounding(chosen), **_given(chosen)), *chosen.values()
        )

    @classmethod
    def execute(cls, **chosen) -> io.NodeOutput:
        return io.NodeOutput(_given(chosen))


def _find_format(chosen: dict) -> str:
    """A format that has the chosen options."""
    return _SMOOTHED_FORMAT if chosen.get("smoothing") else _BLOCK_FORMAT


def _find_rounding(chosen: dict) -> str:
    """A rounding that takes options of GPTQ and of gradient steps together, where both are chosen; Configure Quantization checks its own."""
    given = _given(chosen)
    gptq = [name for name in given if name in OPTIONS and OPTIONS[name].gradient is False]
    return _GPTQ_AND_GRADIENT if gptq and any(name in given for name in _GRADIENT) else AUTO


def _given(chosen: dict) -> dict:
    return {
        name: value for name, value in chosen.items() if value is not False and value not in (AUTO, _DEFAULT)
    }  # 0 is given, and equals False
