"""What a batch is to do, as plain data: groups of outputs that share a source, and what became of each output."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipes import Recipe

__all__ = ["ALREADY_DONE", "DONE", "FAILED", "NOT_RUN", "BatchPlan", "Group", "Outcome", "Output"]

DONE, ALREADY_DONE, FAILED, NOT_RUN = "done", "already done", "failed", "not run"  # statuses of an output


@dataclass(frozen=True)
class Output:
    """One file to write.

    Attributes:
        name: of its recipe in the plan.
        recipe: what to quantize, and how.
        path: of the file.
        calibrated: whether the calibration of the group is used.
        overwrite: replace a file that was made from something else.
    """

    name: str
    recipe: Recipe
    path: Path
    calibrated: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Group:
    """Outputs of one source that are made together: each tensor is read once for all of them.

    Attributes:
        source: path of the model.
        name: of the source in the report.
        outputs: in the order of the recipes of the plan.
        calibration: file of the outputs that are calibrated; None if none is.
        requantize: dequantize a source that is quantized already.
        general: quantize a model that no preset recognizes.
        size: of the files of the source, in bytes.
    """

    source: Path
    name: str
    outputs: tuple[Output, ...]
    calibration: Path | None = None
    requantize: bool = False
    general: bool = False
    size: int = 0


@dataclass(frozen=True)
class BatchPlan:
    """A plan file that was read and found valid.

    Attributes:
        path: of the plan file.
        groups: in the order of the sources.
        report: path of the report without its suffix.
        device: devices that the plan names, as ``--device`` does; None: the default.
        split: on a cluster, the layers of one model at a time are split among the nodes.
    """

    path: Path
    groups: tuple[Group, ...]
    report: Path
    device: str | None = None
    split: bool = False

    @property
    def report_files(self) -> tuple[Path, Path]:
        """Files of the report: JSON and Markdown."""
        return self.report.with_name(f"{self.report.name}.json"), self.report.with_name(f"{self.report.name}.md")


@dataclass(frozen=True)
class Outcome:
    """What became of one output; plain data, which a process can send to another.

    Attributes:
        source: path of the model.
        source_name: its name in the report.
        name: of the recipe in the plan.
        output: path of the file.
        status: "done", "already done", "failed" or "not run".
        seconds: time from the start of its group to the end of this output, in s.
        error: description of the error as in :func:`~..failures.describe_error`; None without one.
        summary: as :meth:`~..run.report.Report.summarize`; None without a report.
        traceback: of the error, for ``--debug``; not part of the report.
    """

    source: str
    source_name: str
    name: str
    output: str
    status: str
    seconds: float | None = None
    error: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    traceback: str = ""
