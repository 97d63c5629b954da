"""An encoding: one format with every choice it leaves open made. It says how a weight stands in a file."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import RecipeError, UnknownNameError
from .elements import Grid
from .rotation import Rotation
from .scales import BLOCK_SIZE, GRANULARITIES, Tiles
from .table import Format, find_format, sibling

__all__ = ["ROTATED", "Encoding", "make_encoding"]


@dataclass(frozen=True)
class Encoding:
    """Grid × granularity × rotation.

    Attributes:
        format: entry of :data:`FORMATS`.
        granularity: one of the format's.
        block_size: side of a block; None for other granularities.
        rotation: ConvRot of the input channels, or None.
        full_precision_matmul: ask ComfyUI to decode the weight instead of multiplying codes.
    """

    format: Format
    granularity: str
    block_size: int | None = None
    rotation: Rotation | None = None
    full_precision_matmul: bool = False

    @property
    def config(self) -> dict[str, object]:
        """The layer's JSON: the content of its ``comfy_quant`` tensor and of its header entry."""
        config: dict[str, object] = {"format": self.format.name, **self.format.granularities[self.granularity]}
        if self.block_size:
            config["group_size"] = self.block_size
        if self.rotation:
            config |= {"convrot": True, "convrot_groupsize": self.rotation.size}
        if self.full_precision_matmul:
            config["full_precision_matrix_mult"] = True
        return config

    @property
    def static_inputs(self) -> bool:
        """ComfyUI quantizes the inputs, by a scale that the layer may carry."""
        return self.quantized_inputs is not None and self.format.inputs == "tensor"

    def tiles(self, shape: tuple[int, int]) -> Tiles:
        """Which parts of a weight of that shape share a scale."""
        return GRANULARITIES[self.granularity](*shape, self.block_size)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the scale in a file: () per tensor, (out, 1) per row, (⌈out/bs⌉, ⌈in/bs⌉) per block."""
        return () if self.granularity == "tensor" else self.tiles(shape).counts

    def specs(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Key suffix → (dtype, shape) of the layer's tensors, its JSON tensor left aside."""
        return {
            "weight": (self.format.grid.dtype, tuple(shape)),
            "weight_scale": (torch.float32, self.scale_shape(shape)),
        }

    def decode(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Ŵ = scale · codes as float32 (out, in), rotated back; ``scale`` as in a file."""
        tiles = self.tiles(tuple(codes.shape))
        weight = codes.float() * tiles.spread(scale.reshape(tiles.counts))
        return self.rotation.apply(weight) if self.rotation else weight

    @property
    def quantized_inputs(self) -> tuple[Grid, str] | None:
        """The grid of quantized inputs, and what shares a scale among them; None where inputs stay as they are."""
        kind = None if self.full_precision_matmul else self.format.inputs
        return kind and (self.format.grid, kind)

    def quantize_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """X̂: what is left of a layer's inputs (tokens, in) when they are quantized for the product; float32, rotated back.

        Without an ``input_scale`` ComfyUI takes FP8 inputs as they are; other scales follow each token's largest value.
        """
        if self.quantized_inputs is None:
            return inputs.float()
        _, kind = self.quantized_inputs
        values = self.rotation.apply(inputs) if self.rotation else inputs.float()
        if kind == "tensor":
            return self.format.grid.encode(values).float()
        width = self.block_size if kind == "block" else values.shape[-1]
        groups = torch.nn.functional.pad(values, (0, -values.shape[-1] % width)).unflatten(-1, (-1, width))
        scale = (groups.abs().amax(dim=-1, keepdim=True) / self.format.grid.max).clamp_min(1e-30)
        seen = (self.format.grid.encode(groups / scale).float() * scale).flatten(-2)[..., : values.shape[-1]]
        return self.rotation.apply(seen) if self.rotation else seen

    def __str__(self) -> str:
        """For people: "int8_tensorwise per row, ConvRot 256"."""
        block = f" of {self.block_size}" if self.block_size else ""
        rotation = f", ConvRot {self.rotation.size}" if self.rotation else ""
        return f"{self.format.name} per {self.granularity}{block}{rotation}"

    @classmethod
    def from_config(cls, config: Mapping[str, object], granularity: str) -> "Encoding":
        """The encoding that a layer's JSON means. Raises :class:`RecipeError` when it makes no sense."""
        format = find_format(str(config.get("format")))
        convrot = config.get("convrot_groupsize", 256) if config.get("convrot") else None
        block_size = config.get("group_size") if granularity == "block" else None
        full = bool(config.get("full_precision_matrix_mult"))
        return make_encoding(
            format.name, granularity, block_size=block_size, convrot=convrot, full_precision_matmul=full
        )


def make_encoding(
    format: str,
    granularity: str | None = None,
    *,
    block_size: int | None = None,
    convrot: int | None = None,
    full_precision_matmul: bool = False,
) -> Encoding:
    """The encoding of these choices; None takes the format's own granularity, blocks of 128, no rotation.

    Raises:
        RecipeError: a choice that this format does not have; every one acts or is refused.
    """
    entry = find_format(format)
    granularity = granularity or next(iter(entry.granularities))
    if granularity not in GRANULARITIES:
        raise UnknownNameError("granularity", granularity, GRANULARITIES)
    if granularity not in entry.granularities:
        have = " or ".join(entry.granularities)
        other = sibling(entry, granularity)
        hint = f"{other.name} has" if other else "choose another format or granularity"
        raise RecipeError(f"Format {entry.name} has one scale per {have}, not per {granularity}; {hint}.")
    if granularity == "block":
        block_size = BLOCK_SIZE if block_size is None else block_size
        if not isinstance(block_size, int) or isinstance(block_size, bool) or not _is_block_size(block_size):
            raise RecipeError(f"The block size must be a power of two from 8 to 1024, not {block_size}.")
    elif block_size is not None:
        raise RecipeError(f"Block size {block_size} has no effect on {entry.name} per {granularity}; leave it out.")
    if convrot and (entry.name, granularity) not in ROTATED:
        raise RecipeError(
            f"ConvRot exists for int8_tensorwise per row, not for {entry.name} per {granularity}; leave it out."
        )
    if full_precision_matmul and entry.full_precision_matmul == "never":
        raise RecipeError(
            f"full_precision_matrix_mult has no effect on {entry.name}: ComfyUI ignores it there; leave it out."
        )
    decoded = full_precision_matmul or entry.full_precision_matmul == "always"
    return Encoding(entry, granularity, block_size, Rotation(convrot) if convrot else None, decoded)


# (format, granularity) that ConvRot exists for.
ROTATED = {("int8_tensorwise", "row")}


def _is_block_size(size: int) -> bool:
    return 8 <= size <= 1024 and size & (size - 1) == 0
