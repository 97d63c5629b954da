"""The commands of ``lrq``, also ``python PATH/TO/CLONE``. Exit codes: see :data:`~.parser.EXIT_CODES`."""

import argparse
import contextlib
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ... import kernels
from ..calibration import CalibrationFile
from ..convert.dequantize import decode_source
from ..convert.migrate import migrate_file
from ..display import escape_control, human_bytes
from ..errors import OutputError, QuantizationError
from ..formats import FORMATS
from ..output import inspect_file, keep_apart, verify_file
from ..recipes import PRESETS, Plan, Recipe
from ..run.blocks import require_model
from ..run.estimate import estimate_seconds, estimate_size
from ..run.quantize import output_name, quantize_file, usable_device
from ..sources import Source, open_source
from .bench import bench
from .files import check_files
from .parser import EXIT_CODES, make_parser
from .progress import Progress, show_bytes
from .recipe import build_recipe, layer_config_file
from .streams import flush_output, prepare_streams, print_error, print_line

__all__ = ["main", "run"]

_PROBLEMS_SHOWN = 1000  # of a file that is verified; their number is printed too


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    prepare_streams()
    try:
        code = _run_command(make_parser().parse_args(argv))
        lost = flush_output()
    except BrokenPipeError:
        return 141
    if lost and code == 0:
        print_error(
            f"lrq: the work is done, but the output of lrq cannot be written ({lost.strerror}); free some space there."
        )
        return 1
    return code


def run() -> NoReturn:
    """The process ``lrq``. It exits when :func:`main` returns, without waiting for threads or for torch to shut down."""
    os._exit(main())


def _run_command(args: argparse.Namespace) -> int:
    try:
        check_files(args)
        return _COMMANDS[args.command](args)
    except KeyboardInterrupt:
        print_error(f"lrq: {EXIT_CODES[130]}.")
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if hasattr(args, "debug"):
            print_error(traceback.format_exc())
        known = isinstance(error, QuantizationError)
        print_error(f"lrq: {escape_control(str(error) if known else _describe_unexpected(error))}")
        return 1


def _describe_unexpected(error: Exception) -> str:
    description = " ".join(f"{type(error).__name__}: {error}".split())
    return f"unexpected error ({description}); run again with --debug for the traceback, and report it."


@contextlib.contextmanager
def _open_source(args: argparse.Namespace) -> Iterator[Source]:
    """The source; GGUF is always dequantized, other quantized sources with --requantize."""
    with open_source(args.input) as opened:
        source = decode_source(opened) if args.requantize else opened
        decoded = getattr(source, "layers", {})
        if decoded:
            found = ", ".join(f"{count} layers of {name}" for name, count in decoded.items())
            print_line(f"Dequantized first, which does not undo the quantization error: {found}.")
        yield source


def _open_calibration(path: Path | None) -> contextlib.AbstractContextManager[CalibrationFile | None]:
    return CalibrationFile(path) if path else contextlib.nullcontext()


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


def _quantize(args: argparse.Namespace) -> int:
    recipe = build_recipe(args)
    require_model(recipe)
    usable_device(args.device)
    if args.report:
        _check_report(args.report)
    with _open_source(args) as source, _open_calibration(args.calibration) as calibration:
        rounding = recipe.resolve(calibration is not None)
        if args.dry_run:
            return _print_plan(args, recipe, source)
        output = args.output or output_name(args.input, recipe.format.label)
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
        plan = _make_plan(args, recipe, source)
        print_line(
            f"{escape_control(plan.explanation)} {args.input} → {output}, {recipe.format}, rounding {rounding.rounding}."
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
    print_line(report.table())
    if args.report and report.already_done and args.report.exists():
        print_line(f"{args.report} is unchanged: this run has nothing to report.")
    elif args.report:
        try:
            report.save(args.report)
        except OSError as error:
            raise OutputError(
                f"The report {args.report} cannot be written: {error.strerror}; {output} is complete."
            ) from error
    return 0


def _plan(args: argparse.Namespace) -> int:
    recipe = build_recipe(args)
    require_model(recipe)
    usable_device(args.device)
    with _open_source(args) as source:
        return _print_plan(args, recipe, source)


def _make_plan(args: argparse.Namespace, recipe: Recipe, source: Source) -> Plan:
    """The plan; its warnings go to standard error."""
    plan = recipe.plan(source, general=args.general)
    for warning in plan.warnings:
        print_error(f"lrq: warning: {escape_control(warning)}")
    return plan


def _print_plan(args: argparse.Namespace, recipe: Recipe, source: Source) -> int:
    plan = _make_plan(args, recipe, source)
    print_line(escape_control(plan.explanation))
    for name, decision in plan.decisions.items():
        own = f"  as {decision.format}" if decision.format else ""
        reason = f"  ({escape_control(decision.reason)})" if decision.reason else ""
        print_line(f"{decision.action:<8}  {escape_control(name)}{own}{reason}")
    if recipe.format.measured:
        print_line("Size and time are not known before a run: formats are chosen when the layers are measured.")
        return 0
    before = sum(info.nbytes for info in source.tensors.values())
    print_line(f"Size: {human_bytes(before)} → {human_bytes(estimate_size(source, recipe, plan))}.")
    if getattr(args, "time", False):
        device = usable_device(args.device)
        seconds = estimate_seconds(source, recipe, plan, device)
        print_line(f"Estimated time of rounding: {seconds:.3g} s on {device}, without a calibration.")
    return 0


def _migrate(args: argparse.Namespace) -> int:
    output = args.output or output_name(args.input, "native")
    with _open_calibration(args.calibration) as calibration:
        result = migrate_file(
            args.input,
            output,
            calibration=calibration,
            drop_input_scale=args.drop_input_scale,
            overwrite=args.overwrite,
        )
    print_line(f"{args.input} → {output}")
    for name, layers in result.layers.items():
        print_line(f"  {name}: {layers} layers")
    for change, count in result.changes.items():
        print_line(f"  {change}: {count}")
    for name in result.removed:
        print_line(f"  removed: {escape_control(name)}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    print_line(inspect_file(args.file))
    return 0


def _verify(args: argparse.Namespace) -> int:
    with show_bytes("verifying") as progress:
        result = verify_file(args.file, progress=progress)
    for warning in result.warnings[:_PROBLEMS_SHOWN]:
        print_line(f"Note: {escape_control(warning)}")
    for problem in result.problems[:_PROBLEMS_SHOWN]:
        print_error(escape_control(problem))
    if result.problems:
        print_error(f"{args.file}: {len(result.problems)} problem(s) in {result.layers} quantized layers.")
        return 1
    print_line(f"{args.file}: OK, {result.layers} quantized layers.")
    if result.model_run:
        print_line(f"Rounded with the running model: {escape_control(result.model_run)}.")
    return 0


def _formats(args: argparse.Namespace) -> int:
    for entry in FORMATS.values():
        stock = f"stock ComfyUI {entry.stock_since} and newer loads it" if entry.stock_since else "needs this node pack"
        print_line(f"{entry.name}  per {' or '.join(entry.granularities)}; {stock}; {entry.note}.")
    return 0


def _presets(args: argparse.Namespace) -> int:
    for preset in PRESETS.values():
        aliases = f" (also {', '.join(preset.aliases)})" if preset.aliases else ""
        print_line(f"{preset.name}: {preset.title}{aliases}")
        for kind in ("keep", "remove"):
            for rule in getattr(preset, kind):
                print_line(f"  {kind:<6}  {rule.text}  ({rule.reason})")
    return 0


_COMMANDS = {
    "quantize": _quantize,
    "plan": _plan,
    "migrate": _migrate,
    "inspect": _inspect,
    "verify": _verify,
    "formats": _formats,
    "presets": _presets,
    "bench": bench,
}
