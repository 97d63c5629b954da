"""The command ``lrq batch``: many models and many recipes from one plan file."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ... import kernels
from ..batch.plan import ALREADY_DONE, FAILED, NOT_RUN, BatchPlan, Outcome
from ..batch.plan_file import read_plan
from ..batch.ray_run import absolute_plan, check_cluster, run_plan_on_ray
from ..batch.report import BatchReport, describe_outcome
from ..batch.run import OutputFinished, preview_group, run_plan
from ..display import escape_control, human_bytes
from ..errors import OutputError, QuantizationError
from ..events import DeviceFailed, Event, Listener
from ..failures import describe_error
from ..workers import parse_devices
from ..workers.ray_cluster import RayCluster
from .batch_progress import BatchProgress
from .parser import EXIT_CODES
from .streams import print_error, print_line

__all__ = ["batch"]


def batch(args: argparse.Namespace) -> int:
    """Run a plan, or print what it would do for --dry-run; returns the exit code."""
    plan = read_plan(args.plan, overwrite=args.overwrite)
    _check_options(args)
    if args.ray is not None:
        return _run_on_ray(args, absolute_plan(replace(plan, split=plan.split or args.split)))
    devices = parse_devices(args.device or plan.device)
    if args.dry_run:
        return _preview(args, plan)
    return _run(args, plan, devices, lambda receive: run_plan(plan, devices, receive, lambda: None))


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options without an effect."""
    if args.ray is None and args.split:
        raise QuantizationError("--split needs --ray ADDRESS; without a cluster, leave it out.", option="split")
    if args.ray is not None and args.device:
        raise QuantizationError("--ray uses the devices of the cluster; leave --device out.", option="device")


def _run_on_ray(args: argparse.Namespace, plan: BatchPlan) -> int:
    """As :func:`batch`, on a cluster."""
    if args.dry_run:
        return _preview(args, plan)
    with RayCluster(args.ray) as cluster:
        print_line(f"{args.ray}: {cluster.devices}")
        if cluster.note:
            print_error(f"lrq: warning: {cluster.note}")
        check_cluster(plan, cluster)
        return _run(args, plan, [cluster.devices], lambda receive: run_plan_on_ray(plan, cluster, receive))


def _run(args: argparse.Namespace, plan: BatchPlan, devices: Sequence[object], work: Callable[[Listener], None]) -> int:
    """Do the work of a batch with its progress and its report; returns the exit code."""
    report = BatchReport(plan, devices)
    progress = BatchProgress(args.verbose, sum(len(group.outputs) for group in plan.groups))

    def receive(event: Event) -> None:
        if isinstance(event, OutputFinished):
            report.add(event.outcome)
            _print_trace(args, event.outcome)
        elif isinstance(event, DeviceFailed):
            report.warn(event.text)
        progress(event)

    try:
        with kernels.using(args.kernel_backend or kernels.backend()):
            work(receive)
    except BaseException as error:
        progress.close()
        _save(report, _describe_end(error))
        raise
    finally:
        args.results += map(describe_outcome, report.outcomes)
    progress.close()
    _save(report)
    counts = report.counts
    print_line(f"{', '.join(f'{count} {status}' for status, count in counts.items())}; report: {report.paths[1]}")
    return 1 if counts.get(FAILED) else 0


def _preview(args: argparse.Namespace, plan: BatchPlan) -> int:
    """Print what would run, group by group; returns the exit code, 1 if some output would fail."""
    outcomes = []
    for group in plan.groups:
        for outcome in preview_group(group):
            outcomes.append(outcome)
            _print_preview(outcome)
            _print_trace(args, outcome)
    args.results += map(describe_outcome, outcomes)
    would = {
        status: sum(outcome.status == status for outcome in outcomes) for status in (NOT_RUN, ALREADY_DONE, FAILED)
    }
    print_line(f"{would[NOT_RUN]} to run, {would[ALREADY_DONE]} already done, {would[FAILED]} with errors.")
    return 1 if would[FAILED] else 0


def _print_preview(outcome: Outcome) -> None:
    line = f"{outcome.source} → {outcome.output}, {outcome.name}"
    if outcome.error:
        print_error(f"lrq: {line}: {escape_control(str(outcome.error['message']))}")
    elif outcome.status == ALREADY_DONE:
        print_line(f"{line}: already done")
    else:
        summary = outcome.summary or {}
        size = summary["bytes_out"]
        after = "a size that is chosen during the run" if size is None else human_bytes(size)
        print_line(f"{line}: {summary['layers']} layers, {human_bytes(summary['bytes_in'])} → {after}")
        for warning in summary["warnings"]:
            print_error(f"lrq: warning: {escape_control(warning)}")


def _print_trace(args: argparse.Namespace, outcome: Outcome) -> None:
    """Print the traceback of an error, where --debug asks for it."""
    if hasattr(args, "debug") and outcome.traceback:
        print_error(outcome.traceback)


def _save(report: BatchReport, error: dict[str, Any] | None = None) -> None:
    """Write the report; after an error that ended the batch, one of the report is only printed."""
    try:
        report.save(error)
    except OutputError as failure:
        if error is None:
            raise
        print_error(f"lrq: {escape_control(str(failure))}")


def _describe_end(error: BaseException) -> dict[str, Any]:
    if isinstance(error, KeyboardInterrupt):
        return {"type": "KeyboardInterrupt", "message": f"{EXIT_CODES[130]}."}
    return describe_error(error)
