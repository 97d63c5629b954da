"""Which of ComfyUI's native INT8 and W4A8 layers run on this pack's kernels: off, on, or auto, for all models or one."""

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import folder_paths
import torch

from ...kernels import devices
from ...quant_core.errors import QuantizationError
from .native_layers import AUTO, NATIVE_INT8_MODES, OFF, ON, kitchen_registry, set_mode
from .running import add_value_route

__all__ = ["add_native_int8_setting", "native_int8_mode", "use_native_int8"]

log = logging.getLogger(__name__)

SETTING = "LearnedRounding.NativeInt8"  # also in web/, and in ComfyUI's settings file
_WRAPPER = "learned_rounding"  # key of our wrapper of a model
ROUTE = "/learned_rounding/native_int8"
_BOOLEANS = {True: ON, False: AUTO}  # values of version 0.1.0, in workflows and in the settings file

_setting = OFF  # mode of all models
# Modes of the running models whose node sets one, the latest last: with several GPUs, threads run a model in parallel.
_model_modes: dict[object, str] = {}


def native_int8_mode(value: object) -> str:
    """The mode of a widget's or setting's value. Raises QuantizationError where it is none."""
    mode = _BOOLEANS.get(value, value) if isinstance(value, bool) else value
    if mode not in NATIVE_INT8_MODES:
        raise QuantizationError(f"native_int8_kernels is {value!r}; choose one of {', '.join(NATIVE_INT8_MODES)}.")
    return mode


def _can_run() -> bool:
    """Whether our kernels support the GPU."""
    return (
        torch.cuda.is_available()
        and devices.is_nvidia()
        and devices.compute_capability(torch.device("cuda", torch.cuda.current_device())) >= (8, 0)
    )


def _apply_mode() -> None:
    """Put the mode of the running model, or else the setting, into effect; off where our kernels cannot run."""
    set_mode(next(reversed(_model_modes.values()), _setting) if _can_run() else OFF)


def _set_setting(mode: str) -> None:
    """Set the mode of all models; log a warning where it has no effect."""
    global _setting
    _setting = mode
    _apply_mode()
    if mode == ON and kitchen_registry() is None:
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
    if kitchen_registry() is None:
        if mode == OFF:
            return model
        raise QuantizationError("This ComfyUI has no native INT8 layers; set native_int8_kernels to auto or off.")

    def run(executor, *args, **kwargs):
        with _running_in(mode):
            return executor(*args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _WRAPPER, run)
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
