"""What NVFP4 and MXFP8 share: scales in the tiles of cuBLAS, and comfy-kitchen's quantizers as the reference."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.tests.quant_core.formats.weights import MICROSCALED, raw

# A shape of whole tiles, one value, one group, and shapes with partial groups and tiles.
SHAPES = ((64, 128), (1, 1), (16, 16), (40, 72), (130, 264), (257, 33))
# Every weight in two shapes, and every shape.
CASES = [(make, SHAPES[(index + start) % 6]) for start in (0, 3) for index, make in enumerate(MICROSCALED)]


def find_scale(tiled: torch.Tensor, row: int, group: int) -> torch.Tensor:
    """The scale of a group in the block layout of cuBLAS."""
    tile = row // 128 * (tiled.shape[1] // 4) + group // 4
    return tiled.flatten()[tile * 512 + row % 32 * 16 + row // 32 % 4 * 4 + group % 4]


def layout(name: str):
    """Layout class of comfy-kitchen."""
    return getattr(pytest.importorskip("comfy_kitchen.tensor"), f"TensorCore{name}Layout")


def describe(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """{name: (shape, bytes)}"""
    return {name: (tuple(tensor.shape), raw(tensor).tolist()) for name, tensor in tensors.items()}


def tensors_of(weight: torch.Tensor, format: str) -> dict[str, torch.Tensor]:
    """The tensors of a layer rounded to nearest, without its JSON."""
    made = quantize_weight(weight, format, rounding="nearest").tensors("a")
    made.pop("a.comfy_quant")
    return made


def tensors_of_kitchen(weight: torch.Tensor, name: str, **given) -> dict[str, torch.Tensor]:
    kitchen = layout(name)
    return {f"a.weight{key}": t for key, t in kitchen.state_dict_tensors(*kitchen.quantize(weight, **given)).items()}


def dequantize_in_kitchen(values: torch.Tensor, name: str) -> torch.Tensor:
    """Values after comfy-kitchen's round to nearest, without padding."""
    kitchen = layout(name)
    return kitchen.dequantize(*kitchen.quantize(values))[: values.shape[0], : values.shape[1]]
