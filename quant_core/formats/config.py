"""The format part of a recipe: how the weight of a quantized layer is stored."""

from dataclasses import dataclass

from ..errors import RecipeError
from .codec import Codec
from .rotation import GROUP_SIZES, rotation_groups
from .table import find_format, make_codec

__all__ = ["MEASURED", "FormatConfig"]

MEASURED = "measured"  # format name: mixed precision, every layer gets a format of its own

_TYPES = {
    "name": (str,),
    "granularity": (str, type(None)),
    "block_size": (int, type(None)),
    "convrot": (bool, int, str, type(None)),
    "full_precision_matmul": (bool,),
    "bits": (int, type(None)),
    "linear_dtype": (str, type(None)),
}

_OPTIONS = ("bits", "linear_dtype")  # of single families, see :attr:`~.codec.Codec.options`


@dataclass(frozen=True)
class FormatConfig:
    """Format, scale granularity and rotation of quantized layers.

    Two configurations that store the same tensors are equal: defaults of the format are filled in.

    Attributes:
        name: key of :data:`FORMATS`, or :data:`MEASURED`, which leaves all other fields at their defaults.
        granularity: the weights that share a scale; None for the format's default.
        block_size: side of a block in weights, a power of two from 8 to 1024, for block-wise formats; None for 128.
        convrot: ConvRot rotation of the input channels. True: the largest group size that divides them; a number:
            the largest group size up to it; "auto": the group size, or no rotation, with the least error; None: off.
        full_precision_matmul: ask ComfyUI to dequantize the weight instead of multiplying in FP8.
        bits: of a weight, for asym_w4a8_int8: 4 or 6; None for 4.
        linear_dtype: for convrot_w4a4, what activations are quantized to: "int8" or, where the card has it, "int4"; None for int8.

    Raises:
        RecipeError: (from the constructor) an unknown name, or an option that the format does not have.
    """

    name: str = "float8_e4m3fn"
    granularity: str | None = None
    block_size: int | None = None
    convrot: bool | int | str | None = None
    full_precision_matmul: bool = False
    bits: int | None = None
    linear_dtype: str | None = None

    def __post_init__(self):
        for field, types in _TYPES.items():
            value = getattr(self, field)
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise RecipeError(f"The {'format' if field == 'name' else field} cannot be {value!r}.")
        rotated = not self.measured and find_format(self.name).always_rotated
        object.__setattr__(self, "convrot", self.convrot or (True if rotated else None))
        if self.measured:
            self._check_measured()
            return
        codec = self.codec
        for field in ("granularity", "block_size", *codec.options):
            object.__setattr__(self, field, getattr(codec, field))

    def _check_measured(self) -> None:
        given = next((field for field in _TYPES if field != "name" and getattr(self, field)), None)
        if given:
            raise RecipeError(
                f"{given} has no effect on format {MEASURED}, which chooses it for each layer; leave it out."
            )

    @property
    def measured(self) -> bool:
        """Whether every layer gets a format of its own (mixed precision)."""
        return self.name == MEASURED

    @property
    def rotated_by_choice(self) -> bool:
        """Whether ConvRot exists for the format at this granularity and can be switched off: INT8 per row."""
        if self.measured:
            return False
        format = find_format(self.name)
        return self.granularity in format.rotated and not format.always_rotated

    @property
    def smoothed(self) -> bool:
        """Whether layers of the format can be smoothed."""
        return not self.measured and find_format(self.name).smoothed_since is not None

    @property
    def codec(self) -> Codec:
        """The codec of a layer whose input channels the largest allowed ConvRot group divides."""
        allowed = (size for size in rotation_groups(self.convrot, 0) if size in GROUP_SIZES)
        return self._make_codec(max(allowed, default=None))

    def codecs(self, channels: int) -> list[Codec]:
        """The codecs to try for a layer with that number of input channels; several for ConvRot "auto"."""
        groups = rotation_groups(self.convrot, channels)
        rotated = [size for size in groups if size] if find_format(self.name).always_rotated else groups
        return [self._make_codec(size) for size in rotated or groups[:1]]

    def codec_for(self, channels: int) -> Codec:
        """The one of :meth:`codecs` with the largest ConvRot group."""
        return max(self.codecs(channels), key=lambda codec: codec.rotation.size if codec.rotation else 0)

    def _make_codec(self, convrot: int | None) -> Codec:
        return make_codec(
            self.name,
            self.granularity,
            block_size=self.block_size,
            convrot=convrot,
            full_precision_matmul=self.full_precision_matmul,
            **{name: value for name in _OPTIONS if (value := getattr(self, name)) is not None},
        )

    @property
    def label(self) -> str:
        """Short name for file names: the format, its granularity if it is not the default one, the rotation if it is on."""
        if self.measured:
            return MEASURED
        format = self.codec.format
        usual = self.granularity == next(iter(format.granularities))
        name = self.name.removesuffix("_tensorwise") + ("" if usual else f"_{self.granularity}")
        if self.bits == 6:
            name += "_6bit"
        return name + ("_convrot" if self.convrot and not format.always_rotated else "")

    def __str__(self) -> str:
        """For people: "int8_tensorwise per row, ConvRot 256"."""
        return "mixed precision, the format measured best for each layer" if self.measured else str(self.codec)
