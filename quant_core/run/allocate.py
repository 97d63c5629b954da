"""Mixed precision: the bit allocation of format "measured", from the output error of every layer in every candidate format.

Each layer is quantized in every candidate format and run on its validation activations, quantized as ComfyUI quantizes them.
The cost of a candidate is the squared relative error of the layer's output times the layer's sensitivity, which is the effect
of such an error on the output of the model. Errors of different layers are assumed to add up like independent noise, so the
best allocation within a size takes the steps with the largest decrease in error per byte (Lagrange multipliers over the
convex hull of each layer: Shoham & Gersho, Efficient Bit Allocation for an Arbitrary Set of Quantizers, 1988).

Formats of 4 bits are candidates where the target asks for less than 8 bits. They are measured with the rounding of the run:
calibrated rounding halves their error and leaves that of 8 bits nearly as it is. W6A8 is not a candidate, since stock ComfyUI 0.33 does not
read it.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ..calibration import Calibration, LayerStatistics
from ..cancellation import CancelCheck
from ..display import human_bytes
from ..errors import NonFiniteWeightError, NothingToQuantizeError, RecipeError
from ..events import LayerMeasured, Listener
from ..formats import GROUP_SIZES, FormatConfig
from ..layer import Layer, output_error
from ..quantize_layer import quantize_layer
from ..recipes import Decision, Plan, Recipe
from ..recipes.plan import Choice
from ..recipes.presets import COMMON
from ..rounding import RoundingConfig
from ..sources import Source
from .estimate import tensor_size

__all__ = ["allocate_formats"]

_MARGIN = 0.05  # without a target, unquantized layers may add this fraction of the size of all layers in 8 bits
_CURVE_POINTS = 40  # in the report
_MAX_ROWS = 512  # of validation activations
_EIGHT_BITS = (
    FormatConfig("int8_tensorwise", "row"),
    *(FormatConfig("int8_tensorwise", "row", convrot=size) for size in GROUP_SIZES),
    FormatConfig("float8_e4m3fn", "tensor"),
)
_FEW_BITS = tuple(FormatConfig(name) for name in ("asym_w4a8_int8", "nvfp4", "convrot_w4a4"))
_NATIVE = (FormatConfig("mxfp8"),)  # of no use on cards that do not multiply them
_BLOCK_CANDIDATES = (FormatConfig("int8_blockwise", "block"), FormatConfig("float8_e4m3fn_blockwise", "block"))

Point = tuple[int, float]
"""Size of the file in bytes, and relative error of the model output."""


@dataclass(frozen=True)
class _Option:
    """One way to store a layer.

    Attributes:
        size: bytes in the file.
        cost: contribution to the squared relative error of the model output.
        format: format of the layer, None for unquantized.
    """

    size: int
    cost: float
    format: FormatConfig | None = None


def allocate_formats(
    source: Source,
    recipe: Recipe,
    calibration: Calibration,
    *,
    device: torch.device,
    emit: Listener,
    check: CancelCheck,
    general: bool | None = None,
) -> Plan:
    """``recipe.plan(source)`` with a measured format for every layer.

    Layers that only the preset skips are candidates too if the calibration has their sensitivities.

    Raises:
        RecipeError: the target size is smaller than the smallest possible file.
        NothingToQuantizeError: the target is so large that no layer is quantized.
    """
    plan = recipe.plan(source, general=general, check=check)
    names = _candidate_layers(source, recipe, plan, calibration, check)
    sensitivities = {name: known for name in names if (known := _sensitivity(calibration, name)) is not None}
    default = statistics.median(sensitivities.values()) if sensitivities else 1 / max(len(names), 1)
    candidates = _find_candidates(recipe, device, _size_in_eight_bits(source, recipe, plan, names))
    options: dict[str, list[_Option]] = {}
    for index, name in enumerate(names):
        check()
        emit(LayerMeasured(index=index, total=len(names), name=name))
        known = calibration.layer_statistics(name.removesuffix(".weight")) or LayerStatistics()
        measured = _measure_options(
            source, name, recipe, candidates, known, sensitivities.get(name, default), device, check
        )
        options[name] = _lower_hull(measured)
    others = (name for name in plan.output_names() if name not in options)
    fixed = sum(tensor_size(name, source.tensors[name], recipe, plan) for name in others)
    chosen, curve = _allocate(options, recipe, fixed)
    decisions = {name: _decide(name, chosen, decision) for name, decision in plan.decisions.items()}
    if all(decision.action != "quantize" for decision in decisions.values()):
        raise NothingToQuantizeError(
            f"The target has room for all of {source.name} unquantized; choose a smaller target size or a larger target error."
        )
    point = next(point for point in curve if point[0] == fixed + _total_size(chosen.values()))
    choice = Choice(curve=_thin_out(curve, point), chosen=point, sensitive=bool(sensitivities))
    return replace(plan, decisions=decisions, choice=choice)


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


def _measure_options(
    source: Source,
    name: str,
    recipe: Recipe,
    candidates: Iterable[FormatConfig],
    known: LayerStatistics,
    sensitivity: float,
    device: torch.device,
    check: CancelCheck,
) -> list[_Option]:
    """The unquantized layer, and every candidate format that its shape allows; the former alone for NaN or Inf."""
    weight = source.read(name, device)
    matrix = weight.float()
    rows = known.validation_activations
    rows = None if rows is None else rows[:_MAX_ROWS].to(device, torch.float32)
    options = [_Option(size=source.tensors[name].nbytes, cost=0.0)]
    for choice in candidates:
        codec = choice.codecs(matrix.shape[1])[0]
        smaller = type(choice.convrot) is int and (codec.rotation is None or codec.rotation.size != choice.convrot)
        if smaller or codec.admits((matrix.shape[0], matrix.shape[1])):  # a smaller group is a candidate of its own
            continue
        try:
            size, error = _quantize(
                name, weight, matrix, choice, recipe, rows, known, _capability(recipe, device), check
            )
        except NonFiniteWeightError:
            return options
        options.append(_Option(size=size, cost=sensitivity * error**2, format=choice))
    return options


def _quantize(
    name: str,
    weight: torch.Tensor,
    matrix: torch.Tensor,
    choice: FormatConfig,
    recipe: Recipe,
    rows: torch.Tensor | None,
    known: LayerStatistics,
    capability: tuple[int, int] | None,
    check: CancelCheck,
) -> tuple[int, float]:
    """Size in bytes and relative output error of a layer in one format, with quantized activations if ``rows`` are given."""
    if choice in _FEW_BITS and known.hessian is not None:
        layer, rounding = Layer(weight, statistics=known), recipe.rounding
    else:
        hessian = known.hessian if rows is None else None
        layer = Layer(weight, statistics=LayerStatistics(hessian))
        rounding = RoundingConfig("auto" if hessian is None else "nearest")
    quantized = quantize_layer(layer, choice.codecs(weight.shape[1]), rounding, check=check)
    size = sum(tensor.nbytes for tensor in quantized.tensors(name.removesuffix(".weight")).values())
    if rows is not None:
        return size, output_error(matrix, quantized, rows, capability)
    return size, quantized.weight_error if quantized.output_error is None else quantized.output_error


def _size_in_eight_bits(source: Source, recipe: Recipe, plan: Plan, names: Iterable[str]) -> int:
    """Bytes of the file with every candidate layer in the first of the formats of 8 bits."""
    quantized = set(names)
    codec = _EIGHT_BITS[0].codec
    return sum(
        sum(spec.nbytes for spec in codec.file_specs(source.tensors[name].shape).values())
        if name in quantized
        else tensor_size(name, source.tensors[name], recipe, plan)
        for name in plan.output_names()
    )


def _find_candidates(recipe: Recipe, device: torch.device, eight_bits: int) -> tuple[FormatConfig, ...]:
    """The formats to try for every layer; ``eight_bits``: size of the file in 8 bits."""
    capability = _capability(recipe, device)
    native = capability is not None and capability >= _NATIVE[0].codec.format.native_since
    smaller = recipe.target_size is not None and recipe.target_size * 1e9 < eight_bits
    return (
        *_EIGHT_BITS,
        *(_FEW_BITS if smaller or recipe.target_error is not None else ()),
        *(_NATIVE if native else ()),
        *(_BLOCK_CANDIDATES if recipe.block_formats else ()),
    )


def _capability(recipe: Recipe, device: torch.device) -> tuple[int, int] | None:
    """Compute capability of the card that the model is for; None: not known, any."""
    if recipe.card is not None:
        major, minor = recipe.card.split(".")
        return int(major), int(minor)
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _lower_hull(options: list[_Option]) -> list[_Option]:
    """The lower convex hull of (size, cost) from the smallest size on; of equal options the first."""
    hull: list[_Option] = []
    for option in sorted(options, key=lambda option: (option.size, option.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(smaller: _Option, larger: _Option) -> float:
    """Decrease in cost per byte."""
    return (smaller.cost - larger.cost) / (larger.size - smaller.size)


def _total_size(options: Iterable[_Option]) -> int:
    return sum(option.size for option in options)


def _total_error(options: Iterable[_Option]) -> float:
    return math.sqrt(sum(option.cost for option in options))


def _allocate(
    options: Mapping[str, list[_Option]], recipe: Recipe, fixed: int
) -> tuple[dict[str, _Option], list[Point]]:
    """The option of each layer, and the curve from the smallest to the largest file; ``fixed``: bytes of other tensors."""
    chosen = {name: hull[0] for name, hull in options.items()}
    size, cost = fixed + _total_size(chosen.values()), sum(option.cost for option in chosen.values())
    max_size, target_error = _targets(recipe, size, size - fixed)
    steps = sorted(
        (
            (name, smaller, larger)
            for name, hull in options.items()
            for smaller, larger in zip(hull, hull[1:], strict=False)
        ),
        key=lambda step: -_slope(step[1], step[2]),
    )
    curve = [(size, math.sqrt(cost))]
    finished: set[str] = set()  # layers with a step that was too large: their further steps do not apply
    for name, smaller, larger in steps:
        size, cost = size + larger.size - smaller.size, max(cost + larger.cost - smaller.cost, 0.0)
        curve.append((size, math.sqrt(cost)))
        next_size = fixed + _total_size(chosen.values()) + larger.size - smaller.size
        reached = _total_error(chosen.values()) <= target_error
        if reached or name in finished or next_size > max_size:
            finished.add(name)
        else:
            chosen[name] = larger
    point = fixed + _total_size(chosen.values()), _total_error(chosen.values())
    return chosen, sorted({*curve, point})


def _targets(recipe: Recipe, least: int, layers: int) -> tuple[float, float]:
    """Largest size of the file in bytes, and the error below which no more bytes are spent.

    ``least``: size of the smallest possible file; ``layers``: bytes of its quantized layers.
    """
    if recipe.target_error is not None:
        return math.inf, recipe.target_error
    if recipe.target_size is None:
        return least + _MARGIN * layers, 0.0
    allowed = recipe.target_size * 1e9
    if allowed < least:
        raise RecipeError(
            f"The target size of {human_bytes(allowed)} is too small: the smallest possible file takes {human_bytes(least)}; "
            "raise the target."
        )
    return allowed, 0.0


def _decide(name: str, chosen: Mapping[str, _Option], planned: Decision) -> Decision:
    if name not in chosen:
        return planned
    if chosen[name].format is None:
        return Decision(action="keep", reason="mixed precision: the bytes saved are not worth the error")
    return Decision(action="quantize", format=chosen[name].format)


def _thin_out(curve: list[Point], chosen: Point) -> tuple[Point, ...]:
    step = max(1, len(curve) // _CURVE_POINTS)
    return tuple(sorted({*curve[::step], curve[-1], chosen}))
