"""The commands ``lrq quantize`` and ``lrq plan``: the same work for each of several models."""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ... import kernels
from ..calibration import CalibrationFile
from ..convert.dequantize import decode_source
from ..display import escape_control
from ..errors import OutputError
from ..output import keep_apart
from ..output.together import write_together
from ..recipes import Plan, Recipe
from ..run.blocks import require_model
from ..run.estimate import estimate_seconds
from ..run.quality_card import make_quality_card
from ..run.quantize import output_name, quantize_file
from ..run.report import Report
from ..sources import Source, open_source
from ..workers import parse_devices
from .documents import Entry, describe_plan, describe_report
from .failures import report_error
from .next_step import describe_next_step
from .parser import is_folder
from .plan_text import plan_lines
from .progress import Progress
from .recipe import build_recipe, layer_config_file
from .streams import print_error, print_line

__all__ = ["open_calibration", "plan", "quantize"]


def quantize(args: argparse.Namespace) -> int:
    """Quantize each model, or print its plan for --dry-run; returns the exit code."""
    recipe = build_recipe(args)
    require_model(recipe)
    parse_devices(args.device)
    if args.report:
        _check_report(args.report)
    outputs = _choose_outputs(args.inputs, args.output, recipe.format.label)
    return _for_each_model(args, lambda path: _quantize_model(args, recipe, path, outputs[path]))


def plan(args: argparse.Namespace) -> int:
    """Print the plan of each model; returns the exit code."""
    recipe = build_recipe(args)
    require_model(recipe)
    parse_devices(args.device)

    def work(path: Path) -> Entry:
        with _open_source(args, path) as source:
            return _show_plan(args, recipe, source)

    return _for_each_model(args, work)


def open_calibration(path: Path | None) -> contextlib.AbstractContextManager[CalibrationFile | None]:
    """Context of the calibration of a command; of None without one."""
    return CalibrationFile(path) if path else contextlib.nullcontext()


def _for_each_model(args: argparse.Namespace, work: Callable[[Path], Entry]) -> int:
    """Do the work for each input; after an error the others follow. Returns the exit code."""
    code = 0
    for path in args.inputs:
        entry: Entry = {"input": str(path), "error": None}
        try:
            entry |= work(path)
        except BrokenPipeError:
            raise
        except Exception as error:
            entry["error"] = report_error(args, error)
            code = 1
        args.results.append(entry)
    return code


def _choose_outputs(inputs: Sequence[Path], output: str | None, label: str) -> dict[Path, Path]:
    """Input → output: beside it, in the folder ``output``, or the file ``output``.

    Raises:
        OutputError: two inputs have the same output.
    """
    if output and not is_folder(output):
        return {inputs[0]: Path(output)}
    named = {path: output_name(path, label) for path in inputs}
    chosen = {path: Path(output) / name.name for path, name in named.items()} if output else named
    sources: dict[Path, Path] = {}
    for path, target in chosen.items():
        if (other := sources.setdefault(target, path)) != path:
            raise OutputError(f"{other} and {path} have the same output {target}; quantize one of them by itself.")
    return chosen


@contextlib.contextmanager
def _open_source(args: argparse.Namespace, path: Path) -> Iterator[Source]:
    """The source; GGUF is always dequantized, other quantized sources with --requantize."""
    with open_source(path) as opened:
        source = decode_source(opened) if args.requantize else opened
        decoded = getattr(source, "layers", {})
        if decoded:
            found = ", ".join(f"{count} layers of {name}" for name, count in decoded.items())
            print_line(f"Dequantized first, which does not undo the quantization error: {found}.")
        yield source


def _check_report(report: Path) -> None:
    """Refuse a report path that cannot be written, before the run."""
    folder = report.absolute().parent
    try:
        exists = folder.is_dir()
        report.exists()
    except OSError as error:  # for example a file name that is too long
        raise OutputError(f"The report {report} cannot be written: {error.strerror}.") from error
    if not exists:
        raise OutputError(f"The report {report} cannot be written: there is no folder {folder}.")


def _quantize_model(args: argparse.Namespace, recipe: Recipe, path: Path, output: Path) -> Entry:
    with _open_source(args, path) as source, open_calibration(args.calibration) as calibration:
        rounding = recipe.resolve(calibration is not None)
        if args.dry_run:
            return _show_plan(args, recipe, source)
        _keep_apart(args, source, output)
        plan = _make_plan(args, recipe, source)
        print_line(
            f"{escape_control(plan.explanation)} {path} → {output}, {recipe.format}, rounding {rounding.rounding}."
        )
        progress = Progress(args.verbose)
        try:
            with kernels.using(args.kernel_backend or kernels.backend()):
                report = quantize_file(
                    source,
                    output,
                    recipe,
                    calibration=calibration,
                    device=args.device,
                    overwrite=args.overwrite,
                    general=args.general,
                    on_event=progress,
                )
        finally:
            progress.close()
        next_step = describe_next_step(output, source.tensors, report.preset)
    if not args.json:
        print_line(report.table())
    _save_report(args, report, output)
    if args.quality_card:
        _save_card(args, report, output)
    if not args.json:
        print_line(next_step)
    return describe_report(report, next_step)


def _keep_apart(args: argparse.Namespace, source: Source, output: Path) -> None:
    """Refuse an output or report that is another file of the run."""
    texts = {"recipe": [args.recipe], "layer config": [layer_config_file(args)]}
    keep_apart(output, texts)
    if args.report:
        inputs = {
            "source": getattr(source, "paths", ()),
            "output": [output],
            "calibration": [args.calibration],
            **texts,
        }
        keep_apart(args.report, inputs, "report")


def _save_report(args: argparse.Namespace, report: Report, output: Path) -> None:
    if args.report and report.already_done and args.report.exists():
        print_line(f"{args.report} is unchanged: this run has nothing to report.")
    elif args.report:
        try:
            report.save(args.report)
        except OSError as error:
            raise OutputError(
                f"The report {args.report} cannot be written: {error.strerror}; {output} is complete."
            ) from error


def _save_card(args: argparse.Namespace, report: Report, output: Path) -> None:
    """Write the quality card beside the output, under its name with .md."""
    path = output.with_suffix(".md")
    if report.already_done:
        print_line(f"{path} is not written: this run has nothing to report.")
        return
    try:
        write_together({path: make_quality_card(report, [output]).markdown().encode()}, overwrite=args.overwrite)
    except OutputError as error:
        raise OutputError(f"{error} {output} is complete.") from error


def _make_plan(args: argparse.Namespace, recipe: Recipe, source: Source) -> Plan:
    """The plan; its warnings go to standard error."""
    plan = recipe.plan(source, general=args.general)
    for warning in plan.warnings:
        print_error(f"lrq: warning: {escape_control(warning)}")
    return plan


def _show_plan(args: argparse.Namespace, recipe: Recipe, source: Source) -> Entry:
    plan = _make_plan(args, recipe, source)
    seconds = None
    if not args.json:
        print_line(escape_control(plan.explanation))
        for line in plan_lines(source, recipe, plan, verbose=args.verbose):
            print_line(line)
    if getattr(args, "time", False) and not recipe.format.measured:
        device = parse_devices(args.device)[0]
        seconds = estimate_seconds(source, recipe, plan, device)
        print_line(f"Estimated time of rounding: {seconds:.3g} s on {device}, without a calibration.")
    return describe_plan(source, recipe, plan, seconds) if args.json else {}
