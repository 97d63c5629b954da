"""Quantize a state dict, or a model file into one or several files. Nodes and command line both call these functions."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..calibration import Calibration
from ..cancellation import CancelCheck
from ..errors import ClusterLostError, OutputError, QuantizationError, SourceError
from ..events import Event, Listener, OutputChecked, RunFinished
from ..output import (
    SafetensorsWriter,
    check_disk_space,
    final_path,
    find_disk,
    keep_apart,
    leftover_bytes,
    remove_leftovers,
)
from ..recipes import Plan, Recipe, describe_uncalibrated
from ..sequential import ReplayedModel
from ..sources import Source, TensorSource, open_source
from ..sources.shards import model_stem
from ..sources.source import CPU
from ..workers import Devices, TaskPool, open_pool, parse_devices, without_number
from .allocate import allocate_formats
from .blocks import open_blocks, require_model, walk_fingerprint
from .estimate import estimate_size
from .fingerprint import FileStates, input_paths, is_done, run_fingerprint, run_key
from .header import check_name_collisions, file_metadata, header_bound, planned_configs
from .loop import QuantizationLoop, read_device, weight_device
from .memory import explain_out_of_memory
from .output_run import OutputRun
from .recorded import RecordedSource
from .report import Report
from .resume import RunJournal

__all__ = ["QuantizedTensors", "Target", "output_name", "quantize_file", "quantize_files", "quantize_tensors"]

DEFAULT_RECIPE = Recipe()
ONE_DEVICE = "Rounding '{}' uses one device, {}: the layers of a block are rounded for the outputs of the quantized blocks before it."


def _ignore_event(event: Event) -> None:
    """Default listener."""


def _never_cancel() -> None:
    """Default cancellation check."""


@dataclass(frozen=True)
class Target:
    """One output of :func:`quantize_files`; the attributes are the arguments of :func:`quantize_file`."""

    destination: Path
    recipe: Recipe = DEFAULT_RECIPE
    calibration: Calibration | None = None
    overwrite: bool = False
    unfinished: str | None = None
    on_event: Listener = _ignore_event


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
    device: Devices = None,
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
        device: device of the arithmetic, or several, see :func:`~..workers.parse_devices`; None for the first GPU, or the
            CPU if there is none.
        general: what to do with tensors that no preset recognizes, see :func:`~..recipes.make_plan`.
        model: the model of these weights with recorded calls, for roundings that run it.
        on_event: called with every :class:`~.events.Event`.
        check: called often; raise in it to cancel.

    Raises:
        QuantizationError: see :mod:`.errors`.
    """
    require_model(recipe, model)
    source, sink = TensorSource(tensors, metadata), _StateDict()
    emit, check, devices = on_event or _ignore_event, check or _never_cancel, parse_devices(device)
    first = devices[0]
    plan = _plan(source, recipe, calibration, general, check, devices)
    with (
        explain_out_of_memory(f"{first} has too little memory for {source.name}"),
        open_pool(_useful_devices(devices, [recipe]), _ignore_event, check) as pool,
    ):
        plan = _allocate(source, plan, recipe, calibration, pool, first, general, emit, check)
        with open_blocks(model, source, plan, recipe, calibration, None, emit=emit, check=check) as blocks:
            run = OutputRun(
                source,
                plan,
                recipe,
                calibrated=calibration is not None,
                sink=sink,
                journal=None,
                devices=pool.devices,
                emit=emit,
                check=check,
                blocks=blocks,
            )
            reading = weight_device(source, pool, first)
            QuantizationLoop(source, [run], calibration, pool, reading, check).execute()
            run.finish()
    emit(RunFinished(report=run.report))
    walk = walk_fingerprint(recipe, model and model.fingerprint, first)
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
    device: Devices = None,
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
        device: device of the arithmetic, or several, see :func:`~..workers.parse_devices`; None for the first GPU, or the
            CPU if there is none. The output has the same bytes with any number of devices.
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
    target = Target(Path(destination), recipe, calibration, overwrite, unfinished, on_event or _ignore_event)
    (result,) = _quantize(source, [target], device, general, model, check)
    if isinstance(result, QuantizationError):
        raise result
    return result


def quantize_files(
    source: str | os.PathLike | Source,
    targets: Sequence[Target],
    *,
    device: Devices = None,
    general: bool | None = None,
    pool: TaskPool | None = None,
    check: CancelCheck | None = None,
) -> list[Report | QuantizationError]:
    """Quantize a model into several files, as :func:`quantize_file` does into each, and read each of its tensors once.

    The outputs share the read, the statistics of each layer, and what is computed from them.

    Args:
        source, device, general, check: as for :func:`quantize_file`.
        targets: the outputs; those with a calibration have the same one.
        pool: other machines that quantize, instead of ``device``; this process reads and writes.

    Returns:
        For each target its report, or the error for which it was not made. An existing output, a recipe that selects no
        layer, and an output that cannot be written concern one target; another error during the run concerns all that are
        not complete.

    Raises:
        QuantizationError: the source cannot be opened, a device cannot be used, or two targets have the same output.
        ValueError: two targets have different calibrations.
    """
    return _quantize(source, targets, CPU if pool else device, general, None, check, pool)


def _quantize(
    source: str | os.PathLike | Source,
    targets: Sequence[Target],
    device: Devices,
    general: bool | None,
    model: ReplayedModel | None,
    check: CancelCheck | None,
    pool: TaskPool | None = None,
) -> list[Report | QuantizationError]:
    """See :func:`quantize_files`; ``model`` for a single target."""
    for target in targets:
        require_model(target.recipe, model)
    if len({id(target.calibration) for target in targets if target.calibration is not None}) > 1:
        raise ValueError("the targets have different calibrations; call once for each calibration")
    for path, count in Counter(os.path.realpath(target.destination) for target in targets).items():
        if count > 1:
            raise OutputError(f"{path} is the output of {count} targets; give each its own.")
    opened = open_source(source) if isinstance(source, (str, os.PathLike)) else contextlib.nullcontext(source)
    with opened as source:
        run = _TargetsRun(source, targets, parse_devices(device), general, model, check or _never_cancel, pool)
        return run.execute()


class _TargetsRun:
    """A run with one or several targets: what comes before the loop and after it."""

    def __init__(
        self,
        source: Source,
        targets: Sequence[Target],
        devices: Sequence[torch.device],
        general: bool | None,
        model: ReplayedModel | None,
        check: CancelCheck,
        pool: TaskPool | None,
    ):
        self._source, self._targets, self._devices, self._pool = source, targets, devices, pool
        self._general, self._model, self._check = general, model, check
        self._recorded = RecordedSource(source)
        self._results: dict[int, Report | QuantizationError] = {}  # by number of the target
        self._space: Counter[int] = Counter()  # disk → bytes that targets need there

    def execute(self) -> list[Report | QuantizationError]:
        """See :func:`quantize_files`."""
        files: dict[int, _TargetFile] = {}
        with self._open_pool() as pool:  # whose processes start while the targets are planned
            for number in range(len(self._targets)):
                with self._collected(number):
                    file = self._prepare(self._targets[number])
                    if report := file.find_done():
                        self._results[number] = report
                    else:
                        files[number] = file
            try:
                if files:
                    self._run(files, pool)
            except QuantizationError as error:
                if len(self._targets) == 1 or isinstance(error, ClusterLostError):
                    raise
                self._results = dict.fromkeys(files, error) | self._results
        return [self._results[number] for number in range(len(self._targets))]

    def _open_pool(self) -> contextlib.AbstractContextManager[TaskPool]:
        if self._pool is not None:
            return contextlib.nullcontext(self._pool)
        devices = _useful_devices(self._devices, [target.recipe for target in self._targets])
        return open_pool(devices, _ignore_event, self._check)

    @contextlib.contextmanager
    def _collected(self, number: int) -> Iterator[None]:
        """Keep an error as the result of a target; raise that of a single target."""
        try:
            yield
        except QuantizationError as error:
            if len(self._targets) == 1:
                raise
            self._results[number] = error

    def _prepare(self, target: Target) -> "_TargetFile":
        plan = _plan(self._source, target.recipe, target.calibration, self._general, self._check, self._devices)
        walk = walk_fingerprint(target.recipe, self._model and self._model.fingerprint, self._devices[0])
        return _TargetFile(self._source, target, plan, walk)

    def _run(self, files: "Mapping[int, _TargetFile]", pool: TaskPool) -> None:
        device = self._devices[0]
        with contextlib.ExitStack() as opened:
            opened.enter_context(explain_out_of_memory(f"{device} has too little memory for {self._source.name}"))
            for number, file in files.items():
                with self._collected(number):
                    self._allocate(file, pool)
            allocated = {number: file for number, file in files.items() if number not in self._results}
            for number, file in allocated.items():
                with self._collected(number):
                    self._open(file, [each.plan for each in allocated.values()], pool, opened)
            runs = {number: file.run for number, file in files.items() if file.run is not None}
            calibrations = [file.target.calibration for file in files.values() if file.target.calibration is not None]
            if not runs:
                return
            calibration = calibrations[0] if calibrations else None
            reading = weight_device(self._source, pool, device)
            loop = QuantizationLoop(self._recorded, list(runs.values()), calibration, pool, reading, self._check)
            try:
                loop.execute()
            finally:
                self._results |= {number: loop.failed[run] for number, run in runs.items() if run in loop.failed}
            written = [number for number, run in runs.items() if run not in loop.failed]
            for number in written:
                with self._collected(number):
                    files[number].start_to_finish(self._recorded, self._check)
            for number in written:
                if number not in self._results:
                    with self._collected(number):
                        self._results[number] = files[number].finish()

    def _allocate(self, file: "_TargetFile", pool: TaskPool) -> None:
        """Give every layer of a target its format."""
        target = file.target
        file.plan = _allocate(
            self._recorded,
            file.plan,
            target.recipe,
            target.calibration,
            pool,
            self._devices[0],
            self._general,
            target.on_event,
            self._check,
        )

    def _open(self, file: "_TargetFile", plans: Sequence[Plan], pool: TaskPool, opened: contextlib.ExitStack) -> None:
        """Open the writer of a target, and what its loop needs; ``plans``: of all targets."""
        target, device = file.target, self._devices[0]
        reading = weight_device(self._source, pool, device)
        recipe, calibration = target.recipe, target.calibration
        plan = file.plan
        key = run_key(
            file.fingerprint,
            planned_configs(self._recorded, plan, recipe),
            file.calibration_states,
            pool.model or device,
        )
        journal = _journal(key, self._recorded, plans, reading)
        calibrated = calibration is not None
        reserve = header_bound(self._source, plan, recipe, calibrated=calibrated, fingerprint=file.fingerprint)
        needed = reserve + estimate_size(self._source, recipe, plan) - leftover_bytes(file.hidden)
        disk = find_disk(file.destination)
        check_disk_space(file.destination, needed + self._space[disk])
        self._space[disk] += needed
        file.writer = opened.enter_context(
            SafetensorsWriter(
                file.destination,
                reserve,
                overwrite=target.overwrite,
                unfinished=target.unfinished,
                journal=journal,
                device=without_number(device),
                check=self._check,
            )
        )
        blocks = opened.enter_context(
            open_blocks(
                self._model,
                self._recorded,
                plan,
                recipe,
                calibration,
                journal,
                emit=target.on_event,
                check=self._check,
            )
        )
        file.run = OutputRun(
            self._recorded,
            plan,
            recipe,
            calibrated=calibrated,
            sink=file.writer,
            journal=journal,
            devices=pool.devices,
            emit=target.on_event,
            check=self._check,
            blocks=blocks,
        )


class _TargetFile:
    """A target with its plan and its inputs, then with its open writer and its run.

    Attributes:
        target, plan: as given.
        destination: final path of the output.
        hidden: path whose name the names of hidden files contain.
        fingerprint: of the inputs, see :func:`.fingerprint.run_fingerprint`.
        calibration_states: of the files of the calibration, at the start.
        writer, run: None until the target is opened.
    """

    def __init__(self, source: Source, target: Target, plan: Plan, walk: str | None):
        self.target, self.plan = target, plan
        self._source, self._walk = source, walk
        self.destination = final_path(target.destination)
        self.hidden = self.destination.with_name(target.unfinished or self.destination.name)
        self._inputs = {"source": input_paths(source), "calibration": input_paths(target.calibration)}
        self._states = FileStates(path for paths in self._inputs.values() for path in paths)
        self.calibration_states = FileStates(self._inputs["calibration"])
        keep_apart(self.destination, self._inputs)
        self.fingerprint = self._compute_fingerprint()
        self.writer: SafetensorsWriter | None = None
        self.run: OutputRun | None = None

    def _compute_fingerprint(self) -> str | None:
        return run_fingerprint(self._source, self.target.recipe, self.target.calibration, self._walk)

    def find_done(self) -> Report | None:
        """The report of an output that exists and needs no run. Raises :class:`OutputExistsError` for any other file."""
        if not is_done(self.destination, self.fingerprint, **self._inputs, overwrite=self.target.overwrite):
            return None
        remove_leftovers(self.hidden)
        calibrated = self.target.calibration is not None
        report = Report.for_plan(self._source.name, self.plan, self.target.recipe, calibrated=calibrated)
        report.output, report.already_done = str(self.destination), True
        return report

    def start_to_finish(self, recorded: RecordedSource, check: CancelCheck) -> None:
        """Check that the inputs are unchanged, and begin to give the complete file its name.

        Raises:
            SourceError: the source was changed while it was read.
            NothingToQuantizeError: as :meth:`OutputRun.finish`.
        """
        run, writer = self.run, self.writer
        assert run is not None and writer is not None
        run.finish()
        if not self._states.check_unwritten(self._source):
            recorded.check_unchanged(check)
            if self._compute_fingerprint() != self.fingerprint:
                raise SourceError(f"{self._source.name} was changed while it was read; run again.")
        writer.start_to_finish(
            file_metadata(
                self._source, self.plan, self.target.recipe, run.configs, self.fingerprint, run.report.sequential
            )
        )

    def finish(self) -> Report:
        """Wait until the file has its name. Raises :class:`OutputError` as :meth:`SafetensorsWriter.finish`."""
        run, writer, emit = self.run, self.writer, self.target.on_event
        assert run is not None and writer is not None
        report = run.report
        report.bytes_out = writer.finish(on_check=lambda done, total: emit(OutputChecked(done=done, total=total)))
        report.already_done = writer.matched_existing
        remove_leftovers(self.hidden)
        report.output = str(self.destination)
        emit(RunFinished(report=report))
        return report


def _useful_devices(devices: Sequence[torch.device], recipes: Iterable[Recipe]) -> Sequence[torch.device]:
    """The devices that a run can use at the same time."""
    return devices[:1] if any(recipe.rounding.runs_model for recipe in recipes) else devices


def _plan(
    source: Source,
    recipe: Recipe,
    calibration: Calibration | None,
    general: bool | None,
    check: CancelCheck,
    devices: Sequence[torch.device],
) -> Plan:
    """Check the recipe and the calibration, and decide from names and shapes what to quantize."""
    recipe.resolve(calibration is not None)
    plan = recipe.plan(source, general=general, check=check)
    warnings = []
    if calibration is None and (warning := describe_uncalibrated(recipe.format)):
        warnings.append(warning)
    if recipe.rounding.runs_model and len(devices) > 1:
        warnings.append(ONE_DEVICE.format(recipe.rounding.rounding, devices[0]))
    plan = replace(plan, warnings=(*plan.warnings, *warnings))
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
    pool: TaskPool,
    device: torch.device,
    general: bool | None,
    emit: Listener,
    check: CancelCheck,
) -> Plan:
    """The plan with a format for every layer: that of the recipe or, for mixed precision, one of its own."""
    if recipe.format.measured and calibration is not None:
        plan = allocate_formats(
            source, recipe, calibration, pool=pool, device=device, emit=emit, check=check, general=general
        )
    check_name_collisions(source, plan, recipe)
    return plan


def _journal(
    key: str | None, source: RecordedSource, plans: Sequence[Plan], reading: torch.device
) -> RunJournal | None:
    """The journal from which another run with the same key can resume this one; None for a run without a key.

    ``plans``: of all outputs, which decide where a tensor is read to: to ``reading`` or the CPU.
    """
    return None if key is None else RunJournal(key, source, lambda name: read_device(source, plans, name, reading))


def output_name(source: str | os.PathLike, label: str) -> Path:
    """Default output path, next to the source; ``label``: short name of the result, such as the recipe's."""
    source = Path(source)
    if source.is_dir():
        source = source.absolute()
        stem = source.name
    else:
        stem = model_stem(source.name)
    return source.parent / f"{stem}_{label}.safetensors"
