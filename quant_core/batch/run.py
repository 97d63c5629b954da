"""A batch is run: group after group on one device, or the largest group next on whichever of several devices is free."""

import contextlib
import queue
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..calibration import CalibrationFile
from ..cancellation import CancelCheck, wait_for_any
from ..convert.dequantize import decode_source
from ..errors import ClusterLostError, QuantizationError
from ..events import DeviceFailed, Event, Listener, RunFinished
from ..failures import describe_error
from ..output import leftover_bytes, remove_leftovers
from ..run.estimate import estimate_size
from ..run.fingerprint import input_paths, is_done, run_fingerprint
from ..run.quantize import Target, quantize_files
from ..run.report import Report
from ..sources import Source, open_source
from ..workers import Task, TaskPool, WorkerPool
from .plan import ALREADY_DONE, DONE, FAILED, NOT_RUN, BatchPlan, Group, Outcome, Output

__all__ = [
    "GroupStarted",
    "GroupTask",
    "OutputAdvanced",
    "OutputFinished",
    "preview_group",
    "run_group",
    "run_in_pool",
    "run_plan",
]


@dataclass(frozen=True)
class GroupStarted(Event):
    """The outputs of a group are being made.

    Attributes:
        group: the group.
        device: name of the device.
        note: sentence for users on the source; empty without one.
    """

    group: Group
    device: str
    note: str = ""


@dataclass(frozen=True)
class OutputAdvanced(Event):
    """An event of the run of one output.

    Attributes:
        output: path of the file.
        event: of its run.
    """

    output: Path
    event: Event


@dataclass(frozen=True)
class OutputFinished(Event):
    """An output is complete, or has failed; each output has one such event in a batch."""

    outcome: Outcome


@dataclass(frozen=True)
class GroupTask:
    """A group as a task of a :class:`~..workers.TaskPool`."""

    group: Group

    @property
    def title(self) -> str:
        return f"{self.group.name}: {', '.join(output.name for output in self.group.outputs)}"

    def run(
        self, device: torch.device, emit: Listener, check: CancelCheck, *, cpu_fallback: bool
    ) -> tuple[Outcome, ...]:
        """Make the outputs; what the memory of the device is too small for is computed on the CPU in any case.

        An unexpected error is raised, as it may be the end of the device, which only the process can find out.
        """
        run = _GroupRun(self.group, emit)
        run.make_outputs(device, check)
        return run.all_outcomes


def run_group(
    group: Group, device: torch.device, emit: Listener, check: CancelCheck, pool: TaskPool | None = None
) -> tuple[Outcome, ...]:
    """Make the outputs of a group; what is already done stays, and an error is an outcome.

    Args:
        group: the outputs and what they are made from.
        device: device of the arithmetic.
        emit: listener of the events of this module.
        check: called often; raises to cancel, which is no outcome.
        pool: other machines that quantize the layers; this process reads and writes.

    Raises:
        ClusterLostError: the machines of the pool answer no longer.
    """
    run = _GroupRun(group, emit)
    try:
        run.make_outputs(device, check, pool)
    except (BrokenPipeError, ClusterLostError):  # BrokenPipeError: the reader of the progress has gone away
        raise
    except Exception as error:
        check()  # of a batch that is cancelled, nothing has failed
        run.fail(error)
    return run.all_outcomes


def run_plan(plan: BatchPlan, devices: Sequence[torch.device], emit: Listener, check: CancelCheck) -> None:
    """Make the outputs of a plan; after an error of a group the others follow.

    Args:
        plan: the groups.
        devices: one: the groups follow each other in this process; several: a process for each, to which the largest
            of the waiting groups goes next. The group of a device that is lost goes to another one.
        emit: listener of the events of this module, in this thread.
        check: called often; raises to cancel. Then, or after Ctrl-C, complete outputs stay, others are removed.
    """
    if len(devices) == 1:
        for group in plan.groups:
            run_group(group, devices[0], emit, check)
        return
    run_in_pool(plan, lambda receive: WorkerPool(devices, receive, ahead=1), GroupTask, emit, check)


def run_in_pool(
    plan: BatchPlan,
    open_pool: Callable[[Listener], AbstractContextManager[TaskPool]],
    make_task: Callable[[Group], Task],
    emit: Listener,
    check: CancelCheck,
) -> None:
    """Make the outputs of a plan, each group as a task of a pool.

    Args:
        plan: the groups.
        open_pool: opens the pool, which calls a listener in any thread.
        make_task: the task of a group.
        emit, check: as for :func:`run_plan`.

    Raises:
        ClusterLostError: the machines of the pool do not answer; what is incomplete is kept.
    """
    received: queue.SimpleQueue[Event] = queue.SimpleQueue()
    finished: set[str] = set()  # outputs
    outputs = {output.path: group.source for group in plan.groups for output in group.outputs}
    # What a killed batch has left of groups that this one does not reach stays.
    older = {path for path in outputs if leftover_bytes(path)}
    started: set[Path] = set()  # sources

    def deliver(event: Event) -> None:
        """Emit an event; a group that another device repeats reports its outputs once."""
        if isinstance(event, OutputFinished):
            if event.outcome.output in finished:
                return
            finished.add(event.outcome.output)
        if isinstance(event, GroupStarted):
            started.add(event.group.source)
        emit(event)

    def poll() -> None:
        check()
        while not received.empty():
            deliver(received.get())
        for failure in pool.take_failures():
            others = "; another device makes its outputs" if failure.repeated else ""
            text = f"{failure.device} was lost ({failure.reason}){others}."
            emit(DeviceFailed(device=failure.device, lost=failure.lost, text=text))

    try:
        with open_pool(received.put) as pool:
            futures = [pool.submit(make_task(group), group.size * len(group.outputs)) for group in plan.groups]
            for group, future in zip(plan.groups, futures, strict=True):
                wait_for_any([future], poll)
                poll()
                error = future.exception()
                if isinstance(error, ClusterLostError):
                    raise error
                outcomes = (
                    future.result()
                    if error is None
                    else [_fail(_not_run(group, each), error) for each in group.outputs]
                )
                for outcome in outcomes:  # also where events are lost on the way
                    deliver(OutputFinished(outcome))
    except ClusterLostError:
        raise
    except BaseException:
        while not received.empty():
            if isinstance(event := received.get(), GroupStarted):
                started.add(event.group.source)
        for path, source in outputs.items():
            if str(path) not in finished and (path not in older or source in started):
                remove_leftovers(path)
        raise


def preview_group(group: Group) -> tuple[Outcome, ...]:
    """What :func:`run_group` would do: outcomes that are already done, failed for an error that is known before the run, or
    not run, with sizes in the summary.
    """
    try:
        with _open_group(group) as (source, calibration):
            return tuple(_preview_output(group, output, source, calibration) for output in group.outputs)
    except QuantizationError as error:
        return tuple(_fail(_not_run(group, output), error) for output in group.outputs)


class _GroupRun:
    """Outcomes of a group while it is run.

    Attributes:
        outcomes: path of an output → its outcome, once it is known.
    """

    def __init__(self, group: Group, emit: Listener):
        self._group, self._emit = group, emit
        self._began = time.perf_counter()
        self.outcomes: dict[Path, Outcome] = {}

    @property
    def all_outcomes(self) -> tuple[Outcome, ...]:
        """In the order of the outputs."""
        return tuple(self.outcomes[output.path] for output in self._group.outputs)

    def make_outputs(self, device: torch.device, check: CancelCheck, pool: TaskPool | None = None) -> None:
        """Make the outputs; errors of a user are outcomes."""
        group = self._group
        try:
            with _open_group(group) as (source, calibration):
                self._emit(GroupStarted(group, pool.devices if pool else str(device), _describe_decoded(source)))
                targets = [
                    Target(
                        output.path,
                        output.recipe,
                        calibration=calibration if output.calibrated else None,
                        overwrite=output.overwrite,
                        on_event=partial(self.receive, output),
                    )
                    for output in group.outputs
                ]
                results = quantize_files(source, targets, device=device, general=group.general, pool=pool, check=check)
            for output, result in zip(group.outputs, results, strict=True):
                self.finish(output, result)
        except ClusterLostError:
            raise
        except QuantizationError as error:
            check()  # of a batch that is cancelled, nothing has failed
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Report an error of all outputs that are not complete."""
        for output in self._group.outputs:
            self.finish(output, error)

    def receive(self, output: Output, event: Event) -> None:
        """Listener of the run of an output."""
        if isinstance(event, RunFinished):
            assert isinstance(event.report, Report)
            self.finish(output, event.report)
        else:
            self._emit(OutputAdvanced(output.path, event))

    def finish(self, output: Output, result: Report | Exception) -> None:
        """Report what became of an output, unless that is known already."""
        if output.path in self.outcomes:
            return
        outcome = replace(_not_run(self._group, output), seconds=time.perf_counter() - self._began)
        if isinstance(result, Exception):
            outcome = _fail(outcome, result)
        else:
            status = ALREADY_DONE if result.already_done else DONE
            outcome = replace(outcome, status=status, summary=_summarize(self._group, output, result))
        self.outcomes[output.path] = outcome
        self._emit(OutputFinished(outcome))


@contextlib.contextmanager
def _open_group(group: Group) -> Iterator[tuple[Source, CalibrationFile | None]]:
    """The source and the calibration of a group."""
    with contextlib.ExitStack() as opened:
        source = opened.enter_context(open_source(group.source))
        calibration = opened.enter_context(CalibrationFile(group.calibration)) if group.calibration else None
        yield decode_source(source) if group.requantize else source, calibration


def _describe_decoded(source: Source) -> str:
    found = ", ".join(f"{count} layers of {name}" for name, count in getattr(source, "layers", {}).items())
    return f"Dequantized first, which does not undo the quantization error: {found}." if found else ""


def _preview_output(group: Group, output: Output, source: Source, calibration: CalibrationFile | None) -> Outcome:
    outcome, used = _not_run(group, output), calibration if output.calibrated else None
    try:
        plan = output.recipe.plan(source, general=group.general)
        sizes = {
            "bytes_in": sum(info.nbytes for info in source.tensors.values()),
            "bytes_out": None if output.recipe.format.measured else estimate_size(source, output.recipe, plan),
            "layers": len(list(plan.names("quantize"))),
            "warnings": list(plan.warnings),
        }
        fingerprint = run_fingerprint(source, output.recipe, used)
        inputs = {"source": input_paths(source), "calibration": input_paths(used)}
        done = is_done(output.path, fingerprint, **inputs, overwrite=output.overwrite)
        status = ALREADY_DONE if done else NOT_RUN
        return replace(outcome, status=status, summary=sizes)
    except QuantizationError as error:
        return _fail(outcome, error)


def _not_run(group: Group, output: Output) -> Outcome:
    return Outcome(str(group.source), group.name, output.name, str(output.path), NOT_RUN)


def _fail(outcome: Outcome, error: BaseException) -> Outcome:
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return replace(outcome, status=FAILED, error=describe_error(error), traceback=trace)


def _summarize(group: Group, output: Output, report: Report) -> dict[str, Any]:
    """The summary of a report; sizes of what was already done are those of the files."""
    summary = {**report.summarize(), "output": str(output.path)}
    if report.already_done:
        summary |= {"bytes_in": group.size, "bytes_out": output.path.stat().st_size}
    return summary
