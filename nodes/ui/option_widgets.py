"""Widgets of recipe options, from the option table."""

from comfy_api.latest import io

from ...quant_core.option import Option
from .schema import widget

__all__ = ["option_widget"]

_KINDS = {bool: io.Boolean, int: io.Int, float: io.Float, str: io.String, tuple: io.String}


def option_widget(id: str, option: Option, note: str = "", *, details: bool = False, **settings):
    """The widget of an option.

    Args:
        id: of the input.
        note: added to the tooltip, one or more sentences.
        details: add range and default to the tooltip, for a widget whose own default means "not given".
        settings: of :func:`~.schema.widget`; they override those from the table.
    """
    text = option.describe(details)
    tooltip = " ".join(filter(None, (f"{text[0].upper()}{text[1:]}.", note)))
    values = {"id": id, "default": option.default, "tooltip": tooltip, **settings}
    if option.choices:
        return widget(io.Combo, **{"options": list(option.choices), **values})
    return widget(_KINDS[option.kind], **values)
