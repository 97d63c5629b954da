"""ComfyUI's native INT8 layers on this pack's kernels: off, on, or auto.

A linear layer reaches comfy-kitchen in two ways. ``F.linear`` with a quantized weight calls the handler of its layout, which
is replaced here; ComfyUI's fused activations and compiled graphs call the operation ``int8_linear``, which the first of
comfy-kitchen's backends computes, and ours becomes the first. In the mode auto both run the faster implementation, measured
once per GPU and shape with the time of the host included.
"""

import functools
import json
import logging
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import comfy.ops
import comfy.quant_ops
import folder_paths
import torch
from aiohttp import web
from server import PromptServer

from ... import kernels
from ...kernels import tuning
from ...quant_core.errors import QuantizationError

__all__ = [
    "LAYOUT",
    "NATIVE_INT8_MODES",
    "add_native_int8_setting",
    "is_off",
    "linear",
    "native_int8_mode",
    "use_native_int8",
]

log = logging.getLogger(__name__)

LAYOUT = "TensorWiseINT8Layout"
_NAME, _OPERATION = "learned_rounding", "int8_linear"
SETTING = "LearnedRounding.NativeInt8"  # also in web/, and in ComfyUI's settings file
ROUTE = "/learned_rounding/native_int8"
AUTO, ON, OFF = NATIVE_INT8_MODES = ("auto", "on", "off")
_BOOLEANS = {True: ON, False: AUTO}  # values of version 0.1.0, in workflows and in the settings file
# What our kernels support: rotation group sizes, dtypes of activations, devices.
_GROUPS = (0, 16, 64, 256)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DEVICES = ("cuda",)
_MAX_CHOICES = 4096  # every prompt length and resolution is one more

_mode = OFF
# Shape and options → whether our kernels run it.
_choices: dict[tuple, bool] = {}


def native_int8_mode(value: object) -> str:
    """The mode of a widget's or setting's value. Raises QuantizationError where it is none."""
    mode = _BOOLEANS.get(value, value) if isinstance(value, bool) else value
    if mode not in NATIVE_INT8_MODES:
        raise QuantizationError(f"native_int8_kernels is {value!r}; choose one of {', '.join(NATIVE_INT8_MODES)}.")
    return mode


def _choose(key: tuple, x: torch.Tensor, qdata: torch.Tensor, ours: Callable, stock: Callable) -> bool:
    """Whether our kernels run a layer; measured in the mode auto where it is not known yet."""
    rotate_by = key[-2]
    if x.dtype not in _DTYPES or rotate_by not in _GROUPS or qdata.shape[1] % (rotate_by or 1):
        chosen = False
    elif _mode == ON:
        chosen = True
    elif x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # nothing can be measured now
    else:
        tokens = x.reshape(-1, x.shape[-1])
        name = tuning.shape_key(f"native int8, {_stock_version()}", tokens, qdata, *key[4:])
        runs = {"stock": stock, "ours": ours}
        chosen = tuning.fastest(name, list(runs), lambda name: runs[name]()) == "ours"
    if len(_choices) >= _MAX_CHOICES:
        _choices.clear()
    _choices[key] = chosen
    return chosen


@functools.cache
def _stock_version() -> str:
    """comfy-kitchen's version and enabled backends, on which the stock implementation depends."""
    from importlib.metadata import version

    registry = _registry()
    enabled = [name for name in registry._priority if name != _NAME and registry.is_available(name)]
    return f"comfy-kitchen {version('comfy-kitchen')} {'+'.join(enabled)}"


def is_off() -> bool:
    """Whether no layer runs on our kernels at the moment."""
    return _mode == OFF


def linear(x, weight, bias, stock: Callable[[], torch.Tensor], short: bool = False) -> torch.Tensor:
    """Product of activations and an INT8 weight (out, in), on our kernels or by ``stock()``.

    ``short``: ``stock`` is the whole forward pass of ComfyUI's layer, which takes more time of the host.
    """
    params, qdata = weight._params, weight._qdata
    rotate_by = params.convrot_groupsize if params.convrot else 0
    key = (_mode, x.shape, x.dtype, qdata.shape, bias is None, params.scale.numel(), rotate_by, short)
    chosen = _choices.get(key)
    ours = functools.partial(kernels.scaled_linear, x, qdata, params.scale, bias, rotate_by=rotate_by)
    if chosen is None:
        chosen = _choose(key, x, qdata, ours, stock)
    return ours() if chosen else stock()


def _is_ours(x, weight, transposed: bool) -> bool:
    """Whether the mode and the arguments of a layout's handler permit our kernels; tracers keep comfy-kitchen's operator."""
    return (
        _mode != OFF
        and type(x) is torch.Tensor
        and x.device.type in _DEVICES
        and getattr(weight, "_layout_cls", None) == LAYOUT
        and weight._params.transposed is transposed
        and not torch.compiler.is_compiling()
    )


def _handle_linear(stock, qt, args, kwargs):
    x, weight, *rest = args
    if kwargs or not _is_ours(x, weight, False):
        return stock(qt, args, kwargs)
    return linear(x, weight, rest[0] if rest else None, lambda: stock(qt, args, kwargs))


def _handle_mm(stock, qt, args, kwargs):
    if kwargs or not _is_ours(args[0], args[1], True):
        return stock(qt, args, kwargs)
    return linear(*args, None, lambda: stock(qt, args, kwargs))


def _handle_addmm(stock, qt, args, kwargs):
    bias, x, weight = args
    if kwargs or bias.dim() != 1 or not _is_ours(x, weight, True):
        return stock(qt, args, kwargs)
    return linear(x, weight, bias, lambda: stock(qt, args, kwargs))


# Under inference_mode torch dispatches aten.linear, otherwise its parts: t, then mm or addmm.
_HANDLERS = {
    torch.ops.aten.linear.default: _handle_linear,
    torch.ops.aten.mm.default: _handle_mm,
    torch.ops.aten.addmm.default: _handle_addmm,
}


def int8_linear(
    x, weight, weight_scale, bias=None, out_dtype=torch.bfloat16, convrot=False, convrot_groupsize=256, input_act=None
):
    """comfy-kitchen's operation of that name; ``input_act``: name of an activation function that is applied to x first."""
    rotate_by = convrot_groupsize if convrot else 0
    arguments = {
        "x": x, "weight": weight, "weight_scale": weight_scale, "bias": bias, "out_dtype": out_dtype,
        "convrot": convrot, "convrot_groupsize": convrot_groupsize, "input_act": input_act,
    }  # fmt: skip

    def ours() -> torch.Tensor:
        activated = x if input_act in (None, "none") else comfy.ops.INPUT_ACT_EAGER[input_act](x)
        return kernels.int8_row_linear(activated, weight, weight_scale, bias, rotate_by=rotate_by, out_dtype=out_dtype)

    def stock() -> torch.Tensor:
        return _stock_implementation(arguments)(**arguments)

    key = (_mode, x.shape, x.dtype, weight.shape, bias is None, weight_scale.numel(), rotate_by, (input_act, out_dtype))
    chosen = _choices.get(key)
    if chosen is None:
        chosen = _choose(key, x, weight, ours, stock)
    return ours() if chosen else stock()


def _stock_implementation(arguments: dict):
    """The function of comfy-kitchen's best backend other than ours."""
    registry = _registry()
    for name in registry._priority:
        if name != _NAME and registry.validate_backend_for_call(name, _OPERATION, arguments).success:
            return registry.get_implementation(_OPERATION, backend=name)
    raise RuntimeError(f"No backend of comfy-kitchen can compute {_OPERATION}.")


@functools.cache
def _registry():
    """comfy-kitchen's registry with our handlers and our backend, which is disabled; None where ComfyUI has no INT8 layers."""
    if "int8_tensorwise" not in getattr(comfy.quant_ops, "QUANT_ALGOS", {}):
        return None
    try:
        from comfy_kitchen.constraints import FunctionConstraints
        from comfy_kitchen.registry import registry
        from comfy_kitchen.tensor import base, get_layout_class, register_layout_op

        layout = get_layout_class(LAYOUT)
        stock = {op: base._LAYOUT_DISPATCH_TABLE[op][layout] for op in _HANDLERS}
        order = [_NAME, *(name for name in registry._priority if name != _NAME)]
    except (ImportError, AttributeError, KeyError):
        return None
    for op, handler in _HANDLERS.items():
        register_layout_op(op, layout)(functools.partial(handler, stock[op]))
    needs = FunctionConstraints(default_devices=frozenset({"cuda"}), min_compute_capability=(8, 0))
    registry.register(_NAME, SimpleNamespace(int8_linear=int8_linear), {_OPERATION: needs})
    registry.disable(_NAME)
    registry.set_priority(order)
    return registry


def _can_run() -> bool:
    """Whether our kernels support the GPU."""
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def _set_mode(mode: str) -> None:
    """Set the mode of all models; log a warning where it has no effect."""
    global _mode
    registry = _registry()
    if registry is not None:
        _mode = mode if _can_run() else OFF
        (registry.disable if _mode == OFF else registry.enable)(_NAME)
    elif mode == ON:
        log.warning(
            "Learned Rounding: this ComfyUI has no native INT8 layers, so the setting for INT8 kernels has no effect."
        )


@contextmanager
def _running_in(mode: str):
    """Set the mode and restore the previous one at the end."""
    before = _mode
    _set_mode(mode)
    try:
        yield
    finally:
        _set_mode(before)


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
    _set_mode(_read_setting())
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.post(ROUTE)
    async def change(request):
        mode = await request.json()
        if mode not in NATIVE_INT8_MODES:
            return web.Response(status=400, text=f"The value must be one of {', '.join(NATIVE_INT8_MODES)}.")
        _set_mode(mode)
        return web.json_response(mode)
