"""The options of a recipe: one table for the widgets of the nodes, the options of ``lrq`` and the tables of the manual."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..formats import FORMATS, GRANULARITIES, GROUP_SIZES, MEASURED, Codec, FormatConfig, find_sibling
from ..formats.cards import CARDS
from ..formats.scales import BLOCK_SIZE
from ..option import Option
from ..rounding import MODEL_ROUNDINGS, OPTIONS, ROUNDINGS
from .aliases import FORMAT_ALIASES
from .presets import AUTO, NONE, PRESETS

__all__ = ["CONVROT", "MEASURED_ONLY", "OPTION_TABLE", "FormatOption"]

# Spelling of a rotation in widgets and options → value in a recipe.
CONVROT: Mapping[str, bool | int | str] = {
    "off": False,
    "on": True,
    AUTO: AUTO,
    **{str(size): size for size in GROUP_SIZES},
}


@dataclass(frozen=True, kw_only=True)
class FormatOption(Option):
    """An option that applies to some formats.

    Attributes:
        applies: whether it applies to layers with this codec; None is format measured.
        roundings: roundings with which it applies to every format.
    """

    applies: Callable[[Codec | None], bool]
    roundings: tuple[str, ...] = ()

    @cached_property
    def scope(self) -> str:
        """Formats, and granularities if they matter, that the option applies to."""
        if self.applies(None):
            return " or rounding ".join(filter(None, (f"format {MEASURED}", " or ".join(self.roundings))))
        names = [text for name in FORMATS for text in self._describe_format(name)]
        return f"any format but {MEASURED}" if names == list(FORMATS) else ", ".join(names)

    def _describe_format(self, name: str) -> list[str]:
        granularities = FORMATS[name].granularities
        found = [each for each in granularities if self.applies(FormatConfig(name, each).codec)]
        return [name] if len(found) == len(granularities) else [f"{name} per {each}" for each in found]


def _has_granularities(codec: Codec | None) -> bool:
    """Whether the format or a sibling has another granularity."""
    if codec is None:
        return False
    return any(find_sibling(codec.format, other) for other in GRANULARITIES if other != codec.granularity)


_ALIASES = "; ".join(
    " per ".join(filter(None, (f"{alias}: {target.format}", target.granularity)))
    + (" with ConvRot" if target.convrot else "")
    + (f" with {target.bits} bits" if target.bits else "")
    for alias, target in FORMAT_ALIASES.items()
)

FORMAT_OPTIONS: Mapping[str, Option] = {
    "format": Option(
        default=FormatConfig.name,
        choices=(*FORMATS, AUTO, MEASURED, *FORMAT_ALIASES),
        metavar="NAME",
        help=f"format of the quantized layers; {AUTO}: the best format for this card, INT8 per row with ConvRot or FP8; "
        f"{MEASURED}: mixed precision, the best format for each layer, needs a calibration; {_ALIASES}",
    ),
    "granularity": FormatOption(
        applies=_has_granularities,
        choices=tuple(GRANULARITIES),
        flags=("--scaling_mode",),
        metavar="PER",
        help=f"weights that share a scale: {', '.join(GRANULARITIES)}; by default that of the format",
    ),
    "block_size": FormatOption(
        applies=lambda codec: codec is not None and codec.granularity == "block",
        kind=int,
        default=BLOCK_SIZE,
        low=8,
        high=1024,
        metavar="N",
        help="side of a block in weights, a power of two",
    ),
    "convrot": FormatOption(
        applies=lambda codec: codec is not None and codec.granularity in codec.format.rotated,
        choices=tuple(CONVROT),
        metavar="GROUP",
        help=f"rotate groups of {', '.join(map(str, GROUP_SIZES))} input channels by a Hadamard matrix (ConvRot), which spreads "
        "outliers; on: the largest group size that divides the channels; a number: the largest group size up to it; "
        "auto: the group size, or no rotation, with the least error; always on for formats that contain the rotation; by "
        "default auto for int8_tensorwise per row",
    ),
    "bits": FormatOption(
        applies=lambda codec: codec is not None and "bits" in codec.options,
        kind=int,
        default=4,
        low=4,
        high=6,
        metavar="N",
        help="bits of a weight: 4, or 6 for a third of the error, which needs comfy-kitchen 0.2.36 or newer",
    ),
    "linear_dtype": FormatOption(
        applies=lambda codec: codec is not None and "linear_dtype" in codec.options,
        default="int8",
        choices=("int8", "int4"),
        metavar="DTYPE",
        help="what ComfyUI quantizes activations to: int8, or int4, which only cards of SM 7.5 and 8.x have and which has six "
        "times the error",
    ),
    "full_precision_matmul": FormatOption(
        applies=lambda codec: codec is not None and codec.format.full_precision_matmul == "choice",
        kind=bool,
        default=False,
        flags=("--full_precision_matrix_mult",),
        help="ask ComfyUI to dequantize weights instead of multiplying in FP8",
    ),
    "target_size": FormatOption(
        applies=lambda codec: codec is None,
        kind=float,
        metavar="GB",
        help="largest size of the file in GB (10⁹ bytes); by default, without target_error, 5 % more than with every layer in "
        "8 bits; formats of 4 bits are tried where that is too large",
    ),
    "target_error": FormatOption(
        applies=lambda codec: codec is None,
        kind=float,
        metavar="E",
        help="largest relative error of the model's output; the smallest file within it is made",
    ),
    "card": FormatOption(
        applies=lambda codec: codec is None,
        roundings=MODEL_ROUNDINGS,
        choices=CARDS,
        metavar="SM",
        help="compute capability of the card that the model is for, which decides what ComfyUI quantizes activations to: "
        f"{', '.join(CARDS)}; by default that of the card that quantizes",
    ),
    "target_time": FormatOption(
        applies=lambda codec: codec is None,
        kind=float,
        metavar="RATIO",
        help="largest time of the layers relative to bfloat16, 0.8 for a fifth less, as measured with 4096 tokens on the card "
        "that quantizes, or on one that was added with lrq bench",
    ),
    "block_formats": FormatOption(
        applies=lambda codec: codec is None,
        kind=bool,
        default=False,
        help="try block-wise formats too; they need this node pack to load",
    ),
}
LAYER_OPTIONS: Mapping[str, Option] = {
    "preset": Option(
        default=AUTO,
        choices=(AUTO, NONE, *PRESETS),
        metavar="NAME",
        help=f"which sensitive layers stay in full precision; {AUTO}: recognize the model family by its layer names; "
        f"{NONE}: the general rule alone",
    ),
    "keep": Option(
        kind=tuple,
        default="",
        flags=("--exclude-layers",),
        metavar="REGEX",
        help="regular expressions: layers whose tensor name one of them is found in stay in full precision",
    ),
    "layer_config": FormatOption(
        applies=lambda codec: codec is not None,
        default="",
        flags=("--layer-config",),
        metavar="JSON",
        help='rules for single layers: {"REGEX": {"format": "int8", "convrot": true}, "REGEX": "skip"}; the most specific '
        "rule decides, before preset and keep list",
    ),
    "heur": Option(kind=bool, default=False, help="also keep layers whose shape gains little speed from quantization"),
}
ROUNDING_OPTIONS: Mapping[str, Option] = {
    "rounding": Option(
        default=next(iter(ROUNDINGS)),
        choices=tuple(ROUNDINGS),
        help="rounding method; " + "; ".join(f"{name}: {text}" for name, text in ROUNDINGS.items()),
    ),
    **OPTIONS,
    "seed": Option(
        kind=int,
        default=0,
        low=-(2**63),
        flags=("--manual_seed", "--seed"),
        help="seed of all random numbers; the same seed and model give the same file, byte for byte",
    ),
}
# Title of the section in the manual and in ``lrq --help`` → recipe field → option.
OPTION_TABLE: Mapping[str, Mapping[str, Option]] = {
    "Format": FORMAT_OPTIONS,
    "Layers": LAYER_OPTIONS,
    "Rounding": ROUNDING_OPTIONS,
}
# Recipe field → option, of those that act on no other format than measured, or with some roundings.
MEASURED_ONLY: Mapping[str, FormatOption] = {
    name: option for name, option in FORMAT_OPTIONS.items() if isinstance(option, FormatOption) and option.applies(None)
}
