"""Names of the outputs of a plan: templates, and the check that each output is a file of its own."""

import os
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import OutputError
from ..output import final_path
from .plan import Group
from .problems import Problems, show
from .source_list import path_key

__all__ = ["OutputNames", "check_template", "fill_template"]

_PLACEHOLDERS = ("source", "recipe", "format")
_DEFAULT = "{source}_{recipe}.safetensors"  # in the folder of the source, or in that of a template


def check_template(problems: Problems, where: str, template: str | None) -> None:
    """Add a problem if a template has other placeholders than {source}, {recipe} and {format}; ``where``: whose it is."""
    try:
        parts = list(string.Formatter().parse(template or ""))
    except ValueError as error:
        problems.add(
            OutputError,
            f"output '{show(template)}' of {where} is not valid: {error}; write {{{{ for a brace.",
            "output",
        )
        return
    if any(name is not None and (name not in _PLACEHOLDERS or spec or how) for _, name, spec, how in parts):
        known = ", ".join(f"{{{each}}}" for each in _PLACEHOLDERS)
        text = f"output '{show(template)}' of {where} has a placeholder that is none of {known}; use only these."
        problems.add(OutputError, text, "output")


def fill_template(template: str | None, folder: Path, source: Path, values: Mapping[str, str]) -> Path:
    """The path that a valid template gives.

    Args:
        template: relative to ``folder``; with / at its end a folder for files named by source and recipe; None: such
            a file beside the source.
        folder: of the plan file.
        source: path of the model.
        values: placeholder → value.
    """
    if template is None:
        return source.parent / _DEFAULT.format(**values)
    full = template + _DEFAULT if template.endswith(("/", os.sep)) else template
    return folder / full.format(**values)


@dataclass
class OutputNames:
    """Checks that every output and report is a file of its own, none that the plan reads.

    Attributes:
        problems: where problems are added.
        reports: files of the report.
    """

    problems: Problems
    reports: tuple[Path, ...]
    _roles: dict[str | tuple[int, int], str] = field(default_factory=dict)  # file that is read → what it is

    def add_inputs(self, role: str, files: Iterable[Path]) -> None:
        """Add files that the plan reads; ``role``: what they are."""
        for file in files:
            self._roles.setdefault(path_key(file), role)
            if identity := _identify(file):
                self._roles.setdefault(identity, role)

    def check(self, groups: Iterable[Group]) -> None:
        """Add a problem for each output, and each file of the report, that is another file of the plan."""
        reports = {path_key(path).casefold() for path in self.reports}
        taken: dict[str, str] = {}
        for group in groups:
            for output in group.outputs:
                what = f"[recipes.{output.name}] of {group.source}"
                key = path_key(output.path).casefold()  # one file on macOS and Windows
                self._check_path(output.path, f"the output of {what}", "output")
                if key in reports:
                    text = f"the output of {what}, {output.path}, is the report itself; choose another output."
                    self.problems.add(OutputError, text, "output")
                elif key in taken:
                    text = f"{taken[key]} and {what} have the same output {output.path}; give each its own."
                    self.problems.add(OutputError, text, "output")
                taken.setdefault(key, what)
        for path in self.reports:
            self._check_path(path, "the report", "report")

    def _check_path(self, path: Path, what: str, option: str) -> None:
        try:
            final_path(path)
        except OutputError as error:
            self.problems.add(OutputError, f"{what}: {error}", option)
            return
        identity = _identify(path)
        role = self._roles.get(path_key(path)) or (identity and self._roles.get(identity))
        if role:
            self.problems.add(OutputError, f"{what}, {path}, is the {role} itself; choose another {option}.", option)


def _identify(path: Path) -> tuple[int, int] | None:
    """Equal for two names of one file; None for a file that does not exist or has no inode number."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None
