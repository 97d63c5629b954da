"""From a source to quantized files in ComfyUI's temporary folder."""

import contextlib
import dataclasses
import re
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sd
import torch

from ...quant_core import Recipe, Report, quantize_file
from ...quant_core.events import Listener
from ...quant_core.output.metadata import ENCODER_PREFIX
from ...quant_core.sources import Source, TensorInfo
from .calibrations import Calibrated
from .folders import FileSource, new_unfinished, remove, stamp, temporary
from .opening import opened
from .sources import READS_ENCODERS, parts_of

__all__ = ["Quantized", "quantize"]


@dataclass(frozen=True)
class Quantized:
    """Finished temporary files of one run, removed when nothing uses them any more.

    Attributes:
        files: part name ("" for a whole model) → path.
        kind: the model folder the files belong in.
        label: format and granularity, for file names.
        report: what was done.
        clip_type: of a text encoder's file, the choice of Load CLIP that its user made.
    """

    files: dict[str, Path]
    kind: str
    label: str
    report: Report
    clip_type: str = ""

    def __post_init__(self):
        weakref.finalize(self, remove, tuple(self.files.values()))


def _identity(source) -> tuple:
    """Equal for two sources exactly when quantizing them gives the same."""
    if isinstance(source, FileSource):
        return source.path, source.requantize, *stamp(source.path)
    patcher = source.patcher if isinstance(source, comfy.sd.CLIP) else source
    return weakref.ref(patcher.model), patcher.patches_uuid


# The last result, so that connecting another output afterwards does not quantize again.
_last: tuple[tuple, Recipe, Quantized] | None = None


def quantize(source, recipe: Recipe, on_event: Listener, calibration: "Calibrated | None" = None) -> Quantized:
    """Quantize a MODEL, CLIP or :class:`FileSource` into files in ComfyUI's temp folder, on the device ComfyUI gives.

    A file lies elsewhere until it is finished: where the server dies, the next run of the same goes on with it. No other server that
    works in this folder finishes one of the same name.
    """
    global _last
    identity = (*_identity(source), calibration and calibration.fingerprint)
    if _last and _last[:2] == (identity, recipe):
        return _last[2]
    _last = None
    kind, parts = parts_of(source)
    device = comfy.model_management.get_torch_device()
    files, reports, finished = {}, [], None
    with calibration.open() if calibration else contextlib.nullcontext() as statistics:
        try:
            for part, tensors in parts.items():
                finished = new_unfinished(part or kind)
                with opened(source) if isinstance(source, FileSource) else contextlib.nullcontext(tensors) as weights:
                    _make_room(weights.tensors.values(), recipe, statistics is not None, device)
                    report = quantize_file(
                        weights,
                        finished,
                        _readable(recipe, weights),
                        calibration=statistics.part(part) if statistics and part else statistics,
                        device=device,
                        overwrite=True,  # nothing is there, so that a disk needs no links for it
                        unfinished=f"{part or kind}.safetensors",
                        on_event=on_event,
                        check=comfy.model_management.throw_exception_if_processing_interrupted,
                    )
                files[part] = temporary(finished)
                reports.append(report)
        except BaseException:
            remove(filter(None, (*files.values(), finished)))
            raise
    quantized = Quantized(files, kind, recipe.format.label, _joined(reports), getattr(source, "clip_type", ""))
    _last = (identity, recipe, quantized)
    return quantized


def _readable(recipe: Recipe, weights: Source) -> Recipe:
    """The recipe without what this ComfyUI would misread: quantized text encoders in a checkpoint, where it looks for none."""
    if READS_ENCODERS or not any(name.startswith(ENCODER_PREFIX) for name in weights.tensors):
        return recipe
    return dataclasses.replace(recipe, keep=(*recipe.keep, f"^{re.escape(ENCODER_PREFIX)}"))


def _joined(reports: list[Report]) -> Report:
    first, *others = reports
    for other in others:
        for field in dataclasses.fields(Report):
            if field.name in ("layers", "kept", "bytes_in", "bytes_out", "seconds"):
                setattr(first, field.name, getattr(first, field.name) + getattr(other, field.name))
    first.recognised = " ".join(dict.fromkeys(report.recognised for report in reports))
    first.output = None  # a temporary file is no output
    return first


def _make_room(infos: Collection[TensorInfo], recipe: Recipe, calibrated: bool, device: torch.device) -> None:
    """Ask ComfyUI for the memory of the largest layer: its weight, its codes, and float32 scratch of the rounding."""
    largest = max((info.nbytes for info in infos), default=0)
    method = recipe.resolve(calibrated)
    times = 32 if method.gradient else 16 if method.rounding == "principal" else 6
    inner = max((info.shape[1] for info in infos if len(info.shape) == 2), default=0) if calibrated else 0
    comfy.model_management.free_memory(times * largest + 12 * inner**2, device)  # three float32 matrices (in, in)
