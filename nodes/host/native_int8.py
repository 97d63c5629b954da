"""ComfyUI's native INT8 layers on this pack's kernels: off, on, or auto.

A linear layer reaches comfy-kitchen in two ways. ``F.linear`` with a quantized weight calls the handlers of its layout, which
are replaced here; ComfyUI's fused activations and compiled graphs call the operation ``int8_linear``, which the first of
comfy-kitchen's backends computes, and ours becomes the first. Both end in :func:`int8_linear`, which chooses an
implementation once per shape. In the mode auto it is the fastest one, measured with the time of the host included.
"""

import functools
import json
import logging
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.ops
import comfy.quant_ops
import folder_paths
import torch

from ... import kernels
from ...kernels import devices, tuning
from ...kernels.checks import can_rotate
from ...kernels.prepared import KeptFunctions
from ...quant_core.errors import QuantizationError
from .running import add_value_route

__all__ = [
    "LAYOUT",
    "NATIVE_INT8_MODES",
    "add_native_int8_setting",
    "is_native_int8_off",
    "native_int8_mode",
    "run_native_int8",
    "use_native_int8",
]

log = logging.getLogger(__name__)

LAYOUT = "TensorWiseINT8Layout"
_NAME, _OPERATION = "learned_rounding", "int8_linear"
SETTING = "LearnedRounding.NativeInt8"  # also in web/, and in ComfyUI's settings file
ROUTE = "/learned_rounding/native_int8"
AUTO, ON, OFF = NATIVE_INT8_MODES = ("auto", "on", "off")
_BOOLEANS = {True: ON, False: AUTO}  # values of version 0.1.0, in workflows and in the settings file
# What our kernels support: dtypes of activations, devices.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DEVICES = ("cuda",)

_setting = OFF  # mode of all models
# Modes of the running models whose node sets one, the latest last: with several GPUs, threads run a model in parallel.
_model_modes: dict[object, str] = {}
_mode = OFF  # the mode in effect
# Mode, shape and options → the implementation that computes the layer.
_kept = KeptFunctions()


def native_int8_mode(value: object) -> str:
    """The mode of a widget's or setting's value. Raises QuantizationError where it is none."""
    mode = _BOOLEANS.get(value, value) if isinstance(value, bool) else value
    if mode not in NATIVE_INT8_MODES:
        raise QuantizationError(f"native_int8_kernels is {value!r}; choose one of {', '.join(NATIVE_INT8_MODES)}.")
    return mode


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
        run = _choose(key, rotate_by, arguments)
    return run(**arguments)


def _run_ours(x, weight, weight_scale, bias, out_dtype, convrot, convrot_groupsize, input_act=None) -> torch.Tensor:
    if input_act not in (None, "none"):
        x = comfy.ops.INPUT_ACT_EAGER[input_act](x)
    rotate_by = convrot_groupsize if convrot else 0
    return kernels.scaled_linear(x, weight, weight_scale, bias, rotate_by=rotate_by, out_dtype=out_dtype)


def _choose(key: tuple, rotate_by: int, arguments: dict) -> Callable[..., torch.Tensor]:
    """Choose the implementation for a key of ``_kept``, and keep it; it is measured in the mode auto."""
    x, weight = arguments["x"], arguments["weight"]
    if not can_rotate(weight.shape[1], rotate_by):
        run = _stock_implementation(arguments)
    elif _mode == ON:
        run = _run_ours
    else:
        runs = {"stock": _stock_implementation(arguments), "ours": _run_ours}
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return runs["stock"]  # nothing is measured during a capture
        tokens = x.reshape(-1, x.shape[-1])
        kind = f"native int8, {_stock_version()}, {kernels.backend()}"
        name = tuning.shape_key(kind, tokens, weight, *key[5:])
        run = runs[tuning.fastest(name, list(runs), lambda name: runs[name](**arguments))]
    _kept.keep(key, run)
    return run


def _stock_implementation(arguments: dict) -> Callable[..., torch.Tensor]:
    """The function of comfy-kitchen's first backend other than ours that accepts the arguments."""
    registry = _registry()
    for name in registry._priority:
        if name != _NAME and registry.validate_backend_for_call(name, _OPERATION, arguments).success:
            return registry.get_implementation(_OPERATION, backend=name)
    raise RuntimeError(f"No backend of comfy-kitchen accepts these arguments of {_OPERATION}.")


@functools.cache
def _stock_version() -> str:
    """comfy-kitchen's version and enabled backends, on which the stock implementation depends."""
    registry = _registry()
    enabled = [name for name in registry._priority if name != _NAME and registry.is_available(name)]
    return f"comfy-kitchen {version('comfy-kitchen')} {'+'.join(enabled)}"


def _accepts(x, weight, transposed: bool) -> bool:
    """Whether the mode and a handler's arguments permit our kernels; tracers get comfy-kitchen's operator."""
    return (
        _mode != OFF
        and type(x) is torch.Tensor
        and x.device.type in _DEVICES
        and x.dtype in _DTYPES
        and getattr(weight, "_layout_cls", None) == LAYOUT
        and getattr(weight._params, "transposed", False) is transposed
        and not torch.compiler.is_compiling()
    )


def is_native_int8_off() -> bool:
    """Whether ComfyUI's own code runs all layers at the moment."""
    return _mode == OFF


def run_native_int8(x, weight, bias=None) -> torch.Tensor:
    """Product of activations and a quantized weight (out, in), without comfy-kitchen's operator and registry."""
    params, qdata = weight._params, weight._qdata
    rotation = params.convrot, params.convrot_groupsize
    return int8_linear(x.contiguous(), qdata.contiguous(), params.scale, bias, x.dtype, *rotation)


def _handle_linear(stock, qt, args, kwargs):
    x, weight, *bias = args
    return stock(qt, args, kwargs) if kwargs or not _accepts(x, weight, False) else run_native_int8(x, weight, *bias)


def _handle_mm(stock, qt, args, kwargs):
    x, weight = args
    return stock(qt, args, kwargs) if kwargs or not _accepts(x, weight, True) else run_native_int8(x, weight)


def _handle_addmm(stock, qt, args, kwargs):
    bias, x, weight = args
    if kwargs or bias.dim() != 1 or not _accepts(x, weight, True):
        return stock(qt, args, kwargs)
    return run_native_int8(x, weight, bias)


# Under inference_mode torch dispatches aten.linear, otherwise its parts: t, then mm or addmm.
_HANDLERS = {
    torch.ops.aten.linear.default: _handle_linear,
    torch.ops.aten.mm.default: _handle_mm,
    torch.ops.aten.addmm.default: _handle_addmm,
}


@functools.cache
def _registry() -> Any:
    """comfy-kitchen's registry with our handlers and our disabled backend; None where ComfyUI has no native INT8 layers."""
    if "int8_tensorwise" not in getattr(comfy.quant_ops, "QUANT_ALGOS", {}):
        return None
    try:
        from comfy_kitchen.constraints import FunctionConstraints, ParamConstraint
        from comfy_kitchen.registry import registry
        from comfy_kitchen.tensor import base, get_layout_class, register_layout_op

        layout = get_layout_class(LAYOUT)
        stock = {op: base._LAYOUT_DISPATCH_TABLE[op][layout] for op in _HANDLERS}
        order = [_NAME, *(name for name in registry._priority if name != _NAME)]
    except (ImportError, AttributeError, KeyError):
        return None
    for op, handler in _HANDLERS.items():
        register_layout_op(op, layout)(functools.partial(handler, stock[op]))
    needs = FunctionConstraints(
        params={"x": ParamConstraint(dtypes=frozenset(_DTYPES))},
        default_devices=frozenset(_DEVICES),
        min_compute_capability=(8, 0),
    )
    registry.register(_NAME, SimpleNamespace(int8_linear=int8_linear), {_OPERATION: needs})
    registry.disable(_NAME)
    registry.set_priority(order)
    return registry


def _can_run() -> bool:
    """Whether our kernels support the GPU."""
    return (
        torch.cuda.is_available()
        and devices.is_nvidia()
        and devices.compute_capability(torch.device("cuda", torch.cuda.current_device())) >= (8, 0)
    )


def _apply_mode() -> None:
    """Put the mode of the running model, or else the setting, into effect; off where our kernels cannot run."""
    global _mode
    registry = _registry()
    if registry is not None:
        _mode = next(reversed(_model_modes.values()), _setting) if _can_run() else OFF
        (registry.disable if _mode == OFF else registry.enable)(_NAME)


def _set_setting(mode: str) -> None:
    """Set the mode of all models; log a warning where it has no effect."""
    global _setting
    _setting = mode
    _apply_mode()
    if mode == ON and _registry() is None:
        log.warning(
            "Learned Rounding: this ComfyUI has no native INT8 layers, so the setting for INT8 kernels has no effect."
        )


@contextmanager
def _running_in(mode: str):
    """Run one model in ``mode``; the setting may change meanwhile."""
    run = object()
    _model_modes[run] = mode
    _apply_mode()
    try:
        yield
    finally:
        del _model_modes[run]
        _apply_mode()


def use_native_int8(model, mode: str):
    """A MODEL whose native INT8 layers run in ``mode``: a clone, or the same one for auto, which leaves it to the setting.

    Raises:
        QuantizationError: the mode is on, and this ComfyUI has no native INT8 layers.
    """
    if mode == AUTO:
        return model
    if _registry() is None:
        if mode == OFF:
            return model
        raise QuantizationError("This ComfyUI has no native INT8 layers; set native_int8_kernels to auto or off.")

    def run(executor, *args, **kwargs):
        with _running_in(mode):
            return executor(*args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _NAME, run)
    return model


def _read_setting() -> str:
    """The setting that ComfyUI stores for its default user; auto where it cannot be read."""
    try:
        path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
        return native_int8_mode(json.loads(path.read_text(encoding="utf-8")).get(SETTING, AUTO))
    except (OSError, ValueError, AttributeError, QuantizationError):
        return AUTO


def add_native_int8_setting() -> None:
    """Apply the stored setting, and add the route by which the page changes it."""
    _set_setting(_read_setting())
    add_value_route(ROUTE, _change_setting)


def _change_setting(mode: object) -> str:
    """Set the mode of all models; returns it. Raises ValueError for an unknown one."""
    if not isinstance(mode, str) or mode not in NATIVE_INT8_MODES:
        raise ValueError(f"The value must be one of {', '.join(NATIVE_INT8_MODES)}.")
    _set_setting(mode)
    return mode
