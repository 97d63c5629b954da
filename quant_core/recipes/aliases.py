"""Short format names, the same in the nodes, ``lrq``, recipes and layer configs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..formats import MEASURED, FormatConfig, with_granularity
from .presets import AUTO

__all__ = ["FORMAT_ALIASES", "FormatAlias", "choose_format", "find_format_name", "make_format"]


@dataclass(frozen=True)
class FormatAlias:
    """Target of a short name: a format, and its granularity, ConvRot and bits unless others are given."""

    format: str
    granularity: str | None = None
    convrot: bool | None = None
    bits: int | None = None


FORMAT_ALIASES: Mapping[str, FormatAlias] = {
    "int8": FormatAlias("int8_tensorwise", "row", convrot=True),
    "fp8": FormatAlias("float8_e4m3fn"),
    "w4a8": FormatAlias("asym_w4a8_int8"),
    "int4": FormatAlias("asym_w4a8_int8"),
    "w6a8": FormatAlias("asym_w4a8_int8", bits=6),
    "w4a4": FormatAlias("convrot_w4a4"),
}
# Other names of formats that users type → ours. Case does not matter, nor do dashes for underscores.
_SPELLINGS = {
    "e4m3": "fp8",
    "e4m3fn": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_e4m3fn": "fp8",
    "float8": "fp8",
    "e5m2": "float8_e5m2",
    "fp8_e5m2": "float8_e5m2",
    "w8a8": "int8",
    "int8_convrot": "int8",
    "fp4": "nvfp4",
    "int6": "w6a8",
}


def find_format_name(text: str) -> str:
    """Our name of a format under one that users type; an unknown one is returned in lower case."""
    name = text.lower().replace("-", "_")
    return _SPELLINGS.get(name, name)


def make_format(
    name: str,
    granularity: str | None = None,
    convrot: bool | int | str | None = None,
    *,
    sibling: bool = False,
    **options,
) -> FormatConfig:
    """The configuration of a format name or alias; given options override those of the alias.

    Args:
        name: key of :data:`FORMATS` or :data:`FORMAT_ALIASES`, or "measured".
        granularity: None for that of the format or alias. An alias with a granularity that its format lacks is the
            sibling format with the same element format, such as int8_blockwise; a sibling is not rotated.
        convrot: None for that of the alias, False for no rotation.
        sibling: choose the sibling for format names too.
        options: other fields of :class:`FormatConfig`.

    Raises:
        RecipeError: an unknown name, or an option that the format lacks.
    """
    alias = FORMAT_ALIASES.get(name) if isinstance(name, str) else None
    if alias:
        if convrot is None and granularity in (None, alias.granularity):
            convrot = alias.convrot
        if options.get("bits") is None and alias.bits:
            options["bits"] = alias.bits
        name, granularity = alias.format, granularity or alias.granularity
    known = isinstance(name, str) and name != MEASURED and isinstance(granularity, str)
    if known and (alias or sibling):
        name = with_granularity(name, granularity)
    return FormatConfig(name, granularity, convrot=convrot, **options)


def choose_format(name: str, granularity: str | None = None, **options) -> FormatConfig:
    """As :func:`make_format`, for new recipes: INT8 per row has ConvRot "auto" unless ``convrot`` is among the options.

    Recipe files, layer configs and saved workflows use :func:`make_format`, whose defaults are those of version 0.1.0.
    """
    config = make_format(name, granularity, **options)
    return replace(config, convrot=AUTO) if "convrot" not in options and config.rotated_by_choice else config
