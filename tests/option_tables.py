"""Generated parts of the manual: option tables from the parser of ``lrq``, titles of nodes from their help pages.

Recipe options of the parser come from the option table.

python tests/option_tables.py      (make texts) writes them
"""

import argparse
import re
from pathlib import Path

from learned_rounding.quant_core.cli.parser import SECTIONS, make_parser

__all__ = ["COMMAND_LINE", "DOCUMENTS", "HELP_PAGES", "options_of", "render_tables", "replace_generated"]

_ROOT = Path(__file__).resolve().parents[1]
HELP_PAGES = _ROOT / "web" / "docs"
COMMAND_LINE = _ROOT / "docs" / "command-line.md"
DOCUMENTS = (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md")))
_NODE = re.compile(r"\[[^\]]*\](?=\([./]*web/docs/(\w+)\.md\))")


def _commands() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action.choices for action in make_parser()._actions if getattr(action, "choices", None))
    return commands


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Option strings of a command, help left out."""
    return [name for action in parser._actions for name in action.option_strings if name not in ("-h", "--help")]


def _render_differences() -> str:
    """Which options only one of ``lrq quantize`` and ``lrq plan`` has."""
    quantize, plan = (options_of(_commands()[name]) for name in ("quantize", "plan"))

    def join(some: list[str], others: list[str]) -> str:
        *names, last = [f"`{name}`" for name in some if name not in others and name.startswith("--")]
        return f"{', '.join(names)} and {last}" if names else last

    return (
        f"Both take all of them, but for {join(quantize, plan)}, which only `lrq quantize` has, and {join(plan, quantize)}, "
        "which only `lrq plan` has.\n"
    )


def render_tables() -> str:
    """One Markdown table per group of options of ``lrq quantize`` and ``lrq plan``."""
    commands = _commands()
    groups: dict[str, dict[str, str]] = {title: {} for title in SECTIONS}
    for command in (commands["quantize"], commands["plan"]):
        for group in command._action_groups:
            for action in group._group_actions if group.title in groups else ():
                if action.help != argparse.SUPPRESS and not (action.dest == "preset" and action.nargs == 0):
                    names = ", ".join(f"`{option}`" for option in action.option_strings or [action.metavar])
                    groups[group.title].setdefault(names, action.help.replace("%%", "%").replace("|", "\\|"))
    return "\n".join(
        "\n".join(
            [
                f"{title}:",
                "",
                "| option | meaning |",
                "|---|---|",
                *(f"| {names} | {text} |" for names, text in rows.items()),
                "",
            ]
        )
        for title, rows in groups.items()
    )


_PARTS = {"lrq options": render_tables, "lrq differences": _render_differences}


def replace_generated(text: str) -> str:
    """The document with tables and titles of today."""
    for marker, render in _PARTS.items():
        between = rf"(?<=<!-- {marker} -->\n).*?(?=<!-- end of {marker} -->)"
        text = re.sub(between, lambda _, render=render: f"\n{render()}\n", text, flags=re.S)
    return _NODE.sub(lambda found: f"[{_read_title(found[1])}]", text)


def _read_title(node: str) -> str:
    return (HELP_PAGES / f"{node}.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for document in DOCUMENTS:
        document.write_text(replace_generated(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
