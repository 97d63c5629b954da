"""ComfyUI's native INT8 and W4A8 layers on this pack's kernels.

A linear layer reaches comfy-kitchen in two ways. ``F.linear`` with a quantized weight calls the handlers of its layout, which
are replaced here; ComfyUI's fused activations and compiled graphs call an operation, which the first of comfy-kitchen's
backends computes, and ours becomes the first. Both end in :func:`int8_linear` or :func:`w4a8_int8_linear`, which choose an
implementation once per shape. In the mode auto it is the fastest one, measured with the time of the host included.
"""

import functools
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, NamedTuple

import comfy.ops
import comfy.quant_ops
import torch

from ... import kernels
from ...kernels import tuning
from ...kernels.checks import can_rotate
from ...kernels.prepared import KeptFunctions

__all__ = ["AUTO", "NATIVE_INT8_MODES", "NATIVE_LAYERS", "OFF", "ON", "is_off", "kitchen_registry", "set_mode"]

AUTO, ON, OFF = NATIVE_INT8_MODES = ("auto", "on", "off")
_NAME = "learned_rounding"  # of our backend
# What our kernels support: dtypes of activations, devices.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DEVICES = ("cuda",)

_mode = OFF  # the mode in effect
# Mode, shape and options → the implementation that computes the layer.
_kept = KeptFunctions()


def int8_linear(
    x, weight, weight_scale, bias=None, out_dtype=torch.bfloat16, convrot=False, convrot_groupsize=256, input_act=None
):
    """comfy-kitchen's operation of that name: activations (…, K) times an INT8 weight (N, K).

    ``input_act``: name of an activation function that is applied to x first.
    """
    rotate_by = convrot_groupsize if convrot else 0
    key = (
        _mode, x.shape, x.dtype, x.device, weight.shape, weight_scale.dtype, weight_scale.numel(),
        bias if bias is None else bias.dtype, out_dtype, rotate_by, input_act,
    )  # fmt: skip
    arguments = {
        "x": x, "weight": weight, "weight_scale": weight_scale, "bias": bias, "out_dtype": out_dtype,
        "convrot": convrot, "convrot_groupsize": convrot_groupsize,
    }  # fmt: skip
    if input_act is not None:  # earlier releases of comfy-kitchen do not have it
        arguments["input_act"] = input_act
    run = _kept.get(key)
    if run is None:
        run = _choose("int8_linear", _run_int8, key, weight, can_rotate(weight.shape[1], rotate_by), arguments)
    return run(**arguments)


def _run_int8(x, weight, weight_scale, bias, out_dtype, convrot, convrot_groupsize, input_act=None) -> torch.Tensor:
    if input_act not in (None, "none"):
        x = comfy.ops.INPUT_ACT_EAGER[input_act](x)
    rotate_by = convrot_groupsize if convrot else 0
    return kernels.scaled_linear(x, weight, weight_scale, bias, rotate_by=rotate_by, out_dtype=out_dtype)


def w4a8_int8_linear(
    x, qdata, s_rel, s_channel, codebook=None, correction=None, bias=None, group_size=16, convrot_groupsize=256,
    out_dtype=torch.bfloat16,
):  # fmt: skip
    """comfy-kitchen's operation of that name: activations (…, K) times a W4A8 weight, qdata (N, K/2).

    comfy-kitchen has no operator of torch for it, so tracers come here; they get ours where it supports the layer.
    """
    arguments = {
        "x": x, "qdata": qdata, "s_rel": s_rel, "s_channel": s_channel, "codebook": codebook, "correction": correction,
        "bias": bias, "group_size": group_size, "convrot_groupsize": convrot_groupsize, "out_dtype": out_dtype,
    }  # fmt: skip
    inner = x.shape[-1]
    if type(x) is not torch.Tensor or torch.compiler.is_compiling():
        is_ours = _is_w4a8(inner, qdata, s_rel, correction, group_size, convrot_groupsize)
        return (_run_w4a8 if is_ours else _stock_implementation("w4a8_int8_linear", arguments))(**arguments)
    key = (
        _mode, x.shape, x.dtype, x.device, qdata.shape, s_rel.dtype, s_rel.shape, codebook is None, correction is None,
        bias if bias is None else bias.dtype, out_dtype, group_size, convrot_groupsize,
    )  # fmt: skip
    run = _kept.get(key)
    if run is None:
        is_ours = _is_w4a8(inner, qdata, s_rel, correction, group_size, convrot_groupsize)
        run = _choose("w4a8_int8_linear", _run_w4a8, key, qdata, is_ours, arguments)
    return run(**arguments)


def _is_w4a8(inner: int, qdata, s_rel, correction, group_size: int, convrot_groupsize: int) -> bool:
    """Whether our kernels support the layer: four bits, symmetric, a rotation that they have."""
    return (
        correction is None
        and 2 * qdata.shape[1] == s_rel.shape[1] * group_size == inner
        and can_rotate(inner, convrot_groupsize)
    )


def _run_w4a8(
    x, qdata, s_rel, s_channel, codebook, correction, bias, group_size, convrot_groupsize, out_dtype
) -> torch.Tensor:
    return kernels.w4a8_linear(
        x, qdata, s_rel, s_channel, codebook, bias, rotate_by=convrot_groupsize, out_dtype=out_dtype
    )


def _choose(
    operation: str, ours: Callable, key: tuple, weight: torch.Tensor, can_run: bool, arguments: dict
) -> Callable[..., torch.Tensor]:
    """Choose the implementation for a key of ``_kept``, and keep it; it is measured in the mode auto.

    ``can_run``: whether our kernels support the layer.
    """
    x = arguments["x"]
    if not can_run:
        run = _stock_implementation(operation, arguments)
    elif _mode == ON:
        run = ours
    else:
        runs = {"stock": _stock_implementation(operation, arguments), "ours": ours}
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return runs["stock"]  # nothing is measured during a capture
        tokens = x.reshape(-1, x.shape[-1])
        kind = f"native {operation.removesuffix('_linear')}, {_stock_version()}, {kernels.backend()}"
        name = tuning.shape_key(kind, tokens, weight, *key[5:])
        run = runs[tuning.fastest(name, list(runs), lambda name: runs[name](**arguments))]
    _kept.keep(key, run)
    return run


def _stock_implementation(operation: str, arguments: dict) -> Callable[..., torch.Tensor]:
    """The function of comfy-kitchen's first backend other than ours that accepts the arguments."""
    registry = kitchen_registry()
    for name in registry._priority:
        if name != _NAME and registry.validate_backend_for_call(name, operation, arguments).success:
            return registry.get_implementation(operation, backend=name)
    raise RuntimeError(f"No backend of comfy-kitchen accepts these arguments of {operation}.")


@functools.cache
def _stock_version() -> str:
    """comfy-kitchen's version and enabled backends, on which the stock implementation depends."""
    registry = kitchen_registry()
    enabled = [name for name in registry._priority if name != _NAME and registry.is_available(name)]
    return f"comfy-kitchen {version('comfy-kitchen')} {'+'.join(enabled)}"


def _multiply_int8(x, weight, bias=None) -> torch.Tensor:
    params, qdata = weight._params, weight._qdata
    rotation = params.convrot, params.convrot_groupsize
    return int8_linear(x.contiguous(), qdata.contiguous(), params.scale, bias, x.dtype, *rotation)


def _multiply_w4a8(x, weight, bias=None) -> torch.Tensor:
    params, qdata = weight._params, weight._qdata
    return w4a8_int8_linear(
        x.contiguous(), qdata.contiguous(), params.scale, params.s_channel, params.codebook, params.correction, bias,
        params.group_size, params.convrot_groupsize, x.dtype,
    )  # fmt: skip


class NativeLayer(NamedTuple):
    """One of ComfyUI's quantized linear layers.

    Attributes:
        format: key of ``QUANT_ALGOS``.
        operation: comfy-kitchen's, which our function of the same name replaces.
        compute: that function.
        multiply: (activations, quantized weight (out, in), bias) → outputs, without comfy-kitchen's operator and registry.
    """

    format: str
    operation: str
    compute: Callable[..., torch.Tensor]
    multiply: Callable[..., torch.Tensor]


# Name of comfy-kitchen's layout → the layer.
NATIVE_LAYERS = {
    "TensorWiseINT8Layout": NativeLayer("int8_tensorwise", "int8_linear", int8_linear, _multiply_int8),
    "AsymW4A8Int8Layout": NativeLayer("asym_w4a8_int8", "w4a8_int8_linear", w4a8_int8_linear, _multiply_w4a8),
}


def _accepts(x, weight, layout: str, transposed: bool) -> bool:
    """Whether the mode and a handler's arguments permit our kernels; tracers get comfy-kitchen's operator."""
    return (
        _mode != OFF
        and type(x) is torch.Tensor
        and x.device.type in _DEVICES
        and x.dtype in _DTYPES
        and getattr(weight, "_layout_cls", None) == layout
        and getattr(weight._params, "transposed", False) is transposed
        and not torch.compiler.is_compiling()
    )


def _handle_linear(layout: str, stock, qt, args, kwargs):
    x, weight, *bias = args
    if kwargs or not _accepts(x, weight, layout, False):
        return stock(qt, args, kwargs)
    return NATIVE_LAYERS[layout].multiply(x, weight, *bias)


def _handle_mm(layout: str, stock, qt, args, kwargs):
    x, weight = args
    if kwargs or not _accepts(x, weight, layout, True):
        return stock(qt, args, kwargs)
    return NATIVE_LAYERS[layout].multiply(x, weight)


def _handle_addmm(layout: str, stock, qt, args, kwargs):
    bias, x, weight = args
    if kwargs or bias.dim() != 1 or not _accepts(x, weight, layout, True):
        return stock(qt, args, kwargs)
    return NATIVE_LAYERS[layout].multiply(x, weight, bias)


# Under inference_mode torch dispatches aten.linear, otherwise its parts: t, then mm or addmm.
_HANDLERS = {
    torch.ops.aten.linear.default: _handle_linear,
    torch.ops.aten.mm.default: _handle_mm,
    torch.ops.aten.addmm.default: _handle_addmm,
}


@functools.cache
def kitchen_registry() -> Any:
    """comfy-kitchen's registry with our handlers and our disabled backend; None where ComfyUI has no native INT8 layers."""
    algorithms = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
    native = {layout: layer for layout, layer in NATIVE_LAYERS.items() if layer.format in algorithms}
    if not native:
        return None
    try:
        from comfy_kitchen.constraints import FunctionConstraints, ParamConstraint
        from comfy_kitchen.registry import registry
        from comfy_kitchen.tensor import base, get_layout_class, register_layout_op

        stock = {
            (name, op): base._LAYOUT_DISPATCH_TABLE[op][get_layout_class(name)] for name in native for op in _HANDLERS
        }
        order = [_NAME, *(name for name in registry._priority if name != _NAME)]
    except (ImportError, AttributeError, KeyError):
        return None
    for (name, op), handler in stock.items():
        register_layout_op(op, get_layout_class(name))(functools.partial(_HANDLERS[op], name, handler))
    needs = FunctionConstraints(
        params={"x": ParamConstraint(dtypes=frozenset(_DTYPES))},
        default_devices=frozenset(_DEVICES),
        min_compute_capability=(8, 0),
    )
    functions = {layer.operation: layer.compute for layer in native.values()}
    registry.register(_NAME, SimpleNamespace(**functions), dict.fromkeys(functions, needs))
    registry.disable(_NAME)
    registry.set_priority(order)
    return registry


def is_off() -> bool:
    """Whether ComfyUI's own code runs all layers at the moment."""
    return _mode == OFF


def set_mode(mode: str) -> None:
    """Put a mode of NATIVE_INT8_MODES into effect, if this ComfyUI has native INT8 layers."""
    global _mode
    registry = kitchen_registry()
    if registry is not None:
        _mode = mode
        (registry.disable if mode == OFF else registry.enable)(_NAME)
