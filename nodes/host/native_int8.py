"""ComfyUI's native INT8 layers on this pack's kernels, as an option.

comfy-kitchen calls the first of its backends that supports a call. ComfyUI disables the Triton backend everywhere and the
CUDA backend below CUDA 13, so INT8 layers run in plain torch ("eager") there. Our backend has the priority just before
"eager"; it is disabled until the setting or a MODEL enables it.
"""

import functools
import json
import logging
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
from ...quant_core.errors import QuantizationError

__all__ = ["add_native_int8_setting", "enable_native_int8"]

log = logging.getLogger(__name__)

_NAME = "learned_rounding"
SETTING = "LearnedRounding.NativeInt8"  # also in web/, and in ComfyUI's settings file
ROUTE = "/learned_rounding/native_int8"


def int8_linear(
    x, weight, weight_scale, bias=None, out_dtype=torch.bfloat16, convrot=False, convrot_groupsize=256, input_act=None
):
    """comfy-kitchen's operation of that name; ``input_act``: name of an activation function that is applied to x first."""
    if input_act is not None:
        x = comfy.ops.INPUT_ACT_EAGER[input_act](x)
    rotate_by = convrot_groupsize if convrot else 0
    return kernels.int8_row_linear(x, weight, weight_scale, bias, rotate_by=rotate_by, out_dtype=out_dtype)


@functools.cache
def _registry():
    """comfy-kitchen's registry with our backend registered and disabled; None where ComfyUI has no INT8 layers."""
    if "int8_tensorwise" not in getattr(comfy.quant_ops, "QUANT_ALGOS", {}):
        return None
    try:
        from comfy_kitchen.constraints import FunctionConstraints
        from comfy_kitchen.registry import registry

        order = [name for name in registry._priority if name != _NAME]
        order.insert(order.index("eager"), _NAME)
    except (ImportError, AttributeError, ValueError):
        return None
    needs = FunctionConstraints(default_devices=frozenset({"cuda"}), min_compute_capability=(8, 0))
    registry.register(_NAME, SimpleNamespace(int8_linear=int8_linear), {"int8_linear": needs})
    registry.disable(_NAME)
    registry.set_priority(order)
    return registry


def _set_enabled(on: bool) -> None:
    """Enable or disable our backend; log a warning where it cannot be enabled."""
    registry = _registry()
    if registry is not None:
        (registry.enable if on else registry.disable)(_NAME)
    elif on:
        log.warning(
            "Learned Rounding: this ComfyUI has no native INT8 layers, so the setting for INT8 kernels has no effect."
        )


@contextmanager
def _enabled(registry):
    """Enable our backend in ``registry`` and restore its state at the end."""
    before = registry.is_available(_NAME)
    registry.enable(_NAME)
    try:
        yield
    finally:
        _set_enabled(before)


def enable_native_int8(model):
    """A clone of a MODEL whose native INT8 layers run on our kernels where comfy-kitchen would use plain torch.

    Raises:
        QuantizationError: this ComfyUI has no native INT8 layers.
    """
    registry = _registry()
    if registry is None:
        raise QuantizationError("This ComfyUI has no native INT8 layers; turn off native_int8_kernels.")

    def run(executor, *args, **kwargs):
        with _enabled(registry):
            return executor(*args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _NAME, run)
    return model


def _read_setting() -> bool:
    """The setting that ComfyUI stores for its default user; False where it cannot be read."""
    try:
        path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
        return json.loads(path.read_text(encoding="utf-8")).get(SETTING) is True
    except (OSError, ValueError, AttributeError):
        return False


def add_native_int8_setting() -> None:
    """Apply the stored setting, and add the route by which the page changes it."""
    _set_enabled(_read_setting())
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.post(ROUTE)
    async def change(request):
        on = await request.json()
        if not isinstance(on, bool):
            return web.Response(status=400, text="The value must be true or false.")
        _set_enabled(on)
        return web.json_response(on)
