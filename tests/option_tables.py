"""The option tables of MANUAL.md, from the parser of ``lrq``, whose recipe options come from the option table.

python tests/option_tables.py      (make texts) writes them between their markers
"""

import argparse
import re
from pathlib import Path

from learned_rounding.quant_core.cli.parser import SECTIONS, make_parser

__all__ = ["MANUAL", "render_tables", "replace_tables"]

MANUAL = Path(__file__).resolve().parents[1] / "MANUAL.md"
_TABLE = re.compile(r"(?<=<!-- lrq options -->\n).*?(?=<!-- end of lrq options -->)", re.S)


def render_tables() -> str:
    """One Markdown table per group of options of ``lrq quantize`` and ``lrq plan``."""
    (commands,) = (action.choices for action in make_parser()._actions if getattr(action, "choices", None))
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


def replace_tables(text: str) -> str:
    """The manual with tables of today."""
    return _TABLE.sub(lambda _: f"\n{render_tables()}\n", text)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    MANUAL.write_text(replace_tables(MANUAL.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
