"""Record calls of a running MODEL or CLIP, and give recorded calls the objects of a MODEL that are not recorded."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ...quant_core.calibration import ReplayRecorder, ReplaySet
from ...quant_core.display import human_bytes
from .folders import temporary_folder

__all__ = ["CallRecording", "describe_calls", "estimate_call", "live_arguments"]

_RAM_BYTES, _RAM_SHARE = 2 << 30, 8  # for the tensors of recorded calls; at most an eighth of the memory
_FILE_BYTES, _FILE_SHARE = 14 << 30, 2  # more in ComfyUI's temp folder, at most half of its free space
_LATENT_TENSORS = 2  # tensors of the size of the latents: with reference, masked or start images
# Wrappers and callbacks that act outside the call of the diffusion model.
_OUTSIDE = [
    ("transformer_options", "callbacks"),
    *(
        ("transformer_options", "wrappers", kind)
        for name, kind in vars(WrappersMP).items()
        if name.isupper() and kind != WrappersMP.DIFFUSION_MODEL
    ),
]


class CallRecording:
    """Record up to ``calls`` calls of each of ``modules``: part → module. No calls, nothing is recorded."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], calls: int, seed: int):
        self._modules = dict(modules) if calls else {}
        self._calls, folder = calls, temporary_folder()
        self._ram_bytes = min(comfy.model_management.get_total_memory(torch.device("cpu")) // _RAM_SHARE, _RAM_BYTES)
        self._max_bytes = self._ram_bytes + min(shutil.disk_usage(folder).free // _FILE_SHARE, _FILE_BYTES)
        parts = max(len(self._modules), 1)
        self._recorders = {
            part: ReplayRecorder(
                calls,
                seed=seed,
                folder=folder,
                ram_bytes=self._ram_bytes // parts,
                max_bytes=self._max_bytes // parts,
                ignored=_OUTSIDE,
            )
            for part in self._modules
        }

    def describe_limit(self, call_bytes: int | None = None) -> str:
        """Describe the memory for calls of about ``call_bytes``, if known; empty if none are recorded."""
        if not self._modules:
            return ""
        expected = (
            "" if call_bytes is None else f"about {human_bytes(min(self._calls * call_bytes, self._max_bytes))}, "
        )
        return (
            f" Recording up to {self._calls} calls of the model: {expected}at most {human_bytes(self._ram_bytes)} in RAM and "
            f"{human_bytes(self._max_bytes - self._ram_bytes)} in ComfyUI's temp folder."
        )

    @property
    def limited(self) -> bool:
        """Whether fewer calls were recorded because of their size."""
        return any(recorder.limited for recorder in self._recorders.values())

    @contextlib.contextmanager
    def watching(self, validation: bool | None) -> Iterator[None]:
        """Record one run."""
        with contextlib.ExitStack() as stack:
            for part, recorder in self._recorders.items():
                stack.enter_context(recorder.watching(self._modules[part], validation))
            yield

    def results(self) -> dict[str, ReplaySet]:
        """Return part → its calls, for parts that were called."""
        found = {part: recorder.result() for part, recorder in self._recorders.items()}
        return {part: replays for part, replays in found.items() if replays is not None}


def describe_calls(replays: Mapping[str, ReplaySet], limited: bool = False) -> str:
    """Describe recorded calls and where they are; ``limited``: fewer were recorded because of their size."""
    calls = ", ".join(f"{part}: {len(found)}" if part else str(len(found)) for part, found in replays.items())
    reason = ", limited by their size" if limited else ""
    in_files = sum(found.file_bytes for found in replays.values())
    in_ram = sum(found.nbytes for found in replays.values()) - in_files
    sizes = {"of RAM": in_ram, "in files": in_files}
    places = " and ".join(f"{human_bytes(size)} {place}" for place, size in sizes.items() if size)
    return f"recorded calls of the model: {calls}{reason}; {places or 'no tensors'}"


def estimate_call(conditioning: Iterable[Sequence[list]], latents: Sequence[dict]) -> int:
    """Estimate the bytes of the largest call of a diffusion model, without what a ControlNet computes.

    Args:
        conditioning: positive and negative of each prompt, which may be in one batch.
    """
    latent = max((_count_elements(latent) for latent in latents), default=0)
    batch = max(
        (len(latent["samples"]) for latent in latents if isinstance(latent.get("samples"), torch.Tensor)), default=1
    )
    largest = 0
    for branches in conditioning:
        entries = [entry for branch in branches for entry in branch]
        largest = max(
            largest, sum(_LATENT_TENSORS * latent + batch * _count_elements(list(entry)) for entry in entries)
        )
    return 4 * largest


def _count_elements(value: object) -> int:
    """Number of elements of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel()
    if isinstance(value, dict):
        return sum(map(_count_elements, value.values()))
    return sum(map(_count_elements, value)) if isinstance(value, list) else 0


def live_arguments(model) -> dict[str, object]:
    """Return keyword arguments of a call of a MODEL's diffusion model with its patches and wrappers, as a sampler makes them."""
    options = comfy.model_patcher.create_model_options_clone(model.model_options)
    comfy.sampler_helpers.prepare_model_patcher(model, {}, options)
    comfy.samplers.cast_to_load_options(options, device=model.load_device, dtype=model.model_dtype())
    return {"transformer_options": options["transformer_options"]}
