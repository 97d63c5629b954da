"""Report of a batch: what became of every output, as a JSON document and as Markdown."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..display import escape_control, human_bytes, markdown_table, three_digits
from ..output.publish import output_error
from ..output.together import write_together
from ..version import VERSION
from .plan import ALREADY_DONE, FAILED, NOT_RUN, BatchPlan, Outcome

__all__ = ["BatchReport", "describe_outcome", "find_other_file"]

_CARRIED = ("seconds", "device", "layers", "resumed", "unquantized", "median_error", "median_output_error")
_LONGEST = 100_000_000  # bytes of an earlier report that is read
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)


class BatchReport:
    """The outcomes of a batch, those of outputs that were not run yet among them.

    An output that is already done keeps the errors and the time of the earlier report at the same path, if that has them.

    Args:
        plan: the batch.
        devices: that run it.
    """

    def __init__(self, plan: BatchPlan, devices: Sequence[object]):
        self._plan, self._devices = plan, ", ".join(map(str, devices))
        self._outcomes = {
            str(output.path): Outcome(str(group.source), group.name, output.name, str(output.path), NOT_RUN)
            for group in plan.groups
            for output in group.outputs
        }
        self._warnings: list[str] = []
        self._earlier = _read_earlier(self.paths[0])

    @property
    def paths(self) -> tuple[Path, Path]:
        """Files of the report: JSON and Markdown."""
        return self._plan.report_files

    @property
    def outcomes(self) -> list[Outcome]:
        """In the order of the plan."""
        return list(self._outcomes.values())

    @property
    def counts(self) -> dict[str, int]:
        """Status → number of outputs."""
        return dict(Counter(outcome.status for outcome in self.outcomes))

    def add(self, outcome: Outcome) -> None:
        """Record what became of an output."""
        if outcome.status == ALREADY_DONE and outcome.summary is not None:
            outcome = dataclasses.replace(outcome, summary=self._carry(outcome, outcome.summary))
        self._outcomes[outcome.output] = outcome

    def warn(self, text: str) -> None:
        """Add a sentence on the batch as a whole."""
        self._warnings.append(text)

    def _carry(self, outcome: Outcome, summary: dict[str, Any]) -> dict[str, Any]:
        """The summary of an output that is already done, with the values of the earlier report of the same file."""
        earlier = self._earlier.get(outcome.output, {})
        same = all(earlier.get(name) == summary.get(name) for name in ("format", "rounding", "bytes_out"))
        if not same or earlier.get("input") != outcome.source:
            return summary
        return summary | {name: earlier[name] for name in _CARRIED if name in earlier}

    def to_dict(self, error: dict[str, Any] | None = None) -> dict[str, Any]:
        """The document; ``error``: what ended the batch early, as :func:`~..failures.describe_error`."""
        return {
            "version": VERSION,
            "command": "batch",
            "error": error,
            "plan": str(self._plan.path),
            "device": self._devices,
            "warnings": self._warnings,
            "files": [describe_outcome(outcome) for outcome in self.outcomes],
        }

    def markdown(self, error: dict[str, Any] | None = None) -> str:
        """A table for each source, and the errors below it."""
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        parts = [f"# {_escape(self._plan.path.name)}", f"{counts}, on {self._devices}; learned_rounding {VERSION}."]
        if error:
            parts.append(f"Ended early: {_escape(str(error['message']))}")
        parts += map(_escape, self._warnings)
        for source, outcomes in groupby(self.outcomes, key=lambda outcome: outcome.source):
            members = list(outcomes)
            parts += [f"## {_escape(members[0].source_name)}", _show_path(source), _make_table(members)]
            failed = [outcome for outcome in members if outcome.error]
            if failed:
                lines = (f"* {_escape(each.name)}: {_escape(str((each.error or {})['message']))}" for each in failed)
                parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"

    def save(self, error: dict[str, Any] | None = None) -> None:
        """Write both files; earlier ones are replaced atomically.

        Raises:
            OutputError: a file cannot be written; the outputs are complete all the same.
        """
        as_json, as_markdown = self.paths
        try:
            as_json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise output_error(failure, as_json) from failure
        text = json.dumps(self.to_dict(error), indent=1, allow_nan=False) + "\n"
        write_together({as_json: text.encode(), as_markdown: self.markdown(error).encode()}, overwrite=True)


def describe_outcome(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain values: input, recipe, output, status, error, and the summary of a run where there was one."""
    summary = dict(outcome.summary or {})
    seconds = summary.pop("seconds", None)
    return {
        "input": outcome.source,
        "name": outcome.source_name,
        "recipe": outcome.name,
        "output": outcome.output,
        "status": outcome.status,
        "error": outcome.error,
        "seconds": outcome.seconds if outcome.status == FAILED else seconds,
        **{key: value for key, value in summary.items() if key != "output"},
    }


def _make_table(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        entry = describe_outcome(outcome)
        before, after = entry.get("bytes_in"), entry.get("bytes_out")
        rows.append(
            (
                _escape(outcome.name),
                outcome.status,
                _show_path(Path(outcome.output).name),
                "–" if after is None else human_bytes(after),
                f"{100 * after / before:.3g} %" if before and after is not None else "–",
                *(_number(entry.get(name)) for name in ("median_error", "median_output_error", "seconds")),
            )
        )
    header = ("recipe", "status", "file", "size", "of the source", "weight error", "output error", "s")
    return markdown_table(header, rows, texts=3)


def _number(value: float | None) -> str:
    return "–" if value is None else three_digits(value)


def _escape(text: str) -> str:
    """A text of a file for Markdown: control characters are escaped, and so are marks of Markdown and HTML."""
    return "".join(f"\\{char}" if char in "\\`*_<>#[]" else char for char in escape_control(text))


def _show_path(path: str) -> str:
    """A path as code in Markdown."""
    return "`{}`".format(escape_control(path).replace("`", "'"))


def find_other_file(as_json: Path, as_markdown: Path) -> Path | None:
    """The first existing file of the two, unless they are an earlier report; else None."""
    try:
        if _read_document(as_json)["command"] == "batch":
            return None
    except _UNREADABLE:
        pass
    return next((path for path in (as_json, as_markdown) if path.exists()), None)


def _read_earlier(path: Path) -> dict[str, dict[str, Any]]:
    """Output → its entry in the earlier report at ``path``; empty without one that can be read."""
    try:
        return {entry["output"]: entry for entry in _read_document(path)["files"]}
    except _UNREADABLE:
        return {}


def _read_document(path: Path) -> Any:
    """The content of a JSON file that is not too long for a report. Raises one of ``_UNREADABLE``."""
    if path.stat().st_size > _LONGEST:
        raise ValueError(f"{path} is longer than a report")
    return json.loads(path.read_text(encoding="utf-8"))
