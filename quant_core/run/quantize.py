"""Quantize a state dict or a model file. Nodes and command line both call these functions."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..calibration import Calibration
from ..cancellation import CancelCheck
from ..errors import OutputExistsError, QuantizationError, SourceError
from ..events import Event, Listener, OutputChecked, RunFinished
from ..output import SafetensorsWriter, check_disk_space, final_path, keep_apart, leftover_bytes, remove_leftovers
from ..recipes import Plan, Recipe, describe_uncalibrated
from ..sequential import ReplayedModel
from ..sources import Source, TensorSource, open_source
from ..sources.shards import model_stem
from .allocate import allocate_formats
from .blocks import open_blocks, require_model, walk_fingerprint
from .estimate import estimate_size
from .fingerprint import FileStates, has_fingerprint, input_paths, may_be_newer, run_fingerprint, run_key
from .header import check_name_collisions, file_metadata, header_bound, planned_configs
from .loop import QuantizationRun, read_device
from .memory import explain_out_of_memory
from .recorded import RecordedSource
from .report import Report
from .resume import RunJournal

__all__ = ["QuantizedTensors", "output_name", "quantize_file", "quantize_tensors", "usable_device"]

DEFAULT_RECIPE = Recipe()


@dataclass(frozen=True)
class QuantizedTensors:
    """A quantized state dict, the metadata of its safetensors header, and the report of the run."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    report: Report


class _StateDict(dict[str, torch.Tensor]):
    """Sink of a run in memory: tensors on the CPU."""

    def add(self, name: str, tensor: torch.Tensor) -> int:
        self[name] = tensor.cpu()
        return tensor.nbytes


def quantize_tensors(
    tensors: Mapping[str, torch.Tensor],
    recipe: Recipe = DEFAULT_RECIPE,
    *,
    calibration: Calibration | None = None,
    metadata: Mapping[str, str] | None = None,
    device: str | torch.device | None = None,
    general: bool | None = None,
    model: ReplayedModel | None = None,
    on_event: Listener | None = None,
    check: CancelCheck | None = None,
) -> QuantizedTensors:
    """Quantize a state dict of unquantized weights in memory; ``tensors`` is not changed, the results are on the CPU.

    Args:
        tensors: name → tensor.
        recipe: what to quantize, and how.
        calibration: statistics of input activations; layers without them are rounded as if uncalibrated.
        metadata: header metadata of the source.
        device: device of the arithmetic; None for the first GPU, or the CPU if there is none.
        general: what to do with tensors that no preset recognizes, see :func:`~..recipes.make_plan`.
        model: the model of these weights with recorded calls, for roundings that run it.
        on_event: called with every :class:`~.events.Event`.
        check: called often; raise in it to cancel.

    Raises:
        QuantizationError: see :mod:`.errors`.
    """
    require_model(recipe, model)
    source, sink = TensorSource(tensors, metadata), _StateDict()
    emit, check, device = on_event or _ignore_event, check or _never_cancel, usable_device(device)
    plan = _plan(source, recipe, calibration, general, check)
    with explain_out_of_memory(f"{device} has too little memory for {source.name}"):
        plan = _allocate(source, plan, recipe, calibration, device, general, emit, check)
        with open_blocks(model, source, plan, recipe, calibration, None, emit=emit, check=check) as blocks:
            run = QuantizationRun(
                source,
                plan,
                recipe,
                calibration,
                sink=sink,
                journal=None,
                device=device,
                emit=emit,
                check=check,
                blocks=blocks,
            )
            run.execute()
    emit(RunFinished(report=run.report))
    walk = walk_fingerprint(recipe, model and model.fingerprint, device)
    fingerprint = run_fingerprint(source, recipe, calibration, walk)
    return QuantizedTensors(
        tensors=dict(sink),
        metadata=file_metadata(source, plan, recipe, run.configs, fingerprint, run.report.sequential),
        report=run.report,
    )


def quantize_file(
    source: str | os.PathLike | Source,
    destination: str | os.PathLike,
    recipe: Recipe = DEFAULT_RECIPE,
    *,
    calibration: Calibration | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    unfinished: str | None = None,
    general: bool | None = None,
    model: ReplayedModel | None = None,
    on_event: Listener | None = None,
    check: CancelCheck | None = None,
) -> Report:
    """Quantize a model file, or any :class:`Source`, into a new safetensors file.

    The file gets its final name when it is complete and on the disk. If the output of the same source, recipe, calibration
    and version already exists, it is left in place; if an input may have changed since, it is made again and compared. The
    layers that a killed run of the same inputs has finished are resumed, and the output has the same bytes.

    Args:
        source: path of a model file, see :func:`~..sources.open_source`, or a source.
        destination: path of the output; a symbolic link is followed.
        recipe: what to quantize, and how.
        calibration: statistics of input activations; layers without them are rounded as if uncalibrated.
        device: device of the arithmetic; None for the first GPU, or the CPU if there is none.
        overwrite: replace an existing file that was made from something else.
        unfinished: file name that the names of hidden files contain until the run ends; by default that of the output. Runs
            with the same name resume each other, whatever their outputs are named.
        general: what to do with a model that no preset recognizes, see :func:`~..recipes.make_plan`.
        model: the model of these weights with recorded calls, for roundings that run it.
        on_event: called with every :class:`~.events.Event`.
        check: called often; raise in it to cancel.

    Raises:
        QuantizationError: see :mod:`.errors`; nothing is left in the folder of the output then.
    """
    require_model(recipe, model)
    if isinstance(source, (str, os.PathLike)):
        with open_source(source) as opened:
            return quantize_file(
                opened,
                destination,
                recipe,
                calibration=calibration,
                device=device,
                overwrite=overwrite,
                unfinished=unfinished,
                general=general,
                model=model,
                on_event=on_event,
                check=check,
            )
    destination = final_path(destination)
    hidden = destination.with_name(unfinished or destination.name)
    emit, check, device = on_event or _ignore_event, check or _never_cancel, usable_device(device)
    inputs = {"source": input_paths(source), "calibration": input_paths(calibration)}
    states = FileStates(path for paths in inputs.values() for path in paths)
    keep_apart(destination, inputs)
    plan = _plan(source, recipe, calibration, general, check)
    walk = walk_fingerprint(recipe, model and model.fingerprint, device)
    fingerprint = run_fingerprint(source, recipe, calibration, walk)
    if destination.exists() and _is_done(destination, fingerprint, inputs, overwrite=overwrite):
        remove_leftovers(hidden)
        report = Report.for_plan(source.name, plan, recipe, calibrated=calibration is not None)
        report.output, report.already_done = str(destination), True
        return report
    with explain_out_of_memory(f"{device} has too little memory for {source.name}"):
        recorded = RecordedSource(source)
        plan = _allocate(recorded, plan, recipe, calibration, device, general, emit, check)
        journal = _journal(recorded, plan, recipe, fingerprint, FileStates(inputs["calibration"]), device)
        reserve = header_bound(source, plan, recipe, calibrated=calibration is not None, fingerprint=fingerprint)
        check_disk_space(destination, reserve + estimate_size(source, recipe, plan) - leftover_bytes(hidden))
        writer = SafetensorsWriter(
            destination,
            reserve,
            overwrite=overwrite,
            unfinished=unfinished,
            journal=journal,
            device=device,
            check=check,
        )
        with writer, open_blocks(model, recorded, plan, recipe, calibration, journal, emit=emit, check=check) as blocks:
            run = QuantizationRun(
                recorded,
                plan,
                recipe,
                calibration,
                sink=writer,
                journal=journal,
                device=device,
                emit=emit,
                check=check,
                blocks=blocks,
            )
            run.execute()
            if not states.check_unwritten(source):
                recorded.check_unchanged(check)
                if run_fingerprint(source, recipe, calibration, walk) != fingerprint:
                    raise SourceError(f"{source.name} was changed while it was read; run again.")
            run.report.bytes_out = writer.finish(
                file_metadata(source, plan, recipe, run.configs, fingerprint, run.report.sequential),
                lambda done, total: emit(OutputChecked(done=done, total=total)),
            )
    run.report.already_done = writer.matched_existing
    remove_leftovers(hidden)
    run.report.output = str(destination)
    emit(RunFinished(report=run.report))
    return run.report


def _plan(
    source: Source, recipe: Recipe, calibration: Calibration | None, general: bool | None, check: CancelCheck
) -> Plan:
    """Check the recipe and the calibration, and decide from names and shapes what to quantize."""
    recipe.resolve(calibration is not None)
    plan = recipe.plan(source, general=general, check=check)
    if calibration is None and (warning := describe_uncalibrated(recipe.format)):
        plan = replace(plan, warnings=(*plan.warnings, warning))
    if calibration is not None:
        weights = {name: info.shape for name, info in source.tensors.items() if name.endswith(".weight")}
        matrices = {
            name: shape[1:] if len(shape) == 3 else shape for name, shape in weights.items()
        }  # those of experts
        calibration.check({name.removesuffix(".weight"): shape for name, shape in matrices.items()})
    return plan


def _allocate(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    calibration: Calibration | None,
    device: torch.device,
    general: bool | None,
    emit: Listener,
    check: CancelCheck,
) -> Plan:
    """The plan with a format for every layer: that of the recipe or, for mixed precision, one of its own."""
    if recipe.format.measured and calibration is not None:
        plan = allocate_formats(source, recipe, calibration, device=device, emit=emit, check=check, general=general)
    check_name_collisions(source, plan, recipe)
    return plan


def _is_done(
    destination: Path, fingerprint: str | None, inputs: Mapping[str, tuple[Path, ...]], *, overwrite: bool
) -> bool:
    """Whether the existing output needs no run. Raises :class:`OutputExistsError` if it must not be replaced."""
    if has_fingerprint(destination, fingerprint):
        # The fingerprint has samples only. Weights in memory have no time of change, so they are always compared.
        return bool(inputs["source"]) and not may_be_newer((*inputs["source"], *inputs["calibration"]), destination)
    if not overwrite:
        raise OutputExistsError(
            f"{destination} exists and was made from something else; choose another output or overwrite it."
        )
    return False


def _journal(
    source: RecordedSource,
    plan: Plan,
    recipe: Recipe,
    fingerprint: str | None,
    calibration: FileStates,
    device: torch.device,
) -> RunJournal | None:
    """The journal from which another run can resume this one; None for a run without a fingerprint."""
    key = run_key(fingerprint, planned_configs(source, plan, recipe), calibration, device)
    return None if key is None else RunJournal(key, source, lambda name: read_device(source, plan, name, device))


def _ignore_event(event: Event) -> None:
    """Default listener."""


def _never_cancel() -> None:
    """Default cancellation check."""


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None for the first GPU, or the CPU if there is none.

    Raises:
        QuantizationError: the device does not exist or does not work.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise QuantizationError(f"The device '{device}' cannot be used here: {str(error).splitlines()[0]}") from None
    return chosen


def output_name(source: str | os.PathLike, label: str) -> Path:
    """Default output path, next to the source; ``label``: short name of the result, such as the recipe's."""
    source = Path(source)
    if source.is_dir():
        source = source.absolute()
        stem = source.name
    else:
        stem = model_stem(source.name)
    return source.parent / f"{stem}_{label}.safetensors"
