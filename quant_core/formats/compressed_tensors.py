"""Packed weights of compressed-tensors: symmetric integers in int32 words, and FP4 with two levels of scales.

Source: compressed-tensors, compressors/pack_quantized and compressors/nvfp4.
"""

import math
from collections.abc import Mapping

import torch

from .codec import Parts
from .layer_json import LayerSource
from .nvfp4 import E2M1_VALUES
from .packing import unpack_nibbles

__all__ = ["decode_nvfp4", "decode_packed", "read_nvfp4_shape", "read_packed_shape"]

_WORD = 32  # bits
_BITS = (4, 8)  # of the packed integers that are read
_FP4_GROUP = 16


def read_packed_shape(source: LayerSource, names: Mapping[str, str]) -> tuple[int, int]:
    """(out, in) of a weight of packed integers, from its tensor ``weight_shape``. Raises ValueError where it does not fit."""
    infos = {key: source.tensors[name] for key, name in names.items()}
    if math.prod(infos["weight_shape"].shape) != 2 or infos["weight_shape"].dtype not in (torch.int64, torch.int32):
        raise ValueError("its weight_shape is not that of a matrix")
    rows, columns = (int(side) for side in source.read(names["weight_shape"]).flatten())
    _read_bits(infos["weight"], rows, columns)
    _check_groups(infos["weight_scale"].shape, rows, columns)
    return rows, columns


def decode_packed(parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight (out, in) as float32: the first value in the lowest bits, 2^(bits - 1) added, one scale per group of a row."""
    rows, columns = shape
    words = parts["weight"]
    bits = _read_bits(words, rows, columns)
    shifts = torch.arange(0, _WORD, bits, device=words.device, dtype=torch.int32)
    values = (words[..., None] >> shifts) & ((1 << bits) - 1)
    values = values.flatten(1)[:, :columns].float() - (1 << (bits - 1))
    scale = parts["weight_scale"].float()
    return (values.view(rows, scale.shape[1], -1) * scale[..., None]).flatten(1)


def read_nvfp4_shape(source: LayerSource, names: Mapping[str, str]) -> tuple[int, int]:
    """(out, in) of a weight of packed FP4. Raises ValueError where its tensors do not fit each other."""
    infos = {key: source.tensors[name] for key, name in names.items()}
    packed, scale = infos["weight"], infos["weight_scale"]
    if packed.dtype is not torch.uint8 or len(packed.shape) != 2 or math.prod(infos["weight_global_scale"].shape) != 1:
        raise ValueError("its tensors are not those of packed FP4 values")
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if tuple(scale.shape) != (rows, columns // _FP4_GROUP) or columns % _FP4_GROUP:
        raise ValueError(f"its scales have shape {tuple(scale.shape)}, and groups of 16 imply {(rows, columns // 16)}")
    return rows, columns


def decode_nvfp4(parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight (out, in) as float32: the even column in the low four bits; W = E2M1 · weight_scale / weight_global_scale."""
    codes = unpack_nibbles(parts["weight"], high_first=False)
    scale = parts["weight_scale"].float() / parts["weight_global_scale"].float().reshape(())
    values = E2M1_VALUES.to(codes.device)[codes.long()].unflatten(1, (-1, _FP4_GROUP))
    return (values * scale[..., None]).flatten(1)


def _read_bits(words, rows: int, columns: int) -> int:
    """Bits of a value: those with which a row of ``columns`` fills the words (anything with dtype and shape)."""
    if words.dtype is torch.int32 and rows > 0 and columns > 4:  # four columns fill one word with both
        for bits in _BITS:
            if tuple(words.shape) == (rows, -(-columns * bits // _WORD)):
                return bits
    raise ValueError(
        f"values {words.dtype} {tuple(words.shape)} are not a packed matrix {rows} × {columns} of 4 or 8 bits"
    )


def _check_groups(scale: tuple[int, ...], rows: int, columns: int) -> None:
    if len(scale) != 2 or scale[0] != rows or not scale[1] or columns % scale[1]:
        raise ValueError(f"its scales have shape {tuple(scale)}, and must be groups of the rows of {rows} × {columns}")
