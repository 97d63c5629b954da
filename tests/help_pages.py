"""The help pages that ``lrq`` prints without torch, from its parser.

python tests/help_pages.py      (make texts) writes them
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from learned_rounding.quant_core.cli.parser import make_parser

__all__ = ["FOLDER", "render_pages"]

FOLDER = Path(__file__).resolve().parents[1] / "quant_core" / "cli" / "help"
_TERMINAL = {"COLUMNS": "80", "NO_COLOR": "1"}


def render_pages() -> Mapping[str, str]:
    """Name of the command, "lrq" for all of them → its help for a terminal of 80 columns."""
    parser = make_parser()
    (commands,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    with mock.patch.dict(os.environ, _TERMINAL):
        return {"lrq": parser.format_help(), **{name: each.format_help() for name, each in commands.items()}}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, text in render_pages().items():
        (FOLDER / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
