"""Quantize a source into files in ComfyUI's temp folder."""

import contextlib
import dataclasses
import re
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sd
import torch

from ...quant_core import Recipe, Report, quantize_file
from ...quant_core.calibration import Calibration, CalibrationFile
from ...quant_core.events import Listener
from ...quant_core.output.metadata import ENCODER_PREFIX
from ...quant_core.run.blocks import walk_fingerprint
from ...quant_core.run.fingerprint import input_paths, run_fingerprint
from ...quant_core.run.report import PartSummary
from ...quant_core.sources import Source, TensorInfo
from .calibrations import Calibrated
from .devices import THIS_CARD, choose_devices
from .folders import FileSource, file_stamp, move_to_temp, new_unfinished, remove_files
from .opening import open_file
from .reusing import PartInputs, find_saved
from .running import show_text
from .sources import READS_ENCODERS, PatchedWeights, split_parts
from .walking import open_replayed_model

__all__ = ["Quantized", "exclude_unreadable", "forget_last_result", "quantize"]


@dataclass(frozen=True)
class Quantized:
    """Temporary files of one run, deleted with the last reference to this object.

    Attributes:
        files: part name ("" for a whole model) → path.
        kind: model folder of such files.
        label: format and granularity, for file names.
        report: report of the run.
        clip_type: for the file of a text encoder, the user's choice in Load CLIP.
        key: see :func:`.reusing.find_saved`.
    """

    files: dict[str, Path]
    kind: str
    label: str
    report: Report
    clip_type: str = ""
    key: tuple = ()

    def __post_init__(self):
        weakref.finalize(self, remove_files, tuple(self.files.values()))


def _identity(source) -> tuple:
    """A key that is equal for two sources if and only if quantizing them has the same result."""
    if isinstance(source, FileSource):
        return source.path, source.requantize, *file_stamp(source.path)
    patcher = source.patcher if isinstance(source, comfy.sd.CLIP) else source
    return weakref.ref(patcher.model), patcher.patches_uuid


# (identity, recipe, general, result) of the last run: connecting another output later does not quantize again.
_last: tuple[tuple, Recipe, bool, Quantized] | None = None


def forget_last_result() -> None:
    """Drop the last result; its files are deleted when neither the node cache nor a model uses them."""
    global _last
    _last = None


def quantize(
    source,
    recipe: Recipe,
    on_event: Listener,
    calibration: "Calibrated | None" = None,
    *,
    general: bool = False,
    devices: str = THIS_CARD,
) -> Quantized:
    """Quantize a MODEL, CLIP or :class:`FileSource` into files in ComfyUI's temp folder, on ComfyUI's device or, with
    ``devices``, on several, see :func:`.devices.choose_devices`; the files have the same bytes.

    ``general`` allows models that no preset recognizes, see :func:`make_plan`; every part is checked before the first is quantized.

    The last result and files that Save Quantized has saved are used again for the same inputs, see :mod:`.reusing`.

    Until it is finished, a file is in the folder of :func:`new_unfinished`, from where the next run of the same inputs
    resumes it if the server stops. Its final name is unique, so servers that share the folder do not conflict.
    """
    global _last
    statistics_key = calibration and (calibration.fingerprint, _calls_key(recipe, calibration))
    identity = (*_identity(source), statistics_key)
    if _last and _last[:2] == (identity, recipe) and general >= _last[2]:
        return _last[3]
    forget_last_result()
    kind, parts = split_parts(source)
    for origin in parts.values():
        with _open(origin) as weights:
            exclude_unreadable(recipe, weights).plan(
                weights,
                general=general,
                check=comfy.model_management.throw_exception_if_processing_interrupted,
            )
    clip_type = getattr(source, "clip_type", "")
    key = (kind, clip_type, recipe, statistics_key)
    with calibration.open() if calibration else contextlib.nullcontext() as statistics:
        if saved := find_saved(key, lambda: _read_inputs(parts, recipe, calibration, statistics)):
            names = ", ".join(path.name for path in saved.files.values())
            show_text(f"Using {names}, saved from the same inputs.")
            files, report = saved.link_to_temp(), saved.report
        else:
            files, report = _run(source, kind, parts, recipe, on_event, calibration, statistics, general, devices)
    quantized = Quantized(files, kind, recipe.format.label, report, clip_type, key)
    _last = (identity, recipe, general, quantized)
    return quantized


def _run(
    source,
    kind: str,
    parts: Mapping[str, FileSource | PatchedWeights],
    recipe: Recipe,
    on_event: Listener,
    calibration: Calibrated | None,
    statistics: CalibrationFile | None,
    general: bool,
    devices: str,
) -> tuple[dict[str, Path], Report]:
    """Quantize all parts; returns {part: temporary file} and the report."""
    files, reports, finished = {}, {}, None
    try:
        for part, origin in parts.items():
            finished = new_unfinished(part or kind)
            with _open(origin) as weights, _open_model(source, part, origin, recipe, calibration) as model:
                chosen = choose_devices(devices, recipe, weights, calibrated=statistics is not None)
                if model is None:  # else the model is loaded, with room for the layers beside it
                    _free_memory(weights.tensors.values(), recipe, statistics is not None, chosen)
                report = quantize_file(
                    weights,
                    finished,
                    exclude_unreadable(recipe, weights),
                    calibration=_of_part(statistics, part),
                    device=chosen,
                    overwrite=True,  # the name is unique, and overwriting needs no hard links
                    unfinished=f"{part or kind}.safetensors",
                    general=general,
                    model=model,
                    on_event=on_event,
                    check=comfy.model_management.throw_exception_if_processing_interrupted,
                )
            files[part] = move_to_temp(finished)
            reports[part] = report
    except BaseException:
        remove_files(filter(None, (*files.values(), finished)))
        raise
    return files, _merge_reports(reports)


def _calls_key(recipe: Recipe, calibration: Calibrated) -> tuple[str, ...]:
    """Fingerprints of the recorded calls, where the rounding uses them."""
    replays = calibration.replays.values() if recipe.rounding.runs_model else ()
    return tuple(replay.fingerprint for replay in replays)


def _read_inputs(
    parts: Mapping[str, FileSource | PatchedWeights],
    recipe: Recipe,
    calibration: Calibrated | None,
    statistics: CalibrationFile | None,
) -> dict[str, PartInputs]:
    """The inputs of the run of each part."""
    inputs, device = {}, comfy.model_management.get_torch_device()
    for part, origin in parts.items():
        with _open(origin) as weights:
            replays = calibration.replays.get(part) if calibration else None
            walk = walk_fingerprint(recipe, replays.fingerprint if replays else None, device)
            exact = exclude_unreadable(recipe, weights)
            fingerprint = run_fingerprint(weights, exact, _of_part(statistics, part), walk)
            inputs[part] = PartInputs(fingerprint, input_paths(weights))
    return inputs


@contextlib.contextmanager
def _open(origin: FileSource | PatchedWeights) -> Iterator[Source]:
    """Open a file; weights in memory need no opening."""
    with open_file(origin) if isinstance(origin, FileSource) else contextlib.nullcontext(origin) as weights:
        yield weights


def _open_model(source, part: str, origin: FileSource | PatchedWeights, recipe: Recipe, calibration: Calibrated | None):
    """Context of the model with its recorded calls, for roundings that run it, else of None."""
    if not recipe.rounding.runs_model:
        return contextlib.nullcontext()
    return open_replayed_model(source, part, origin, calibration)


def _of_part(statistics: CalibrationFile | None, part: str) -> Calibration | None:
    """The statistics of one part of a model."""
    return statistics.part(part) if statistics and part else statistics


def exclude_unreadable(recipe: Recipe, weights: Source) -> Recipe:
    """The recipe without the text encoders of a checkpoint where this ComfyUI does not load quantized ones."""
    if READS_ENCODERS or not any(name.startswith(ENCODER_PREFIX) for name in weights.tensors):
        return recipe
    return dataclasses.replace(recipe, keep=(*recipe.keep, f"^{re.escape(ENCODER_PREFIX)}"))


def _merge_reports(reports: Mapping[str, Report]) -> Report:
    """One report of all parts: lists and totals are added to those of the first, summaries are kept for each part."""
    first, *others = reports.values()
    if others:
        first.parts = {part: PartSummary(report.choice, report.sequential) for part, report in reports.items()}
    for other in others:
        for name in ("layers", "kept", "bytes_in", "bytes_out", "seconds", "taken_up"):
            setattr(first, name, getattr(first, name) + getattr(other, name))
    first.recognised = " ".join(dict.fromkeys(report.recognised for report in reports.values()))
    first.warnings = list(dict.fromkeys(warning for report in reports.values() for warning in report.warnings))
    first.output = None  # the file is temporary
    return first


def _free_memory(
    infos: Collection[TensorInfo], recipe: Recipe, calibrated: bool, devices: Sequence[torch.device]
) -> None:
    """Make ComfyUI free the memory that the largest layer needs: weight, quantized values, float32 scratch of the solver."""
    largest = max((info.nbytes for info in infos), default=0)
    method = recipe.resolve(calibrated)
    times = 32 if method.gradient else 16 if method.rounding == "principal" else 6
    inner = max((info.shape[1] for info in infos if len(info.shape) == 2), default=0) if calibrated else 0
    # Four float32 matrices (in, in): H, its coupling, and the factors of two dampenings; and the next H in 16 bits.
    for device in devices:
        comfy.model_management.free_memory(times * largest + 18 * inner**2, device)
    if len(devices) > 1:  # worker processes cannot use what the allocator of this one holds
        comfy.model_management.soft_empty_cache()
