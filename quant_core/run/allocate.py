"""Format "measured": for every layer the format, or none, that costs the model least, chosen by its real inputs.

Each layer is quantized in every candidate format and run on its held-out inputs, quantized as ComfyUI will quantize
them. The error of its output times what such an error does to the model's own output (the calibration's sensitivity)
is what a candidate costs. Errors of different layers are taken to add up, as independent noise does, so the best set
within a size is found by spending bytes where they save the most error (Lagrange multipliers over each layer's convex
hull: Shoham & Gersho, Efficient Bit Allocation for an Arbitrary Set of Quantizers, 1988).
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..calibration import Calibration, Inputs
from ..cancellation import CancelCheck
from ..display import human_bytes
from ..errors import NonFiniteWeightError, NothingToQuantizeError, RecipeError
from ..events import LayerMeasured, Listener
from ..formats import GROUP_SIZES, FormatConfig, QuantizedWeight
from ..layer import output_error, quantize_weight
from ..recipes import Decision, Plan, Recipe
from ..recipes.plan import Choice
from ..recipes.presets import COMMON
from ..sources import Source

__all__ = ["measure_plan"]

_ROOM = 0.05  # of what all layers take in 8 bits: how much keeping what hurts may add when no target is given
_POINTS = 40  # of the curve in the report
_MOST_ROWS = 512  # of held-out inputs
_STOCK = (
    FormatConfig("int8_tensorwise", "row"),
    *(FormatConfig("int8_tensorwise", "row", convrot=size) for size in GROUP_SIZES),
    FormatConfig("float8_e4m3fn", "tensor"),
)
_BLOCKS = (FormatConfig("int8_blockwise", "block"), FormatConfig("float8_e4m3fn_blockwise", "block"))


@dataclass(frozen=True)
class _Option:
    """One way to store a layer: bytes in the file, share of the model's squared output error; no format keeps it."""

    bytes: int
    error: float
    format: FormatConfig | None = None


def measure_plan(
    source: Source,
    recipe: Recipe,
    calibration: Calibration,
    *,
    device: torch.device,
    emit: Listener,
    check: CancelCheck,
) -> Plan:
    """``recipe.plan(source)`` with the format of every layer decided by measurement.

    Where the calibration holds sensitivities, layers that the preset keeps are candidates too.

    Raises:
        RecipeError: no size within reach is as small as the target.
        NothingToQuantizeError: the target is so generous that every layer is kept.
    """
    plan = recipe.plan(source, check=check)
    names = _candidates(source, recipe, plan, calibration, check)
    sensitivities = {name: known for name in names if (known := _sensitivity(calibration, name)) is not None}
    unknown = statistics.median(sensitivities.values()) if sensitivities else 1 / max(len(names), 1)
    options: dict[str, list[_Option]] = {}
    for index, name in enumerate(names):
        check()
        emit(LayerMeasured(index, len(names), name))
        known = calibration.inputs(name.removesuffix(".weight")) or Inputs()
        weigh = sensitivities.get(name, unknown)
        options[name] = _hull(_options(source, name, recipe, known, weigh, device, check))
    others = sum(source.tensors[name].nbytes for name in plan.output_names() if name not in options)
    taken, curve = _spend(options, recipe, others)
    decisions = {name: _decision(name, taken, decision) for name, decision in plan.decisions.items()}
    if all(decision.action != "quantize" for decision in decisions.values()):
        raise NothingToQuantizeError(f"The target holds the whole model of {source.name} as it is; ask for less.")
    chosen = next(point for point in curve if point[0] == others + sum(option.bytes for option in taken.values()))
    return replace(plan, decisions=decisions, choice=Choice(_thinned(curve, chosen), chosen, bool(sensitivities)))


def _candidates(source: Source, recipe: Recipe, plan: Plan, calibration: Calibration, check: CancelCheck) -> list[str]:
    """Layers to measure: those the plan quantizes, and those that only the preset keeps if it is known what hurts."""
    free = set(recipe.plan(source, preset=COMMON, check=check).names("quantize"))

    def wanted(name: str, action: str) -> bool:
        return action == "quantize" or action == "keep" and name in free and _sensitivity(calibration, name) is not None

    return [name for name, decision in plan.decisions.items() if wanted(name, decision.action)]


def _sensitivity(calibration: Calibration, name: str) -> float | None:
    return calibration.sensitivity_of(name.removesuffix(".weight"))


def _options(
    source: Source,
    name: str,
    recipe: Recipe,
    known: Inputs,
    weigh: float,
    device: torch.device,
    check: CancelCheck,
) -> list[_Option]:
    """Keeping the layer, and every candidate that its shape allows."""
    weight = source.read(name, device)
    matrix = weight.float()
    rows = known.holdout_rows
    rows = None if rows is None else rows[:_MOST_ROWS].to(device, torch.float32)
    gram = known.gram if rows is None else None
    found = [_Option(source.tensors[name].nbytes, 0.0)]
    for choice in _STOCK + (_BLOCKS if recipe.block_formats else ()):
        if choice.convrot and matrix.shape[1] % choice.convrot:
            continue
        try:
            candidate = Recipe(choice, "auto" if gram is None else "nearest")
            made = quantize_weight(weight, **candidate.layer_options, gram=gram, check=check)
        except NonFiniteWeightError:
            return found
        size = sum(tensor.nbytes for tensor in made.tensors(name.removesuffix(".weight")).values())
        found.append(_Option(size, weigh * _error(matrix, made, rows) ** 2, choice))
    return found


def _error(weight: torch.Tensor, made: QuantizedWeight, rows: torch.Tensor | None) -> float:
    """Relative error of the layer's output, its inputs quantized as well where some are known."""
    if rows is None:
        return made.weight_error if made.output_error is None else made.output_error
    return output_error(weight, made, rows)


def _hull(options: list[_Option]) -> list[_Option]:
    """The lower convex hull of (bytes, error), from the fewest bytes on; of equals the first."""
    hull: list[_Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(fewer: _Option, more: _Option) -> float:
    return (fewer.error - more.error) / (more.bytes - fewer.bytes)


def _spend(
    options: Mapping[str, list[_Option]], recipe: Recipe, others: int
) -> tuple[dict[str, _Option], list[tuple[int, float]]]:
    """The option of each layer, and the curve of (file bytes, relative output error of the model) from small to large."""
    taken = {name: hull[0] for name, hull in options.items()}
    size, error = (
        others + sum(option.bytes for option in taken.values()),
        sum(option.error for option in taken.values()),
    )
    allowed, wanted = _targets(recipe, size, size - others)
    steps = sorted(
        ((name, fewer, more) for name, hull in options.items() for fewer, more in zip(hull, hull[1:], strict=False)),
        key=lambda step: -_slope(*step[1:]),
    )
    curve = [(size, math.sqrt(error))]
    skipped: set[str] = set()
    spending = True
    for name, fewer, more in steps:
        size, error = size + more.bytes - fewer.bytes, max(error + more.error - fewer.error, 0.0)
        curve.append((size, math.sqrt(error)))
        spent = others + sum(option.bytes for option in taken.values())
        spending = spending and math.sqrt(sum(option.error for option in taken.values())) > wanted
        if not spending or name in skipped or spent + more.bytes - fewer.bytes > allowed:
            skipped.add(name)  # and with it the layer's further steps; smaller layers may still fit
        else:
            taken[name] = more
    reached = (
        others + sum(option.bytes for option in taken.values()),
        math.sqrt(sum(option.error for option in taken.values())),
    )
    return taken, sorted({*curve, reached})


def _targets(recipe: Recipe, least: int, layers: int) -> tuple[float, float]:
    """How many bytes the file may have, and the error that is good enough."""
    if recipe.target_error is not None:
        return math.inf, recipe.target_error
    if recipe.target_size is None:
        return least + _ROOM * layers, 0.0
    allowed = recipe.target_size * 1e9
    if allowed < least:
        raise RecipeError(
            f"The target size of {human_bytes(allowed)} is out of reach: with every layer in 8 bits the model takes "
            f"{human_bytes(least)}; raise the target."
        )
    return allowed, 0.0


def _decision(name: str, taken: Mapping[str, _Option], before: Decision) -> Decision:
    if name not in taken:
        return before
    if taken[name].format is None:
        return Decision("keep", "measured: what it saves is not worth its error")
    return Decision("quantize", format=taken[name].format)


def _thinned(curve: list[tuple[int, float]], chosen: tuple[int, float]) -> tuple[tuple[int, float], ...]:
    step = max(1, len(curve) // _POINTS)
    return tuple(sorted({*curve[::step], curve[-1], chosen}))
