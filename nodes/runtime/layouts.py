"""Layouts of this pack's own formats for comfy-kitchen's ``QuantizedTensor``, the weight of ComfyUI's quantized layers.

Products of activations and a whole weight run on the kernels of :mod:`..kernels`, which quantize the activations. Every
other operation runs on the dequantized weight, as in comfy-kitchen's own layouts.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    dequantize_args,
    register_layout_class,
    register_layout_op,
)

from ... import kernels
from ...quant_core.formats import Codec, make_codec
from ...quant_core.rounding import round_stochastic

__all__ = ["LAYOUTS", "QuantizedTensor"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Params(BaseLayoutParams):
    """Parameters of the quantized values of a weight (out, in).

    Attributes:
        scale: float32; (out, 1) per row, (⌈out/bs⌉, ⌈in/bs⌉) per block.
        orig_dtype: dtype of the dequantized tensor.
        orig_shape: shape of the dequantized tensor; (in, out) when transposed.
        block_size: side of a block; None per row.
        transposed: whether the tensor is the transpose of the weight that is stored.
    """

    block_size: int | None = None
    transposed: bool = False

    @property
    def options(self) -> dict[str, int]:
        """The kernels' keyword arguments: the block size, or none."""
        return {} if self.block_size is None else {"block_size": self.block_size}


class _ScaledLayout(QuantizedLayout):
    """8-bit quantized values with one float32 scale per row or square block.

    Attributes:
        format: key of :data:`FORMATS`.
        linear: (activations, qdata, scale, bias, [block_size]) → outputs in the activations' dtype.
        encode: (weight, [block_size]) → qdata and scale, round to nearest.
    """

    Params = _Params
    format: str
    linear: Callable[..., torch.Tensor]
    encode: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def codec(cls, block_size: int | None) -> Codec:
        """The codec with that block size; None for 128 or for a format without blocks."""
        return make_codec(cls.format, block_size=block_size)

    @classmethod
    def quantize(cls, tensor, scale=None, stochastic_rounding=0, inplace_ops=False, block_size=None):
        """Quantized values and parameters of a weight (out, in) of any float dtype, scaled by the largest magnitude.

        Args:
            scale: None or "recalculate"; both mean the largest magnitude.
            stochastic_rounding: seed of stochastic rounding; 0 and None round to nearest.
            inplace_ops: ignored; it permits overwriting the weight.
            block_size: side of a block; None for 128.

        Raises:
            ValueError: the weight is not a matrix, or the scale is a value.
            RecipeError: the format does not have that block size.
        """
        if tensor.dim() != 2:
            raise ValueError(
                f"{cls.format} stores matrices only, not a tensor of shape {tuple(tensor.shape)}; keep it unquantized."
            )
        if scale not in (None, "recalculate"):
            raise ValueError(f"{cls.format} derives its scales from the weight; leave scale out.")
        codec = cls.codec(block_size)
        shape = (tensor.shape[0], tensor.shape[1])
        params = _Params(torch.empty(0), tensor.dtype, shape, codec.block_size)
        qdata, scale = cls.encode(tensor, **params.options)
        if stochastic_rounding:
            qdata = round_stochastic(tensor, scale, codec.solve_space(shape), seed=stochastic_rounding)
        return qdata, dataclasses.replace(params, scale=scale)

    @classmethod
    def dequantize(cls, qdata, params):
        """The dequantized weight (out, in) in ``params.orig_dtype``."""
        return kernels.dequantize_weight(qdata, params.scale, **params.options, dtype=params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        """Quantized values and scale."""
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        """Tensors of a file by the suffix that their names add to the weight's."""
        return {"": qdata, "_scale": params.scale}

    @classmethod
    def requantize_kwargs(cls, qtensor):
        """Arguments of :meth:`quantize` by which a patched weight is quantized again."""
        return qtensor._params.options


class LearnedRoundingInt8Blockwise(_ScaledLayout):
    format = "int8_blockwise"
    linear = staticmethod(kernels.int8_block_linear)
    encode = staticmethod(kernels.quantize_int8_block_weight)


class LearnedRoundingFloat8Blockwise(_ScaledLayout):
    format = "float8_e4m3fn_blockwise"
    linear = staticmethod(kernels.fp8_block_linear)
    encode = staticmethod(kernels.quantize_fp8_block_weight)


class LearnedRoundingFloat8Rowwise(_ScaledLayout):
    format = "float8_e4m3fn_rowwise"
    linear = staticmethod(kernels.fp8_row_linear)
    encode = staticmethod(kernels.quantize_fp8_row_weight)


# Format → its layout; comfy-kitchen registers a layout under the name of its class.
LAYOUTS = {
    layout.format: layout
    for layout in (LearnedRoundingInt8Blockwise, LearnedRoundingFloat8Blockwise, LearnedRoundingFloat8Rowwise)
}
for _layout in LAYOUTS.values():
    register_layout_class(_layout.__name__, _layout)


def _is_weight(value, transposed: bool) -> bool:
    """Whether ``value`` is a quantized weight (out, in) of these layouts, or the transpose of one."""
    return (
        isinstance(value, QuantizedTensor)
        and issubclass(value.layout_cls, _ScaledLayout)
        and value._params.transposed is transposed
    )


def _multiply(activations, weight, bias=None):
    """activations · weightᵀ + bias; ``weight`` stores (out, in), transposed or not."""
    layout, params = weight.layout_cls, weight._params
    return layout.linear(dequantize_args(activations), weight._qdata, params.scale, bias, **params.options)


# Under inference_mode torch dispatches aten.linear, otherwise its parts: t, then mm or addmm.
@register_layout_op(aten.linear.default, _ScaledLayout)
def _linear(_, args, kwargs):
    if _is_weight(args[1], transposed=False):
        return _multiply(*args)
    return aten.linear.default(*dequantize_args(args), **kwargs)


@register_layout_op(aten.mm.default, _ScaledLayout)
def _mm(_, args, kwargs):
    if _is_weight(args[1], transposed=True):
        return _multiply(*args)
    return aten.mm.default(*dequantize_args(args), **kwargs)


@register_layout_op(aten.addmm.default, _ScaledLayout)
def _addmm(_, args, kwargs):
    bias, activations, weight = args
    if _is_weight(weight, transposed=True) and bias.dim() == 1 and not kwargs:  # beta and alpha would be in kwargs
        return _multiply(activations, weight, bias)
    return aten.addmm.default(*dequantize_args(args), **kwargs)


@register_layout_op(aten.t.default, _ScaledLayout)
def _t(weight, args, kwargs):
    params = weight._params
    transposed = dataclasses.replace(params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed)
    return QuantizedTensor(weight._qdata, weight._layout_cls, transposed)


def _make_view(op):
    """The handler of ``op``: a view of the same shape stays quantized."""

    def view(weight, args, kwargs):
        size = args[1]
        if tuple(n if n >= 0 else weight.numel() // -math.prod(size) for n in size) == tuple(weight.shape):
            return QuantizedTensor(weight._qdata, weight._layout_cls, weight._params)
        return op(weight.dequantize(), size)

    return view


for _op in (aten.view.default, aten.reshape.default):
    register_layout_op(_op, _ScaledLayout)(_make_view(_op))
