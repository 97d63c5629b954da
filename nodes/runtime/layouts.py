"""Layouts of this pack's own formats on comfy-kitchen's quantized tensor, which ComfyUI's quantized layers hold.

A layout multiplies by the kernels of :mod:`..kernels`, which quantize the inputs on the way. Whatever is no product of
inputs and a whole weight happens on the decoded weight, as it does in comfy-kitchen's own layouts.
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
    """What belongs to the codes of a weight (out, in).

    Attributes:
        scale: float32; (out, 1) per row, (⌈out/bs⌉, ⌈in/bs⌉) per block.
        orig_dtype: dtype that the tensor stands for.
        orig_shape: its shape; (in, out) when transposed.
        block_size: side of a block; None per row.
        transposed: the tensor stands for the transpose of what its codes mean.
    """

    block_size: int | None = None
    transposed: bool = False

    @property
    def options(self) -> dict[str, int]:
        """The block size where there is one, as kernels take it."""
        return {} if self.block_size is None else {"block_size": self.block_size}


class _ScaledLayout(QuantizedLayout):
    """8-bit codes with one float32 scale per row or square block.

    Attributes:
        format: entry of :data:`FORMATS`.
        linear: (inputs, codes, scale, bias, [block_size]) → outputs in the inputs' dtype.
        encode: (weight, [block_size]) → codes and scale, to nearest.
    """

    Params = _Params
    format: str
    linear: Callable[..., torch.Tensor]
    encode: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def codec(cls, block_size: int | None) -> Codec:
        """The format with that block size; None for 128, and for what has no blocks."""
        return make_codec(cls.format, block_size=block_size)

    @classmethod
    def quantize(cls, tensor, scale=None, stochastic_rounding=0, inplace_ops=False, block_size=None):
        """Codes and parameters of a weight (out, in) of any float dtype; a scale follows from the largest magnitude.

        ``scale``: None or "recalculate", ComfyUI's words for that. ``stochastic_rounding``: a seed; 0 and None round to
        nearest. ``inplace_ops``: the weight may be overwritten, which brings nothing here. ``block_size``: None for 128.

        Raises:
            ValueError: a weight that is no matrix, or a scale of the caller's own.
            RecipeError: a block size that the format does not have.
        """
        if tensor.dim() != 2:
            raise ValueError(
                f"{cls.format} holds matrices only, not a tensor of shape {tuple(tensor.shape)}; leave it as it is."
            )
        if scale not in (None, "recalculate"):
            raise ValueError(f"{cls.format} derives its scales from the weight; leave scale out.")
        codec = cls.codec(block_size)
        params = _Params(torch.empty(0), tensor.dtype, tuple(tensor.shape), codec.block_size)
        codes, scale = cls.encode(tensor, **params.options)
        if stochastic_rounding:
            codes = round_stochastic(tensor, scale, codec.solve_space(params.orig_shape), seed=stochastic_rounding)
        return codes, dataclasses.replace(params, scale=scale)

    @classmethod
    def dequantize(cls, qdata, params):
        """The weight (out, in) that the codes mean, in the dtype the tensor stands for."""
        return kernels.dequantize_weight(qdata, params.scale, **params.options, dtype=params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        """Codes and scale."""
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        """What stands in a file, by what its name adds to the weight's."""
        return {"": qdata, "_scale": params.scale}

    @classmethod
    def requantize_kwargs(cls, qtensor):
        """Options of :meth:`quantize` that a patched weight keeps."""
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


# Format → its layout, which comfy-kitchen knows under the name of its class.
LAYOUTS = {
    layout.format: layout
    for layout in (LearnedRoundingInt8Blockwise, LearnedRoundingFloat8Blockwise, LearnedRoundingFloat8Rowwise)
}
for _layout in LAYOUTS.values():
    register_layout_class(_layout.__name__, _layout)


def _is_weight(value, transposed: bool) -> bool:
    """A quantized tensor of these layouts that stands for a weight (out, in), or for the transpose of one."""
    ours = isinstance(value, QuantizedTensor) and issubclass(value.layout_cls, _ScaledLayout)
    return ours and value._params.transposed is transposed


def _multiplied(inputs, weight, bias=None):
    """inputs · weightᵀ + bias; ``weight`` holds the codes of (out, in), transposed or not."""
    layout, params = weight.layout_cls, weight._params
    return layout.linear(dequantize_args(inputs), weight._qdata, params.scale, bias, **params.options)


# Under inference_mode torch hands over aten.linear, elsewhere its parts: t, then mm or addmm.
@register_layout_op(aten.linear.default, _ScaledLayout)
def _linear(_, args, kwargs):
    if _is_weight(args[1], transposed=False):
        return _multiplied(*args)
    return aten.linear.default(*dequantize_args(args), **kwargs)


@register_layout_op(aten.mm.default, _ScaledLayout)
def _mm(_, args, kwargs):
    if _is_weight(args[1], transposed=True):
        return _multiplied(*args)
    return aten.mm.default(*dequantize_args(args), **kwargs)


@register_layout_op(aten.addmm.default, _ScaledLayout)
def _addmm(_, args, kwargs):
    bias, inputs, weight = args
    if _is_weight(weight, transposed=True) and bias.dim() == 1 and not kwargs:  # beta and alpha would be in kwargs
        return _multiplied(inputs, weight, bias)
    return aten.addmm.default(*dequantize_args(args), **kwargs)


@register_layout_op(aten.t.default, _ScaledLayout)
def _t(weight, args, kwargs):
    params = weight._params
    turned = dataclasses.replace(params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed)
    return QuantizedTensor(weight._qdata, weight._layout_cls, turned)


def _shaped(op):
    def view(weight, args, kwargs):
        size = args[1]
        if tuple(n if n >= 0 else weight.numel() // -math.prod(size) for n in size) == tuple(weight.shape):
            return QuantizedTensor(weight._qdata, weight._layout_cls, weight._params)
        return op(weight.dequantize(), size)

    return view


for _op in (aten.view.default, aten.reshape.default):
    register_layout_op(_op, _ScaledLayout)(_shaped(_op))
