"""Run a MODEL or CLIP with recorded calls, for roundings that need the running model."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping

import comfy.model_management
import comfy.sd
import torch

from ...quant_core.calibration import ReplaySet
from ...quant_core.display import human_bytes
from ...quant_core.errors import CalibrationError, RecipeError
from ...quant_core.sequential import ReplayedModel
from .calibrating import linear_layers
from .calibrations import Calibrated
from .folders import FileSource, temporary_folder
from .recording import live_arguments
from .running import show_text
from .sources import PatchedWeights, find_module

__all__ = ["check_compiled", "open_replayed_model"]

_COMPILE_KEY = "torch.compile"  # of the wrapper of ComfyUI's TorchCompileModel
_ROUNDING_BYTES = 6 << 30  # of device memory for the layers of one block, their activations and Hessians
_CALLS_BYTES = 8 << 30  # of device memory for the tensors of suspended calls, at most, and
_CALLS_SHARE = 3  # at most a third of what is free
_RAM_BYTES, _RAM_SHARE = 8 << 30, 4  # of main memory for them, at most a quarter


def check_compiled(patcher) -> None:
    """Raise RecipeError for a compiled model: its compiled code does not call the layers that are watched."""
    compiled = any(_COMPILE_KEY in keys for keys in patcher.wrappers.values())
    modules = (*patcher.model.modules(), *patcher.object_patches.values())
    if compiled or any(hasattr(module, "_orig_mod") for module in modules):
        raise RecipeError(
            "The model is compiled by torch.compile, and compiled code does not call its layers one by one; connect the model "
            "before it is compiled, and compile the quantized one."
        )


@contextlib.contextmanager
def open_replayed_model(
    source, part: str, weights: PatchedWeights | FileSource, calibration: Calibrated | None
) -> Iterator[ReplayedModel]:
    """Load a MODEL, or one text encoder of a CLIP, for its recorded calls.

    Raises:
        RecipeError: ``source`` is a file, or a compiled model.
        CalibrationError: the calibration has no recorded calls.
    """
    if not isinstance(weights, PatchedWeights):
        raise RecipeError(
            "Rounding 'sequential' and 'reconstructed' run the model, and a file does not run; load it with ComfyUI's own loader "
            "and connect its MODEL or CLIP."
        )
    clip = source if isinstance(source, comfy.sd.CLIP) else None
    patcher = clip.patcher if clip else source
    check_compiled(patcher)
    replays = calibration.replays.get(part) if calibration else None
    if replays is None:
        raise CalibrationError(
            "The calibration has no recorded calls of the model, which sequential rounding needs; run Calibrate again with "
            "replay_calls, for example 64."
        )
    comfy.model_management.load_models_gpu([patcher], memory_required=_ROUNDING_BYTES + _CALLS_BYTES)
    folder = temporary_folder() / f"learned_rounding_calls_{os.urandom(6).hex()}"
    folder.mkdir()
    try:
        yield _make_model(patcher, clip, part, weights, replays, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_model(patcher, clip, part: str, weights: PatchedWeights, replays: ReplaySet, folder) -> ReplayedModel:
    device = patcher.load_device
    if clip:
        root = clip.cond_stage_model.get_submodule(part)
        layers = linear_layers(patcher, {"": weights}, lambda _, layer: find_module(clip.cond_stage_model, part, layer))
        live: Mapping[str, object] = {}
        clip.cond_stage_model.reset_clip_options()
        if clip.layer_idx is not None:
            clip.cond_stage_model.set_clip_options({"layer": clip.layer_idx})
        clip.cond_stage_model.set_clip_options({"execution_device": device})
    else:
        root = patcher.model.diffusion_model
        layers = linear_layers(patcher, {"": weights}, lambda _, layer: f"diffusion_model.{layer}")
        live = live_arguments(patcher)

    def run(index: int) -> object:
        args, kwargs = replays.arguments(index, device, live)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return root(*args, **kwargs)

    device_bytes, ram_bytes = _spare_bytes(device)
    show_text(
        f"Sequential rounding with {len(replays)} recorded calls: up to {human_bytes(device_bytes)} of device memory and "
        f"{human_bytes(ram_bytes)} of RAM for them, the rest in ComfyUI's temp folder."
    )
    return ReplayedModel(
        root=root,
        layers={name: layer for name, layer in layers.items() if layer.weight.ndim == 2},
        run=run,
        validation=replays.validation,
        positions=replays.positions,
        device=device,
        device_bytes=device_bytes,
        ram_bytes=ram_bytes,
        folder=folder,
        fingerprint=replays.fingerprint,
    )


def _spare_bytes(device: torch.device) -> tuple[int, int]:
    """Device and main memory for the tensors of suspended calls."""
    ram = min(comfy.model_management.get_total_memory(torch.device("cpu")) // _RAM_SHARE, _RAM_BYTES)
    if device.type == "cpu":
        return ram, 0
    free = comfy.model_management.get_free_memory(device) - _ROUNDING_BYTES
    return max(0, min(free // _CALLS_SHARE, _CALLS_BYTES)), ram
