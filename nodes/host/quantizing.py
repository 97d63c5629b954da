"""Quantize a source into files in ComfyUI's temp folder."""

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
from .folders import FileSource, file_stamp, move_to_temp, new_unfinished, remove_files
from .opening import open_file
from .sources import READS_ENCODERS, split_parts

__all__ = ["Quantized", "quantize"]


@dataclass(frozen=True)
class Quantized:
    """Temporary files of one run, deleted with the last reference to this object.

    Attributes:
        files: part name ("" for a whole model) → path.
        kind: model folder of such files.
        label: format and granularity, for file names.
        report: report of the run.
        clip_type: for the file of a text encoder, the user's choice in Load CLIP.
    """

    files: dict[str, Path]
    kind: str
    label: str
    report: Report
    clip_type: str = ""

    def __post_init__(self):
        weakref.finalize(self, remove_files, tuple(self.files.values()))


def _identity(source) -> tuple:
    """A key that is equal for two sources if and only if quantizing them has the same result."""
    if isinstance(source, FileSource):
        return source.path, source.requantize, *file_stamp(source.path)
    patcher = source.patcher if isinstance(source, comfy.sd.CLIP) else source
    return weakref.ref(patcher.model), patcher.patches_uuid


# (identity, recipe, result) of the last run: connecting another output later does not quantize again.
_last: tuple[tuple, Recipe, Quantized] | None = None


def quantize(source, recipe: Recipe, on_event: Listener, calibration: "Calibrated | None" = None) -> Quantized:
    """Quantize a MODEL, CLIP or :class:`FileSource` into files in ComfyUI's temp folder, on ComfyUI's device.

    Until it is finished, a file is in the folder of :func:`new_unfinished`, from where the next run of the same inputs
    resumes it if the server stops. Its final name is unique, so servers that share the folder do not conflict.
    """
    global _last
    identity = (*_identity(source), calibration and calibration.fingerprint)
    if _last and _last[:2] == (identity, recipe):
        return _last[2]
    _last = None
    kind, parts = split_parts(source)
    device = comfy.model_management.get_torch_device()
    files, reports, finished = {}, [], None
    with calibration.open() if calibration else contextlib.nullcontext() as statistics:
        try:
            for part, origin in parts.items():
                finished = new_unfinished(part or kind)
                opening = open_file(origin) if isinstance(origin, FileSource) else contextlib.nullcontext(origin)
                with opening as weights:
                    _free_memory(weights.tensors.values(), recipe, statistics is not None, device)
                    report = quantize_file(
                        weights,
                        finished,
                        _exclude_unreadable(recipe, weights),
                        calibration=statistics.part(part) if statistics and part else statistics,
                        device=device,
                        overwrite=True,  # the name is unique, and overwriting needs no hard links
                        unfinished=f"{part or kind}.safetensors",
                        on_event=on_event,
                        check=comfy.model_management.throw_exception_if_processing_interrupted,
                    )
                files[part] = move_to_temp(finished)
                reports.append(report)
        except BaseException:
            remove_files(filter(None, (*files.values(), finished)))
            raise
    quantized = Quantized(files, kind, recipe.format.label, _merge_reports(reports), getattr(source, "clip_type", ""))
    _last = (identity, recipe, quantized)
    return quantized


def _exclude_unreadable(recipe: Recipe, weights: Source) -> Recipe:
    """The recipe without the text encoders of a checkpoint where this ComfyUI does not load quantized ones."""
    if READS_ENCODERS or not any(name.startswith(ENCODER_PREFIX) for name in weights.tensors):
        return recipe
    return dataclasses.replace(recipe, keep=(*recipe.keep, f"^{re.escape(ENCODER_PREFIX)}"))


def _merge_reports(reports: list[Report]) -> Report:
    """One report of all parts: lists and totals are added to those of the first."""
    first, *others = reports
    for other in others:
        for field in dataclasses.fields(Report):
            if field.name in ("layers", "kept", "bytes_in", "bytes_out", "seconds"):
                setattr(first, field.name, getattr(first, field.name) + getattr(other, field.name))
    first.recognised = " ".join(dict.fromkeys(report.recognised for report in reports))
    first.output = None  # the file is temporary
    return first


def _free_memory(infos: Collection[TensorInfo], recipe: Recipe, calibrated: bool, device: torch.device) -> None:
    """Make ComfyUI free the memory that the largest layer needs: weight, quantized values, float32 scratch of the solver."""
    largest = max((info.nbytes for info in infos), default=0)
    method = recipe.resolve(calibrated)
    times = 32 if method.gradient else 16 if method.rounding == "principal" else 6
    inner = max((info.shape[1] for info in infos if len(info.shape) == 2), default=0) if calibrated else 0
    comfy.model_management.free_memory(times * largest + 12 * inner**2, device)  # three float32 matrices (in, in)
