"""Mixed precision: the formats of format "measured", from the output error of every layer in every candidate format.

The cost of a candidate (:mod:`.candidates`) is the squared relative error of the layer's output times the layer's sensitivity,
which is the effect of such an error on the output of the model. :mod:`.allocation` chooses among them.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from ..calibration import Calibration
from ..cancellation import CancelCheck
from ..display import human_bytes, three_digits
from ..errors import NothingToQuantizeError, RecipeError
from ..events import Listener
from ..recipes import Decision, Plan, Recipe
from ..recipes.plan import Choice
from ..recipes.presets import COMMON
from ..sources import Source
from ..workers import TaskPool
from .allocation import Allocation, Budget, Option, Point, allocate
from .candidates import EIGHT_BITS, LayerMeter, find_candidates
from .card_times import CardTimes, find_card
from .estimate import tensor_size
from .loop import weight_device

__all__ = ["allocate_formats"]

_MARGIN = 0.05  # without a target, unquantized layers may add this fraction of the size of all layers in 8 bits
_CURVE_POINTS = 40  # in the report


def allocate_formats(
    source: Source,
    recipe: Recipe,
    calibration: Calibration,
    *,
    pool: TaskPool,
    device: torch.device,
    emit: Listener,
    check: CancelCheck,
    general: bool | None = None,
) -> Plan:
    """``recipe.plan(source)`` with a measured format for every layer.

    Layers that only the preset skips are candidates too if the calibration has their sensitivities.

    Args:
        pool: devices that measure the layers.
        device: the first of them, whose times count.
        general: see :func:`~..recipes.make_plan`.

    Raises:
        RecipeError: the target size is smaller than the smallest possible file, or the target time shorter than possible, or
            the card's times are not known.
        NothingToQuantizeError: the target is so large that no layer is quantized.
    """
    times = find_card(recipe.card, device, measure=recipe.target_time is not None)
    plan = recipe.plan(source, general=general, check=check)
    names = _candidate_layers(source, recipe, plan, calibration, check)
    sensitivities = {name: known for name in names if (known := _sensitivity(calibration, name)) is not None}
    default = statistics.median(sensitivities.values()) if sensitivities else 1 / max(len(names), 1)
    capability = recipe.find_capability(device)
    eight_bits = _size_in_eight_bits(source, recipe, plan, names)
    smaller = recipe.target_size is not None and recipe.target_size * 1e9 < eight_bits
    candidates = find_candidates(recipe, capability, few_bits=smaller or recipe.target_error is not None)
    reading = weight_device(source, pool, device)
    meter = LayerMeter(source, recipe, calibration, candidates, capability, times, pool, reading, check)
    wanted = {name: sensitivities.get(name, default) for name in names}
    options = dict(meter.measure(wanted, emit))
    others = (name for name in plan.output_names() if name not in options)
    fixed = sum(tensor_size(name, source.tensors[name], recipe, plan) for name in others)
    warnings = plan.warnings
    if times and recipe.target_time is not None:
        warnings = (*warnings, *_warn_of_unmeasured(times, options))
        options = _keep_measured(times, source, options)
    allocation = _allocate(options, recipe, fixed)
    decisions = {name: _decide(name, allocation.chosen, decision) for name, decision in plan.decisions.items()}
    if all(decision.action != "quantize" for decision in decisions.values()):
        raise NothingToQuantizeError(
            f"The target has room for all of {source.name} unquantized; choose a smaller target size or a larger target error."
        )
    choice = _describe(allocation, fixed, options, times, sensitive=bool(sensitivities))
    return replace(plan, decisions=decisions, choice=choice, warnings=warnings)


def _candidate_layers(
    source: Source, recipe: Recipe, plan: Plan, calibration: Calibration, check: CancelCheck
) -> list[str]:
    """Matrices that the plan quantizes, and those with a known sensitivity that only the preset skips."""
    eligible = set(recipe.plan(source, preset=COMMON, general=True, check=check).names("quantize"))

    def is_candidate(name: str, action: str) -> bool:
        if len(source.tensors[name].shape) > 2:  # banks of experts have a format of the plan
            return False
        if action == "quantize":
            return True
        return action == "keep" and name in eligible and _sensitivity(calibration, name) is not None

    return [name for name, decision in plan.decisions.items() if is_candidate(name, decision.action)]


def _sensitivity(calibration: Calibration, name: str) -> float | None:
    return calibration.sensitivity(name.removesuffix(".weight"))


def _size_in_eight_bits(source: Source, recipe: Recipe, plan: Plan, names: Iterable[str]) -> int:
    """Bytes of the file with every candidate layer in the first of the formats of 8 bits."""
    quantized = set(names)
    codec = EIGHT_BITS[0].codec
    return sum(
        sum(spec.nbytes for spec in codec.file_specs(source.tensors[name].shape).values())
        if name in quantized
        else tensor_size(name, source.tensors[name], recipe, plan)
        for name in plan.output_names()
    )


def _warn_of_unmeasured(times: CardTimes, options: Mapping[str, list[Option]]) -> list[str]:
    """A sentence on the formats that the target time leaves out, if there are any."""
    missing = {
        str(option.format) for its in options.values() for option in its if option.format and option.time is None
    }
    names = ", ".join(sorted(missing))
    return [f"Not measured on {times.card}, so not used within the target time: {names}."] if missing else []


def _keep_measured(times: CardTimes, source: Source, options: Mapping[str, list[Option]]) -> dict[str, list[Option]]:
    """The options with a time. Raises :class:`RecipeError` for a layer whose unquantized time is not known."""
    for name, its in options.items():
        if its[0].time is None:
            shape = "×".join(map(str, source.tensors[name].shape))
            raise RecipeError(
                f"target_time needs the time of a layer of {shape} on {times.card}, which was not measured; run lrq bench "
                f"MODEL --json there with this model and add the file here with lrq bench --add.",
                option="target_time",
            )
    return {name: [option for option in its if option.time is not None] for name, its in options.items()}


def _allocate(options: Mapping[str, list[Option]], recipe: Recipe, fixed: int) -> Allocation:
    """The allocation that the recipe asks for; ``fixed``: bytes of other tensors.

    Raises:
        RecipeError: there is none.
    """
    least = sum(min(option.size for option in its) for its in options.values())
    budget = _make_budget(recipe, options, least, fixed)
    allocation = allocate(options, budget)
    if recipe.target_time is not None and not allocation.keeps(budget):
        time, other = (
            allocation.point.time / _unquantized_time(options),
            "size" if recipe.target_error is None else "error",
        )
        raise RecipeError(
            f"No formats keep both the target time of {recipe.target_time:g} and the target {other}: the nearest take {three_digits(time)} of "
            f"the time of bfloat16 at an error of {three_digits(allocation.point.error)}; raise one of them.",
            option="target_time",
        )
    return allocation


def _make_budget(recipe: Recipe, options: Mapping[str, list[Option]], least: int, fixed: int) -> Budget:
    """``least``: bytes of the layers in the smallest possible file; ``fixed``: those of other tensors."""
    time = math.inf if recipe.target_time is None else recipe.target_time * _unquantized_time(options)
    if recipe.target_error is not None:
        return Budget(error=recipe.target_error, time=time)
    if recipe.target_size is None:
        return Budget(size=least + _MARGIN * least, time=time)
    allowed = recipe.target_size * 1e9
    if allowed < least + fixed:
        raise RecipeError(
            f"The target size of {human_bytes(allowed)} is too small: the smallest possible file takes "
            f"{human_bytes(least + fixed)}; raise the target."
        )
    return Budget(size=allowed - fixed, time=time)


def _unquantized_time(options: Mapping[str, list[Option]]) -> float:
    """Time of all layers in ms in bfloat16."""
    return sum(its[0].time or 0.0 for its in options.values())


def _decide(name: str, chosen: Mapping[str, Option], planned: Decision) -> Decision:
    if name not in chosen:
        return planned
    if chosen[name].format is None:
        return Decision(action="keep", reason="mixed precision: the bytes saved are not worth the error")
    return Decision(action="quantize", format=chosen[name].format)


def _describe(
    allocation: Allocation, fixed: int, options: Mapping[str, list[Option]], times: CardTimes | None, *, sensitive: bool
) -> Choice:
    """The curve of the report, with times where every layer has one in every format."""
    point = allocation.point
    curve = _thin_out(allocation.curve, point)
    timed = times is not None and all(option.time is not None for its in options.values() for option in its)
    whole = _unquantized_time(options) if timed else 0.0
    return Choice(
        curve=tuple((fixed + each.size, each.error) for each in curve),
        chosen=(fixed + point.size, point.error),
        sensitive=sensitive,
        times=tuple(each.time / whole for each in curve) if whole else (),
        time=point.time / whole if whole else None,
        card=times.card if times and whole else "",
    )


def _thin_out(curve: list[Point], chosen: Point) -> list[Point]:
    """Some points, the first, the last and the chosen one among them, in order of size."""
    step = max(1, len(curve) // _CURVE_POINTS)
    others = {point for point in (*curve[::step], curve[-1]) if point.size != chosen.size}
    return sorted((*others, chosen), key=lambda point: point.size)
