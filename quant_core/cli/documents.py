"""The JSON document of ``lrq --json``: its keys are stable, new ones may be added.

Every document has ``version``, ``command``, ``error`` (of the command line as a whole, else null) and ``files``: one object per
input, with ``input`` and ``error``; without an error also the keys of the functions here. Sizes are bytes, times seconds.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ..output.inspect import Inspection
from ..output.verify import Verification
from ..recipes import Plan, Recipe
from ..run.report import Report
from ..sources import Source
from ..version import VERSION
from .plan_text import tensor_sizes
from .streams import print_json

__all__ = ["describe_inspection", "describe_plan", "describe_report", "describe_verification", "print_document"]

Entry = dict[str, Any]


def print_document(command: str, files: Sequence[Entry], error: Entry | None) -> None:
    """Print the document of a command."""
    print_json({"version": VERSION, "command": command, "error": error, "files": list(files)})


def describe_report(report: Report, next_step: str) -> Entry:
    """The summary of a run, with null for what was not measured; ``--report`` writes all layers."""
    return {**report.summarize(), "next_step": next_step}


def describe_plan(source: Source, recipe: Recipe, plan: Plan, seconds: float | None) -> Entry:
    """The decision for each tensor; sizes are null where the format of a layer is chosen during the run."""
    sizes = tensor_sizes(source, recipe, plan)
    after = [size for size in sizes.values() if size is not None]
    tensors = [
        {
            "name": name,
            "action": decision.action,
            "format": str(decision.format or recipe.format) if decision.action == "quantize" else None,
            "reason": decision.reason,
            "bytes_in": source.tensors[name].nbytes,
            "bytes_out": sizes[name],
        }
        for name, decision in plan.decisions.items()
    ]
    return {
        "model": plan.explanation,
        "preset": plan.preset.name if plan.preset else None,
        "recipe": recipe.to_dict(),
        "bytes_in": sum(info.nbytes for info in source.tensors.values()),
        "bytes_out": sum(after) if len(after) == len(sizes) else None,
        "seconds": seconds,
        "tensors": tensors,
        "warnings": list(plan.warnings),
    }


def describe_inspection(found: Inspection) -> Entry:
    """The content of a file."""
    values = dataclasses.asdict(found)
    dtypes = {name: {"tensors": count, "bytes": size} for name, (count, size) in found.dtypes.items()}
    made_by = json.loads(json.dumps(found.made_by), parse_constant=lambda _: None)  # JSON has no NaN
    return {**{name: value for name, value in values.items() if name != "path"}, "dtypes": dtypes, "made_by": made_by}


def describe_verification(result: Verification) -> Entry:
    """The result of a check."""
    return {"valid": not result.problems, **dataclasses.asdict(result)}
