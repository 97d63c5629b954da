"""Command line, environment and output common to all benchmarks."""

import argparse
import datetime
import itertools
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from learned_rounding.quant_core.version import VERSION

_LONGEST = 1000  # characters; longer values are only written to the JSON file

__all__ = ["arguments", "environment", "finish", "save"]


def arguments(description: str, *extra) -> argparse.Namespace:
    """Parse ``--quick`` (small sizes, minutes on a CPU), ``--json FILE`` and ``extra``: (flag, argparse options) pairs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to this file")
    for flag, options in extra:
        parser.add_argument(flag, **options)
    return parser.parse_args()


def _command(words: Sequence[str]) -> str:
    """The command that repeats the measurement: quoted for a shell, without the file that the results are written to."""
    kept = [word for before, word in zip(["", *words], words, strict=False) if "--json" not in (before, word)]
    return shlex.join(["python", *kept])


def environment() -> dict[str, object]:
    """Date, command, device and versions of a measurement."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "command": _command(sys.argv),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "learned_rounding": VERSION,
    }


def finish(args: argparse.Namespace, rows: list[dict], **more) -> None:
    """Print ``rows`` as one table per "section", and write all results to ``--json``."""
    for _, section in itertools.groupby(rows, key=lambda row: row.get("section")):
        _print_table(list(section))
    for key, value in more.items():
        text = str(value)
        print(f"{key}: {text if len(text) <= _LONGEST else '(see the JSON)'}")
    save(args, rows, **more)


def save(args: argparse.Namespace, rows: list[dict], **more) -> None:
    """Write all results to ``--json``, if it is given."""
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**environment(), "rows": rows, **more}, indent=1) + "\n", encoding="utf-8")


def _print_table(rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *text, strict=True)]
    for cells in (columns, *text):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())


def _text(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
