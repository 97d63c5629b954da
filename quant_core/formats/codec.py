"""Codec: what one quantized layer is in a file, and back.

A :class:`Format` is one format string of ComfyUI and one row of :mod:`.table`; it names the class of its codecs, one
module per family. A :class:`Codec` is a format with every choice made: granularity, group size, rotation.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch

from ..errors import RecipeError
from .elements import ElementFormat
from .layer_json import CONFIG_KEY, EXPERTS_KEY, config_bytes
from .rotation import Rotation
from .scales import BLOCK_SIZE, FLOAT32, GRANULARITIES, ScaleFormat, ScaleGroups
from .smoothing import Smoothing
from .solution import Solution
from .space import Basis, SolveSpace

__all__ = ["Codec", "Format", "Parts", "ShapedTensor", "TensorSpec", "read_count"]

Parts = Mapping[str, torch.Tensor]
"""The tensors of one layer by the last part of their names: "weight", "weight_scale" …"""


class ShapedTensor(Protocol):
    """Anything with a shape: a tensor, or its entry in a header."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor in a file must be; ``views``: other dtypes of the same bytes that ComfyUI's loader accepts."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    views: tuple[torch.dtype, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def matches(self, found) -> bool:
        """Whether ``found``, anything with dtype and shape, is such a tensor."""
        return found is not None and found.dtype in (self.dtype, *self.views) and tuple(found.shape) == self.shape


@dataclass(frozen=True)
class Format:
    """One format string of ComfyUI's ``QUANT_ALGOS``, or of this node pack.

    Attributes:
        name: the ``format`` string of the layer's JSON.
        elements: the numbers that a quantized value can be.
        granularities: name → extra JSON keys; the first is the default.
        codec: class of the format's codecs.
        note: one sentence for users.
        stock_since: first ComfyUI release whose loaders read it; None: they need this node pack.
        full_precision_matmul: whether the JSON key ``full_precision_matrix_mult``, by which ComfyUI dequantizes a weight
            instead of multiplying its quantized values, is a "choice", is "always" set because no card multiplies such
            values, or "never" has an effect.
        activations: what shares a scale when ComfyUI quantizes a layer's activations: the whole "tensor", with the static
            ``input_scale`` that the layer may carry, each "token", or each "group" of a token; None: never quantized.
        uncalibrated_error: relative error of a layer's output by round to nearest, for formats whose error is expected to be
            visible: that of Gaussian weights; None for others.
        native_since: first compute capability on which ComfyUI quantizes activations; older cards compute with the
            dequantized weight and unquantized activations. (0, 0): every card.
        group_size: columns that share a scale, where the format fixes it.
        rotated: granularities for which ConvRot exists.
        always_rotated: ConvRot is part of the format.
        smoothed_since: first ComfyUI release that reads ``pre_quant_scale`` in layers of the format; None: none does.
        storage: dtype of the stored weight; None: that of the elements, one value per item.
        banks: ComfyUI reads banks of experts in the format.
    """

    name: str
    elements: ElementFormat
    granularities: Mapping[str, Mapping[str, object]]
    codec: type["Codec"]
    note: str
    stock_since: str | None
    full_precision_matmul: Literal["choice", "always", "never"] = "never"
    activations: Literal["tensor", "token", "group"] | None = None
    uncalibrated_error: float | None = None
    native_since: tuple[int, int] = (0, 0)
    group_size: int | None = None
    rotated: tuple[str, ...] = ()
    always_rotated: bool = False
    smoothed_since: str | None = None
    storage: torch.dtype | None = None
    banks: bool = False

    @property
    def storage_dtype(self) -> torch.dtype:
        """dtype of the weight in a file."""
        return self.storage or self.elements.dtype

    def make(
        self,
        granularity: str,
        *,
        block_size: int | None = None,
        convrot: int | None = None,
        full_precision_matmul: bool = False,
        **options: object,
    ) -> "Codec":
        """The codec of these choices; None takes blocks of 128, no rotation and the first value of an option.

        Args:
            options: those of the family, see :attr:`Codec.options`.

        Raises:
            RecipeError: a choice that the format does not have; every choice has an effect or is refused.
        """
        if granularity == "block":
            block_size = BLOCK_SIZE if block_size is None else block_size
            if type(block_size) is not int or not 8 <= block_size <= 1024 or block_size & (block_size - 1):
                raise RecipeError(f"The block size must be a power of two from 8 to 1024, not {block_size}.")
        elif block_size is not None:
            raise RecipeError(f"Block size {block_size} has no effect on {self.name} per {granularity}; leave it out.")
        if convrot and granularity not in self.rotated:
            raise RecipeError(
                f"ConvRot exists for int8_tensorwise per row, not for {self.name} per {granularity}; leave it out."
            )
        if full_precision_matmul and self.full_precision_matmul == "never":
            raise RecipeError(
                f"full_precision_matrix_mult has no effect on {self.name}: ComfyUI ignores it there; leave it out."
            )
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        for name, value in given.items():
            allowed = self.codec.options.get(name)
            if allowed is None:
                raise RecipeError(f"{name} has no effect on {self.name}; leave it out.")
            if value not in allowed or type(value) is not type(allowed[0]):
                names = " or ".join(map(str, allowed))
                raise RecipeError(f"The {name} of {self.name} can be {names}, not {value!r}.")
        dequantized = full_precision_matmul or self.full_precision_matmul == "always"
        rotation = Rotation(convrot) if convrot else None
        return self.codec(self, granularity, block_size, rotation, dequantized, **given)


@dataclass(frozen=True)
class Codec(ABC):
    """A format with every choice made. The subclass of a family defines how a layer is stored.

    Attributes:
        format: entry of :data:`~.table.FORMATS`.
        granularity: one of the format's.
        block_size: side of a block; None for other granularities.
        rotation: ConvRot of the input channels, or None.
        full_precision_matmul: ask ComfyUI to dequantize the weight instead of multiplying quantized values.
        smoothing: of the input channels, instead of a rotation, or None. See :meth:`of_values` for layers of files.
    """

    format: Format
    granularity: str
    block_size: int | None = None
    rotation: Rotation | None = None
    full_precision_matmul: bool = False
    smoothing: Smoothing | None = None

    # Further choices of a family: name → values, the default first.
    options: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    scales: ClassVar[ScaleFormat] = FLOAT32
    positive: ClassVar[tuple[str, ...]] = ("input_scale",)  # suffixes of tensors whose values must be positive
    signed: ClassVar[tuple[str, ...]] = ()  # suffixes of tensors whose values may be negative

    @property
    def group_size(self) -> int | None:
        """Side of a block or length of a group; None for other granularities."""
        return self.format.group_size or self.block_size

    @property
    def basis(self) -> Basis | None:
        """The basis of the stored weight and of the activations that it multiplies; None for the original one."""
        return self.rotation or self.smoothing

    @property
    def config(self) -> dict[str, object]:
        """The layer's JSON: content of its JSON tensor and of its header entry."""
        config: dict[str, object] = {"format": self.format.name, **self.format.granularities[self.granularity]}
        if self.group_size:
            config["group_size"] = self.group_size
        if self.rotation:
            config |= {"convrot": True, "convrot_groupsize": self.rotation.size}
        if self.full_precision_matmul:
            config["full_precision_matrix_mult"] = True
        return config

    def layer_config(self, shape: tuple[int, ...]) -> dict[str, object]:
        """:attr:`config` with the keys that depend on the shape (out, in) of the weight."""
        return self.config

    @classmethod
    def from_config(cls, format: Format, config: Mapping[str, object], granularity: str) -> "Codec":
        """The codec that a layer's JSON describes. Raises :class:`RecipeError` or ValueError where a value is not valid."""
        return format.make(
            granularity,
            block_size=read_count(config, "group_size", BLOCK_SIZE) if granularity == "block" else None,
            convrot=read_count(config, "convrot_groupsize", 256) if config.get("convrot") else None,
            full_precision_matmul=bool(config.get("full_precision_matrix_mult")),
        )

    def of_tensors(self, find: Callable[[str], ShapedTensor | None]) -> "Codec":
        """The codec with what only the shapes of a layer's tensors tell; ``find``: suffix → tensor, None for a missing one."""
        return self

    def of_values(self, parts: Parts) -> "Codec":
        """The codec with what only the values of a layer's tensors tell."""
        return self

    def admits(self, shape: tuple[int, ...]) -> str | None:
        """The reason why a weight of that shape (out, in) cannot be stored; None where it can."""
        if self.rotation and shape[1] % self.rotation.size:
            return f"ConvRot groups of {self.rotation.size} do not divide its {shape[1]} input channels"
        if self.format.always_rotated and not self.rotation:
            return f"it is always rotated, and no ConvRot group divides its {shape[1]} input channels"
        return None

    def admits_bank(self) -> str | None:
        """The reason why ComfyUI does not read banks of such matrices; None where it does. Source: ``MoEExperts`` of ComfyUI 0.33."""
        if not self.format.banks:
            return f"ComfyUI does not read banks of experts in {self.format.name}"
        if self.rotation and not self.format.always_rotated:
            return "ComfyUI ignores the rotation (ConvRot) of INT8 banks of experts"
        return None

    def groups(self, shape: tuple[int, ...]) -> ScaleGroups:
        """The parts of a weight (out, in) that share a scale."""
        out, inner = shape
        return GRANULARITIES[self.granularity](out, inner, self.group_size or 0)

    def solve_space(self, shape: tuple[int, ...]) -> SolveSpace:
        """The space in which a weight (out, in) is rounded."""
        return SolveSpace(self.format.elements, self.groups(shape), self.scales, self.basis)

    @abstractmethod
    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Suffix → what the layer's tensors are for a weight (out, in); its JSON tensor and optional ones left out."""

    def optional(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The same of tensors that a layer may have; this project writes them with a calibration."""
        return {"input_scale": TensorSpec(torch.float32, ())} if self.format.activations == "tensor" else {}

    def file_specs(self, shape: tuple[int, ...], *, calibrated: bool = False) -> dict[str, TensorSpec]:
        """Suffix → what all tensors of a layer are that this project writes: those of :meth:`specs` and the JSON tensor.

        Args:
            shape: (out, in) of a weight, or (experts, out, in) of a bank, whose tensors are those of its matrices, stacked.
            calibrated: those of :meth:`optional` too, which banks do not have.
        """
        bank, matrix = shape[:-2], shape[-2:]
        specs = {**self.specs(matrix), **(self.optional(matrix) if calibrated and not bank else {})}
        stacked = {suffix: replace(spec, shape=(*bank, *spec.shape)) for suffix, spec in specs.items()}
        return {**stacked, CONFIG_KEY: TensorSpec(torch.uint8, (len(config_bytes(self.file_config(shape))),))}

    def file_config(self, shape: tuple[int, ...]) -> dict[str, object]:
        """The JSON of a layer (out, in), or of a bank (experts, out, in)."""
        experts = {EXPERTS_KEY: shape[0]} if len(shape) == 3 else {}
        return self.layer_config(shape[-2:]) | experts

    def weight_shape(self, stored: tuple[int, ...], config: Mapping[str, object]) -> tuple[int, int]:
        """(out, in) of the weight whose stored tensor has that shape. Raises ValueError with the reason where none has."""
        if len(stored) != 2:
            raise ValueError(f"the weight has shape {tuple(stored)}; only matrices are read as quantized")
        return stored[0], stored[1]

    def original_shape(self, stored: tuple[int, ...], config: Mapping[str, object]) -> tuple[int, ...]:
        """:meth:`weight_shape`, and of a bank (experts, out, in)."""
        bank = stored[:1] if len(stored) == 3 else ()
        return (*bank, *self.weight_shape(stored[len(bank) :], config))

    @abstractmethod
    def store(self, solution: Solution) -> dict[str, torch.Tensor]:
        """Suffix → tensor of a layer, as in :meth:`specs`."""

    @abstractmethod
    def dequantize(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        """The weight (out, in) of a layer as float32 in the original basis, on the device of its tensors.

        Raises:
            ValueError, RuntimeError: the tensors contradict each other.
        """

    def restore_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight (out, in) from the stored basis to the original one."""
        return self.basis.restore_weight(weight) if self.basis else weight

    def restore(self, values: torch.Tensor) -> torch.Tensor:
        """Activations (tokens, in) from the stored basis to the original one."""
        return self.basis.restore(values) if self.basis else values

    def scale_values(self, suffix: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The numbers of one of the layer's tensors other than its weight, float32, without padding."""
        spec = {**self.specs(shape), **self.optional(shape)}[suffix]
        return (tensor if tensor.dtype.is_floating_point else tensor.view(spec.dtype)).float()

    @property
    def kitchen_since(self) -> str | None:
        """First comfy-kitchen release that runs such layers; None: each that a ComfyUI of ``stock_since`` requires."""
        return None

    @property
    def magnitude_bits(self) -> int:
        """Those bits of a stored byte of the weight that are zero for the values 0 and −0; 0 if the format has no zero."""
        return 0x7F if self.format.elements.floating else 0xFF

    @property
    def weight_bits(self) -> int:
        """Bits of a stored weight, without scales."""
        return self.format.elements.bits

    @property
    def cast_scale(self) -> str | None:
        """Suffix of the scale that ComfyUI casts to the dtype of the activations before it multiplies; None where it is float32."""
        return None

    def quantizes_activations(self, capability: tuple[int, int] | None = None) -> bool:
        """Whether ComfyUI quantizes activations on a card of that compute capability; None: on one that does natively."""
        native = capability is None or capability >= self.format.native_since
        return native and self.format.activations is not None and not self.full_precision_matmul

    @property
    def static_activations(self) -> bool:
        """ComfyUI quantizes the activations by the ``input_scale`` that the layer may carry."""
        return self.quantizes_activations() and self.format.activations == "tensor"

    def quantize_activations(self, x: torch.Tensor, capability: tuple[int, int] | None = None) -> torch.Tensor:
        """X̂: activations (tokens, in) as ComfyUI quantizes them on a card, float32 in the original basis.

        Without an ``input_scale`` ComfyUI quantizes FP8 activations with scale 1; all other scales are dynamic.
        """
        if not self.quantizes_activations(capability):
            return x.float()
        return self.restore(self.quantize_stored(x, capability))

    def quantize_stored(self, x: torch.Tensor, capability: tuple[int, int] | None = None) -> torch.Tensor:
        """:meth:`quantize_activations` in the stored basis, on a card that quantizes them."""
        values = self.basis.apply(x) if self.basis else x.float()
        elements = self.activation_elements(capability)
        if self.format.activations == "tensor":
            return elements.encode(values).float()
        tokens, inner = values.shape
        columns = inner if self.format.activations == "token" else self.group_size or inner
        groups = ScaleGroups(tokens, inner, 1, columns)
        return SolveSpace(elements, groups, self.scales).round_nearest(values)

    def activation_elements(self, capability: tuple[int, int] | None = None) -> ElementFormat:
        """The elements that ComfyUI quantizes activations to, on a card of that compute capability; None: on any."""
        return self.format.elements

    def __str__(self) -> str:
        """For users: "int8_tensorwise per row, ConvRot 256"."""
        size = f" of {self.group_size}" if self.group_size else ""
        rotation = f", ConvRot {self.rotation.size}" if self.rotation else ""
        smoothing = ", smoothed" if self.smoothing else ""
        return f"{self.format.name} per {self.granularity}{size}{rotation}{smoothing}"


def read_count(config: Mapping[str, object], key: str, default: int) -> int:
    """A positive integer of a layer's JSON. Raises ValueError for any other value."""
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"its JSON has {key}={value!r}, and must have a positive integer")
    return value
