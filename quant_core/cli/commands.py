"""The commands of ``lrq``, also ``python PATH/TO/CLONE``. Exit codes: see :data:`~.parser.EXIT_CODES`."""

import argparse
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from ..convert.migrate import migrate_file
from ..display import escape_control
from ..formats import FORMATS
from ..output import inspect_file, verify_file
from ..recipes import PRESETS
from ..run.quantize import output_name
from .batch import batch
from .bench import bench
from .documents import describe_inspection, describe_verification, print_document
from .failures import report_error
from .files import check_files
from .parser import EXIT_CODES, make_parser
from .progress import show_bytes
from .runs import open_calibration, plan, quantize
from .streams import flush_output, prepare_streams, print_error, print_line, send_lines

__all__ = ["main", "run"]

_PROBLEMS_SHOWN = 1000  # of a file that is verified; their number is printed too


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    prepare_streams()
    try:
        args = make_parser().parse_args(argv)
        args.results = []  # of --json: one object per file
        code = _run_command(args)
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
    """Run the command, then print the JSON document where --json asks for one; returns the exit code."""
    document = args.command in _DOCUMENTED and args.json
    send_lines("stderr" if document else "stdout")
    code, failure = 0, None
    try:
        check_files(args)
        code = _COMMANDS[args.command](args)
    except KeyboardInterrupt:
        code, failure = 130, {"type": "KeyboardInterrupt", "message": f"{EXIT_CODES[130]}."}
        print_error(f"lrq: {EXIT_CODES[130]}.")
    except BrokenPipeError:
        raise
    except Exception as error:
        code, failure = 1, report_error(args, error)
    if document:
        print_document(args.command, args.results, failure)
    return code


def _migrate(args: argparse.Namespace) -> int:
    output = args.output or output_name(args.input, "native")
    with open_calibration(args.calibration) as calibration:
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
    found = inspect_file(args.file)
    if args.json:
        _add_result(args, describe_inspection(found))
    else:
        print_line(found)
    return 0


def _add_result(args: argparse.Namespace, entry: dict[str, Any]) -> None:
    args.results.append({"input": str(args.file), "error": None, **entry})


def _verify(args: argparse.Namespace) -> int:
    with show_bytes("verifying") as progress:
        result = verify_file(args.file, progress=progress)
    if args.json:
        _add_result(args, describe_verification(result))
        return 1 if result.problems else 0
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


_DOCUMENTED = (
    "quantize",
    "batch",
    "plan",
    "inspect",
    "verify",
)  # commands whose --json prints the document of documents.py
_COMMANDS = {
    "quantize": quantize,
    "batch": batch,
    "plan": plan,
    "migrate": _migrate,
    "inspect": _inspect,
    "verify": _verify,
    "formats": _formats,
    "presets": _presets,
    "bench": bench,
}
