"""Formats of ComfyUI that this project reads and does not write: a table of decoders.

Each does what ComfyUI does in float32; ``tests/nodes/test_foreign.py`` compares every bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import SourceError
from .rotation import Rotation

__all__ = ["FOREIGN", "ForeignFormat"]

Parts = Mapping[str, torch.Tensor]
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_TILE_ROWS, _TILE_COLUMNS = 128, 4  # of scales, as cuBLAS wants them


@dataclass(frozen=True)
class ForeignFormat:
    """One format.

    Attributes:
        parts: key suffixes of the tensors that a layer needs beside its weight.
        more: suffixes of tensors that it may have.
        packed: weights in one element along the rows of ``<layer>.weight``.
        decode: (codes as stored, parts by suffix, the layer's JSON) → float32 (out, in).
    """

    parts: tuple[str, ...]
    packed: int
    decode: Callable[[torch.Tensor, Parts, Mapping[str, object]], torch.Tensor]
    more: tuple[str, ...] = ()

    def shape(self, codes: tuple[int, ...], config: Mapping[str, object]) -> tuple[int, int]:
        """(out, in) of the weight. Raises SourceError unless the codes are a matrix that can hold it."""
        if len(codes) != 2:
            raise SourceError(f"codes of shape {codes} are no matrix")
        stored = codes[0], codes[1] * self.packed
        given = config.get("orig_shape", stored)
        if not (
            isinstance(given, (list, tuple))
            and [*map(type, given)] == [int, int]
            and all(0 < a <= b for a, b in zip(given, stored, strict=True))
        ):
            raise SourceError(f"its JSON gives the shape {given} to codes for {stored}")
        return tuple(given)


def _option(config: Mapping[str, object], key: str, default: int) -> int:
    """A number of a layer's JSON."""
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise SourceError(f"its JSON says {key}={value!r}")
    return value


def _nibbles(codes: torch.Tensor, high_first: bool = False) -> torch.Tensor:
    """(out, n) bytes → (out, 2n) numbers from 0 to 15, as int64 that can index."""
    values = codes.view(torch.uint8).long()
    halves = (values & 15, values >> 4)
    return torch.stack(halves[::-1] if high_first else halves, dim=-1).flatten(-2)


def _untiled(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Scales (rows, columns) out of cuBLAS's tiles: rows of a tile lie as 32 × 4 turned to 4 × 32. ``scales``: any shape, bytes."""
    high, wide = -(-rows // _TILE_ROWS), -(-columns // _TILE_COLUMNS)
    tiles = scales.view(torch.uint8).reshape(high, wide, _TILE_ROWS // 4, 4, _TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(high * _TILE_ROWS, wide * _TILE_COLUMNS)[:rows, :columns]


def _blocks(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Each of the equal parts of a row times its scale: (out, in) and (out, parts) → (out, in)."""
    return (values.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def _nvfp4(codes: torch.Tensor, parts: Parts, config: Mapping[str, object]) -> torch.Tensor:
    values = _E2M1.to(codes.device)[_nibbles(codes, high_first=True)]
    scale = (
        _untiled(parts["weight_scale"], values.shape[0], values.shape[1] // 16).contiguous().view(torch.float8_e4m3fn)
    )
    weight = _blocks(values, parts["weight_scale_2"].float() * scale.float())
    return weight * parts["pre_quant_scale"].float() if "pre_quant_scale" in parts else weight


def _mxfp8(codes: torch.Tensor, parts: Parts, config: Mapping[str, object]) -> torch.Tensor:
    exponents = _untiled(parts["weight_scale"], codes.shape[0], codes.shape[1] // 32)
    return _blocks(codes.float(), (exponents.int() << 23).view(torch.float32))


def _convrot_w4a4(codes: torch.Tensor, parts: Parts, config: Mapping[str, object]) -> torch.Tensor:
    values = _nibbles(codes)
    signed = torch.where(values < 8, values, values - 16).float()
    return Rotation(_option(config, "convrot_groupsize", 256)).apply(
        signed * parts["weight_scale"].float().reshape(-1, 1)
    )


def _asym_w4a8(codes: torch.Tensor, parts: Parts, config: Mapping[str, object]) -> torch.Tensor:
    values = _nibbles(codes)
    levels = parts["weight_codebook"].float()[values] if "weight_codebook" in parts else values.float() - 8
    scale = parts["weight_s_rel"]
    scale = (scale.view(torch.float8_e4m3fn) if scale.dtype is torch.uint8 else scale).float()
    if scale.shape[-1] * _option(config, "group_size", 16) != values.shape[-1]:
        raise SourceError(f"its JSON's group_size does not fit {scale.shape[-1]} scales for {values.shape[-1]} weights")
    eight_bits = _blocks(levels, scale).round().clamp(-127, 127)
    return Rotation(_option(config, "convrot_groupsize", 256)).apply(
        eight_bits * parts["weight_s_channel"].float().reshape(-1, 1)
    )


FOREIGN: Mapping[str, ForeignFormat] = {
    "nvfp4": ForeignFormat(("weight_scale", "weight_scale_2"), 2, _nvfp4, more=("pre_quant_scale", "input_scale")),
    "mxfp8": ForeignFormat(("weight_scale",), 1, _mxfp8, more=("input_scale",)),
    "convrot_w4a4": ForeignFormat(("weight_scale",), 2, _convrot_w4a4),
    "asym_w4a8_int8": ForeignFormat(("weight_s_rel", "weight_s_channel"), 2, _asym_w4a8, more=("weight_codebook",)),
}
