"""Native INT8 layers on this pack's kernels, for who asks for that.

comfy-kitchen takes the first of its backends that can run a call. Below CUDA 13 ComfyUI switches off the one in CUDA, and
the one in Triton everywhere, so that INT8 layers run in plain torch there. Ours stands right before that last one; it is
off until the setting or a MODEL asks for it.
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

__all__ = ["add_native_int8_setting", "with_native_int8"]

log = logging.getLogger(__name__)

_NAME = "learned_rounding"
SETTING = "LearnedRounding.NativeInt8"  # in web/, and in the settings that ComfyUI keeps
ROUTE = "/learned_rounding/native_int8"


def int8_linear(
    x, weight, weight_scale, bias=None, out_dtype=torch.bfloat16, convrot=False, convrot_groupsize=256, input_act=None
):
    """comfy-kitchen's operation of that name; ``input_act`` names a function that x goes through first."""
    if input_act is not None:
        x = comfy.ops.INPUT_ACT_EAGER[input_act](x)
    rotate_by = convrot_groupsize if convrot else 0
    return kernels.int8_row_linear(x, weight, weight_scale, bias, rotate_by=rotate_by, out_dtype=out_dtype)


@functools.cache
def _registry():
    """comfy-kitchen's registry with our backend in it, switched off; None where ComfyUI has no INT8 layers."""
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


def _switch(on: bool) -> None:
    registry = _registry()
    if registry is not None:
        (registry.enable if on else registry.disable)(_NAME)
    elif on:
        log.warning("Learned Rounding: this ComfyUI has no INT8 layers of its own that other kernels could run.")


@contextmanager
def _switched_on():
    registry = _registry()
    before = registry.is_available(_NAME)
    registry.enable(_NAME)
    try:
        yield
    finally:
        _switch(before)


def with_native_int8(model):
    """A MODEL whose native INT8 layers run on our kernels wherever comfy-kitchen would take plain torch.

    Raises:
        QuantizationError: this ComfyUI has no such layers.
    """
    if _registry() is None:
        raise QuantizationError("This ComfyUI has no INT8 layers of its own; switch native_int8_kernels off.")

    def run(executor, *args, **kwargs):
        with _switched_on():
            return executor(*args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _NAME, run)
    return model


def _stored() -> bool:
    """The setting as ComfyUI keeps it for its default user."""
    try:
        path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
        return json.loads(path.read_text(encoding="utf-8")).get(SETTING) is True
    except (OSError, ValueError, AttributeError):
        return False


def add_native_int8_setting() -> None:
    """Do as the stored setting says, and as it is changed to in the page."""
    _switch(_stored())
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.post(ROUTE)
    async def change(request):
        on = await request.json()
        if not isinstance(on, bool):
            return web.Response(status=400, text="true or false")
        _switch(on)
        return web.json_response(on)
