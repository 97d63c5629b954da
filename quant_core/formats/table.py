"""The table of formats, each under the exact string that ComfyUI's loader knows. A new format is one file and one line here."""

from collections.abc import Iterable, Mapping

from ..errors import RecipeError, UnknownNameError
from . import asym_w4a8, convrot_w4a4, fp8, int8, mxfp8, nvfp4
from .codec import Codec, Format
from .scales import GRANULARITIES

__all__ = [
    "FORMATS",
    "READABLE",
    "find_format",
    "find_sibling",
    "make_codec",
    "newest_release",
    "release_number",
    "with_granularity",
]

_FAMILIES = (
    fp8.FORMATS,
    int8.FORMATS,
    nvfp4.FORMATS,
    mxfp8.FORMATS,
    convrot_w4a4.FORMATS,
    asym_w4a8.FORMATS,
)

_ALL = [entry for family in _FAMILIES for entry in family]
# Formats that stock ComfyUI reads come first.
READABLE: Mapping[str, Format] = {
    entry.name: entry for entry in sorted(_ALL, key=lambda entry: entry.stock_since is None)
}
FORMATS = READABLE  # that this version writes


def release_number(release: str) -> tuple[int, ...]:
    """A release as it is written, "0.3.75", in a form that compares by age."""
    return tuple(map(int, release.split(".")))


def newest_release(releases: Iterable[str | None]) -> str | None:
    """The newest of some releases; None where there is none."""
    return max(filter(None, releases), key=release_number, default=None)


def find_format(name: str) -> Format:
    """The format of that name that this version writes, or :class:`UnknownNameError` with the nearest one."""
    if name not in FORMATS:
        raise UnknownNameError("format", name, FORMATS)
    return FORMATS[name]


def find_sibling(entry: Format, granularity: str) -> Format | None:
    """The format of the same elements and family that has this granularity, if there is one."""
    kind = (entry.elements, entry.codec)
    others = (other for other in FORMATS.values() if (other.elements, other.codec) == kind)
    return next((other for other in others if granularity in other.granularities), None)


def with_granularity(name: str, granularity: str | None) -> str:
    """That format, or its sibling where the granularity is the sibling's; :class:`UnknownNameError` for an unknown one."""
    entry = find_format(name)
    other = None if granularity in (None, *entry.granularities) else find_sibling(entry, granularity)
    return (other or entry).name


def make_codec(
    format: str,
    granularity: str | None = None,
    *,
    block_size: int | None = None,
    convrot: int | None = None,
    full_precision_matmul: bool = False,
    **options: object,
) -> Codec:
    """The codec of these choices; None takes the format's own granularity, blocks of 128, no rotation.

    Args:
        options: those of the format's family, see :attr:`Codec.options`.

    Raises:
        UnknownNameError: no such format or granularity.
        RecipeError: a choice that this format does not have.
    """
    entry = find_format(format)
    granularity = granularity or next(iter(entry.granularities))
    if granularity not in GRANULARITIES:
        raise UnknownNameError("granularity", granularity, GRANULARITIES)
    if granularity not in entry.granularities:
        other = find_sibling(entry, granularity)
        hint = f"{other.name} has" if other else "choose another format or granularity"
        raise RecipeError(
            f"Format {entry.name} has one scale per {' or '.join(entry.granularities)}, not per {granularity}; {hint}."
        )
    return entry.make(
        granularity, block_size=block_size, convrot=convrot, full_precision_matmul=full_precision_matmul, **options
    )
