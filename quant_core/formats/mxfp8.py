"""MXFP8: E4M3 elements and an E8M0 scale per 32 columns (OCP Microscaling Formats v1.0)."""

from collections.abc import Mapping

import torch

from .codec import Codec, Format, Parts, TensorSpec
from .elements import E4M3
from .packing import pad_matrix, round_up, tile_scales, tiled_shape, untile_scales
from .padded import padded_config, padded_shape
from .scales import E8M0
from .solution import Solution

__all__ = ["FORMATS", "MXFP8Codec"]

_GROUP = 32
_PADDING = 32  # rows and columns of the stored weight are multiples of this
_SCALE_VIEWS = (torch.float8_e8m0fnu,) if hasattr(torch, "float8_e8m0fnu") else ()  # torch ≥ 2.7


class MXFP8Codec(Codec):
    """W = 2^(weight_scale − 127) · qdata; the code 0 is the scale 0.

    ``weight``: E4M3 (M, N), M and N padded to multiples of 32; ``weight_scale``: uint8 exponents in cuBLAS's tiles.
    """

    scales = E8M0

    def layer_config(self, shape: tuple[int, ...]) -> dict[str, object]:
        return self.config | padded_config(shape, _PADDING)

    def weight_shape(self, stored: tuple[int, ...], config: Mapping[str, object]) -> tuple[int, int]:
        return padded_shape(super().weight_shape(stored, config), config)

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        rows, columns = (round_up(side, _PADDING) for side in shape)
        tiles = tiled_shape(rows, columns // _GROUP)
        return {
            "weight": TensorSpec(self.format.storage_dtype, (rows, columns)),
            "weight_scale": TensorSpec(torch.uint8, tiles, views=_SCALE_VIEWS),
        }

    def optional(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {"input_scale": TensorSpec(torch.float32, ())}

    def scale_values(self, suffix: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if suffix != "weight_scale":
            return super().scale_values(suffix, tensor, shape)
        rows, columns = (round_up(side, _PADDING) for side in shape)
        return _group_scales(tensor, rows, columns // _GROUP)

    def store(self, solution: Solution) -> dict[str, torch.Tensor]:
        exponents = (solution.scale.view(torch.int32) >> 23).to(
            torch.uint8
        )  # those of float32 have the same bias of 127
        return {"weight": pad_matrix(solution.qdata, _PADDING), "weight_scale": tile_scales(exponents)}

    def dequantize(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        qdata = parts["weight"].float()
        scale = _group_scales(parts["weight_scale"], qdata.shape[0], qdata.shape[1] // _GROUP)
        return (qdata.unflatten(1, (-1, _GROUP)) * scale[..., None]).flatten(1)[: shape[0], : shape[1]]


def _group_scales(tiled: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The scales of groups, float32 (rows, groups), from their tiles; NaN, the exponent 255, becomes Inf."""
    return (untile_scales(tiled, rows, groups).int() << 23).view(torch.float32)


FORMATS = (
    Format(
        name="mxfp8",
        elements=E4M3,
        granularities={"group": {}},
        codec=MXFP8Codec,
        note="8-bit float in groups of 32 under powers of two; runs on tensor cores from SM 10.0, is dequantized on older cards",
        stock_since="0.18",
        activations="group",
        native_since=(10, 0),
        group_size=_GROUP,
        banks=True,
    ),
)
