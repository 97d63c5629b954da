"""NF4 and FP4 of bitsandbytes: two 4-bit indices a byte into a table of 16 numbers, and one largest magnitude per block.

W = quant_map[index] · absmax. Blocks run over the flattened weight. With double quantization the magnitudes are 8-bit indices
themselves: absmax = nested_quant_map[index] · nested_absmax + nested_offset. Block sizes, offset and shape are in a JSON tensor.
Source: bitsandbytes, functional.py, ``QuantState``.
"""

import math
from collections.abc import Mapping

import torch

from .codec import Parts, read_count
from .layer_json import LayerSource, parse_object

__all__ = ["decode", "read_shape"]

_MAX_JSON = 1 << 14  # bytes; a quantization state takes about two hundred
_TABLES = {"quant_map": 16, "nested_quant_map": 256}  # numbers in a table


def read_shape(source: LayerSource, names: Mapping[str, str]) -> tuple[int, int]:
    """(out, in) of the weight, from the JSON tensor. Raises ValueError, or SourceError for JSON that is damaged."""
    infos = {key: source.tensors[name] for key, name in names.items()}
    if infos["quant_state"].dtype is not torch.uint8 or infos["quant_state"].nbytes > _MAX_JSON:
        raise ValueError("its quant_state is not JSON")
    state = _read_state(source.read(names["quant_state"]), f"{source.name}: tensor {names['quant_state']}")
    shape = state.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(side) is int and side > 0 for side in shape)):
        raise ValueError(f"its shape is {shape!r:.60}, and must be that of a matrix")
    count = math.prod(shape)
    _check_count(infos["weight"], -(-count // 2), "weight")
    blocks = -(-count // read_count(state, "blocksize", 64))
    _check_count(infos["absmax"], blocks, "absmax")
    for key, size in _TABLES.items():
        if key in infos:
            _check_count(infos[key], size, key)
    if infos["weight"].dtype is not torch.uint8:
        raise ValueError(f"its values are {infos['weight'].dtype}, and must be torch.uint8")
    if infos["absmax"].dtype is torch.uint8:
        if not {"nested_absmax", "nested_quant_map"} <= infos.keys() or type(state.get("nested_offset")) not in (
            int,
            float,
        ):
            raise ValueError("the state of its quantized absmax is missing")
        _check_count(infos["nested_absmax"], -(-blocks // read_count(state, "nested_blocksize", 256)), "nested_absmax")
    return shape[0], shape[1]


def decode(parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight (out, in) as float32 from the tensors of a layer, whose sizes :func:`read_shape` has checked."""
    state = _read_state(parts["quant_state"], "quant_state")
    absmax = parts["absmax"].flatten()
    if absmax.dtype is torch.uint8:
        nested = _spread(parts["nested_absmax"].float(), read_count(state, "nested_blocksize", 256), absmax.numel())
        absmax = parts["nested_quant_map"].float().flatten()[absmax.int()] * nested + state["nested_offset"]
    codes, table = torch.arange(256, device=absmax.device), parts["quant_map"].float().flatten()
    pairs = torch.stack([table[codes >> 4], table[codes & 15]], dim=1)
    values = pairs[parts["weight"].flatten().int()].flatten()[: math.prod(shape)]
    return values.mul_(_spread(absmax.float(), read_count(state, "blocksize", 64), values.numel())).reshape(shape)


def _read_state(tensor: torch.Tensor, where: str) -> dict:
    return parse_object(tensor.cpu().numpy().tobytes(), where)


def _check_count(info, count: int, key: str) -> None:
    if math.prod(info.shape) != count:
        raise ValueError(f"its {key} has {math.prod(info.shape)} values, and its shape and block size imply {count}")


def _spread(values: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """The value of each of ``count`` elements in blocks of ``size``."""
    return values.flatten().repeat_interleave(min(size, count))[:count]
