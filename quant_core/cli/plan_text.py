"""A plan as text: one line for tensors whose names differ in numbers only and that have the same decision."""

from dataclasses import dataclass

from ..display import escape_control, human_bytes, mask_numbers, size_change
from ..recipes import Plan, Recipe
from ..recipes.plan import Decision
from ..run.estimate import tensor_size
from ..sources import Source

__all__ = ["plan_lines", "tensor_sizes"]

_WIDEST = 80  # characters of an aligned column: names in a file can be long


@dataclass
class _Group:
    """Tensors of one line: name of the first, number and bytes; None after the run where the format is chosen during it."""

    name: str
    decision: Decision
    count: int = 0
    before: int = 0
    after: int | None = 0


def tensor_sizes(source: Source, recipe: Recipe, plan: Plan) -> dict[str, int | None]:
    """Bytes of each tensor in the output, or of the tensors of its layer; None where its format is chosen during the run."""
    return {name: _size(name, decision, source, recipe, plan) for name, decision in plan.decisions.items()}


def _size(name: str, decision: Decision, source: Source, recipe: Recipe, plan: Plan) -> int | None:
    if decision.action == "remove":
        return 0
    if recipe.format.measured and decision.action == "quantize" and decision.format is None:
        return None
    return tensor_size(name, source.tensors[name], recipe, plan)


def plan_lines(source: Source, recipe: Recipe, plan: Plan, *, verbose: bool = False) -> list[str]:
    """The decisions and sizes; ``verbose``: one line per tensor."""
    sizes = tensor_sizes(source, recipe, plan)
    groups: dict[tuple[str, Decision], _Group] = {}
    for name, decision in plan.decisions.items():
        group = groups.setdefault((name if verbose else mask_numbers(name), decision), _Group(name, decision))
        size = sizes[name]
        group.count += 1
        group.before += source.tensors[name].nbytes
        group.after = None if group.after is None or size is None else group.after + size
    rows = [(group.decision.action, _title(pattern, group), _change(group)) for (pattern, _), group in groups.items()]
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(*rows, strict=True)]
    lines = [
        f"{action:<{widths[0]}}  {name:<{widths[1]}}  {size:<{widths[2]}}{_note(decision)}".rstrip()
        for (action, name, size), (_, decision) in zip(rows, groups, strict=True)
    ]
    return [*lines, _total(source, list(sizes.values()))]


def _title(pattern: str, group: _Group) -> str:
    return escape_control(group.name if group.count == 1 else f"{pattern} ×{group.count}")


def _change(group: _Group) -> str:
    """The size of a group, and after the run where it differs."""
    before = human_bytes(group.before)
    same = group.after is None or group.decision.action == "keep"
    return before if same else f"{before} → {human_bytes(group.after or 0)}"


def _note(decision: Decision) -> str:
    own = f"  as {decision.format}" if decision.format else ""
    return own + (f"  ({escape_control(decision.reason)})" if decision.reason else "")


def _total(source: Source, sizes: list[int | None]) -> str:
    before = sum(info.nbytes for info in source.tensors.values())
    if None in sizes:
        return "Size and time are not known before a run: formats are chosen when the layers are measured."
    after = sum(size or 0 for size in sizes)
    return f"Size: {human_bytes(before)} → {human_bytes(after)}, {size_change(before, after)}."
