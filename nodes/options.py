"""Rounding Options: what Configure Quantization leaves at its defaults, for those who want to turn every knob."""

from comfy_api.latest import io

from ..quant_core import Recipe
from ..quant_core.recipes.presets import AUTO
from ..quant_core.rounding import OPTIONS
from .ui.schema import OptionsType, check_inputs, schema, widget

__all__ = ["RoundingOptions"]

_DEFAULT = -1  # of a number that was not chosen
_LEFT_ALONE = [AUTO, _DEFAULT, False]  # off is the default of every switch
_GRADIENT = [
    "optimizer",
    *(name for name, option in OPTIONS.items() if option.gradient),
]  # any of them: gradient rounding


def _tooltip(option) -> str:
    acts = "" if len(option.acts) > 2 else f"Rounding {' or '.join(option.acts)}: "
    default = "" if option.default in (None, False) else f" The default is {option.default}."
    return f"{acts}{option.help}.{default}"


def _widget(name: str, option):
    """The widget of an option; its default means that the option was not chosen."""
    shared = {"id": name, "optional": True, "matters_for": _matters_for(name)}
    if option.choices:
        choices = list(dict.fromkeys([AUTO, *option.choices]))
        return widget(io.Combo, options=choices, default=AUTO, tooltip=_tooltip(option), **shared)
    if option.kind is bool:
        return widget(io.Boolean, default=False, tooltip=_tooltip(option), **shared)
    limits = {"default": _DEFAULT, "min": _DEFAULT, "max": min(option.high, 10**6)}
    limits["tooltip"] = f"{_tooltip(option)} {_DEFAULT}: not chosen."
    if option.kind is int:
        return widget(io.Int, **limits, **shared)
    return widget(io.Float, step=0.001, round=False, **limits, **shared)


def _matters_for(name: str) -> list[dict] | None:
    """For which values of the others this option acts, see :func:`~.schema.widget`; None: for any."""
    option = OPTIONS[name]
    if option.needs:
        other, value = option.needs
        return [{other: [value]}]
    if option.gradient:
        return [{other: {"not": _LEFT_ALONE}} for other in _GRADIENT]
    if option.gradient is False:
        return [dict.fromkeys(_GRADIENT, _LEFT_ALONE)]
    return None


class RoundingOptions(io.ComfyNode):
    """See the schema."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingOptions",
            display_name="Rounding Options",
            description="Options of learned rounding for Configure Quantization. Each one acts or is refused; those left alone have their defaults.",
            search_aliases=["optimizer", "svd", "iterations", "learned rounding", "block size"],
            inputs=[
                *(_widget(name, option) for name, option in OPTIONS.items()),
                widget(
                    io.Int,
                    id="block_size",
                    default=_DEFAULT,
                    min=_DEFAULT,
                    max=1024,
                    optional=True,
                    tooltip=f"Granularity block: side of a block, a power of two from 8 to 1024. The default is 128. {_DEFAULT}: not chosen.",
                ),
            ],
            outputs=[OptionsType.Output(display_name="options", tooltip="For Configure Quantization.")],
        )

    @classmethod
    def validate_inputs(cls, **chosen):
        return check_inputs(
            lambda *_: Recipe(format="int8_blockwise", **_given(chosen)), *chosen.values()
        )  # which has a block size

    @classmethod
    def execute(cls, **chosen) -> io.NodeOutput:
        return io.NodeOutput(_given(chosen))


def _given(chosen: dict) -> dict:
    return {
        name: value for name, value in chosen.items() if value is not False and value not in (AUTO, _DEFAULT)
    }  # 0 is a choice, and equals False
