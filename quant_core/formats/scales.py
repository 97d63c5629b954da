"""Scales: which part of a weight shares one (groups), and which numbers it can be (levels)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = [
    "BLOCK_SIZE",
    "E8M0",
    "FLOAT32",
    "GRANULARITIES",
    "TWO_LEVEL_E4M3",
    "CastFloat32",
    "ScaleFormat",
    "ScaleGroups",
    "divide",
]

BLOCK_SIZE = 128
_SMALLEST = torch.finfo(torch.float32).tiny
_SPARE_OCTAVES = 3  # of normal numbers that stay below the largest one where a scale is raised


@dataclass(frozen=True)
class ScaleGroups:
    """A weight of shape (out, in) divided into groups of ``rows`` × ``columns`` with one scale each.

    Scales are a float32 tensor of shape :attr:`counts`; the last group along a dimension may be smaller.
    """

    out: int
    inner: int
    rows: int
    columns: int

    @property
    def counts(self) -> tuple[int, int]:
        """Number of groups: (along out, along in)."""
        return -(-self.out // self.rows), -(-self.inner // self.columns)

    @property
    def summed_rows(self) -> int:
        """Rows whose errors may be summed before groups are distinguished: those of a small group, else one."""
        return self.rows if self.rows < self.out else 1

    def spread(self, scale: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The scale of each weight of rows start:stop, in a shape that broadcasts to (rows, in)."""
        if scale.shape[0] > 1:
            rows = torch.arange(start, self.out if stop is None else stop, device=scale.device)
            scale = scale[rows // self.rows]
        return scale if scale.shape[1] == 1 else scale.repeat_interleave(self.columns, dim=1)[:, : self.inner]

    def row_amax(self, rows: torch.Tensor) -> torch.Tensor:
        """Largest magnitude of each row within each group: (n, in) → (n, groups along in)."""
        groups = self.counts[1]
        padded = torch.nn.functional.pad(rows, (0, groups * self.columns - self.inner))
        return padded.view(rows.shape[0], groups, self.columns).abs().amax(dim=2)

    def join_rows(self, values: torch.Tensor, join: Callable[..., torch.Tensor], summed: int = 1) -> torch.Tensor:
        """Reduce (…, ⌈out/summed⌉, groups along in) to (…, *counts) with ``join(values, dim)``; zeros fill the last group."""
        per_group = -(-self.rows // summed)
        missing = self.counts[0] * per_group - values.shape[-2]
        padded = torch.nn.functional.pad(values, (0, 0, 0, missing))
        return join(padded.unflatten(-2, (self.counts[0], per_group)), dim=-2)


# Granularity → the scale groups of a weight (out, in), given the side of a block or the length of a group.
GRANULARITIES: Mapping[str, Callable[[int, int, int], ScaleGroups]] = {
    "tensor": lambda out, inner, size: ScaleGroups(out, inner, out, inner),
    "row": lambda out, inner, size: ScaleGroups(out, inner, 1, inner),
    "block": lambda out, inner, size: ScaleGroups(out, inner, size, size),
    "group": lambda out, inner, size: ScaleGroups(out, inner, 1, size),
}


class ScaleFormat(Protocol):
    """The numbers that a scale can be. Solvers work with effective scales: the product of all levels, float32.

    Attributes:
        continuous: every positive float32 is a scale; otherwise a group of small weights may get the scale 0, and all its
            quantized values are 0 then.
    """

    continuous: bool

    def ratios(self, floating: bool) -> tuple[float, ...]:
        """Multiples of the amax scale that a search tries, 1 first; ``floating``: steps of the elements grow with magnitude."""
        ...

    def from_amax(self, amax: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales that map each group's largest magnitude to the largest element, as round to nearest takes them.

        Args:
            amax: float32 (*counts).
            largest: largest magnitude of an element.

        Returns:
            effective scales, float32 (*counts), and the parent level (float32), None where there is one level only.
        """
        ...

    def snap(self, scale: torch.Tensor, parent: torch.Tensor | None) -> torch.Tensor:
        """The representable effective scales nearest to ``scale`` (float32) under ``parent``."""
        ...


def divide(values: torch.Tensor, number: float) -> torch.Tensor:
    """``values / number``, rounded once on every device: a GPU would multiply by the reciprocal of a plain number."""
    return values / torch.full_like(values, number)


class _Float32:
    """One float32 level. A group of zeros has the scale 1."""

    continuous = True

    def ratios(self, floating: bool) -> tuple[float, ...]:
        if floating:  # only the position within an octave matters
            return tuple(2.0 ** (step / 16) for step in range(16))
        return tuple(1.0 - step / 64 for step in range(24))

    def from_amax(self, amax: torch.Tensor, largest: float) -> tuple[torch.Tensor, None]:
        scale = divide(amax, largest).clamp_min(_SMALLEST)
        return torch.where(amax > 0, scale, torch.ones_like(amax)), None

    def snap(self, scale: torch.Tensor, parent: torch.Tensor | None) -> torch.Tensor:
        return scale.clamp_min(_SMALLEST)


@dataclass(frozen=True)
class CastFloat32(_Float32):
    """Float32 scales that ComfyUI casts to the dtype of the activations before it multiplies floating elements by them.

    A scale that is subnormal in float16 is raised by the power of two that makes it normal: a subnormal scale is imprecise,
    and one below 2⁻²⁵ is zero. Elements move by whole octaves, so weights keep their values but for those of elements that
    become subnormal.

    Attributes:
        smallest: smallest normal element.
    """

    smallest: float

    def from_amax(self, amax: torch.Tensor, largest: float) -> tuple[torch.Tensor, None]:
        scale, _ = super().from_amax(amax, largest)
        return _raise_scale(scale, -14, amax / scale / self.smallest), None


def _raise_scale(scale: torch.Tensor, exponent: int, span: torch.Tensor) -> torch.Tensor:
    """``scale`` times the smallest power of two that makes it at least 2^``exponent``.

    ``span``: ratio of the largest number that is multiplied by the scale and the smallest normal one, which limits the power.
    """
    limit = torch.frexp(span).exponent - 1 - _SPARE_OCTAVES
    return torch.ldexp(scale, (exponent + 1 - torch.frexp(scale).exponent).minimum(limit).clamp_min(0))


class _E8M0:
    """One level of powers of two (OCP MX v1.0, section 5.4.1), rounded up so that no value clamps.

    2^−127 is left out: ComfyUI's dequantization takes its code, 0, for the scale 0.
    """

    continuous = False

    def ratios(self, floating: bool) -> tuple[float, ...]:
        return 1.0, 0.5

    def from_amax(self, amax: torch.Tensor, largest: float) -> tuple[torch.Tensor, None]:
        needed = divide(amax, largest).clamp_min_(_SMALLEST)
        return torch.where(amax > 0, self._power(torch.log2(needed).ceil_()), torch.zeros_like(amax)), None

    def snap(self, scale: torch.Tensor, parent: torch.Tensor | None) -> torch.Tensor:
        return torch.where(scale > 0, self._power(torch.log2(scale.clamp_min(_SMALLEST)).round_()), scale)

    def _power(self, exponent: torch.Tensor) -> torch.Tensor:
        return torch.ldexp(torch.ones_like(exponent), exponent.clamp_(-126, 127))


@dataclass(frozen=True)
class _TwoLevelE4M3:
    """E4M3 scales of groups under one float32 scale of the tensor, chosen so that the largest group scale is 448.

    Other scales of the tensor, up to an octave larger, change the error of searched group scales by 0.2 % at most (measured).

    Attributes:
        cast: ComfyUI casts the scale of the tensor to the dtype of the activations. It is then raised as in
            :class:`CastFloat32`, to 2⁻¹⁶: nine bits in float16, more than the group scales have.
    """

    cast: bool = False

    continuous = False
    _LARGEST, _SMALLEST_NORMAL = 448.0, 2.0**-6  # of E4M3

    def ratios(self, floating: bool) -> tuple[float, ...]:
        # 1.5 maps a group's amax to 4 instead of 6 (four-over-six, arXiv 2512.02010); the others clip it.
        return 1.0, 1.5, *(1.0 - step / 16 for step in range(1, 7))

    def from_amax(self, amax: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
        parent = divide(amax.max(), self._LARGEST * largest)
        if self.cast:
            parent = _raise_scale(parent, -16, torch.full_like(parent, self._LARGEST / self._SMALLEST_NORMAL))
        parent = torch.where(parent > 0, parent, torch.ones_like(parent))
        return self.snap(divide(amax, largest), parent), parent

    def snap(self, scale: torch.Tensor, parent: torch.Tensor | None) -> torch.Tensor:
        assert parent is not None
        return parent * (scale / parent).clamp_max(self._LARGEST).to(torch.float8_e4m3fn).float()


FLOAT32, E8M0, TWO_LEVEL_E4M3, CAST_TWO_LEVEL_E4M3 = _Float32(), _E8M0(), _TwoLevelE4M3(), _TwoLevelE4M3(cast=True)
