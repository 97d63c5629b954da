"""Bit allocation: one option for each layer, of least error within a size and a time, or of least size within an error and a time.

Errors of different layers are assumed to add up like independent noise, so the best allocation within a size takes the steps
with the largest decrease in error per byte (Lagrange multipliers over the convex hull of each layer: Shoham & Gersho, Efficient
Bit Allocation for an Arbitrary Set of Quantizers, 1988). A time within which the layers must run is a second constraint with a
multiplier of its own (Everett, Generalized Lagrange Multiplier Method, 1963): every ms counts as so much error, and the smallest
such price that keeps the time is found by bisection.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..formats import FormatConfig

__all__ = ["Allocation", "Budget", "Option", "Point", "allocate"]

_GROWTH = 8.0  # factor of the price of time until the time is kept
_PRECISION = 1.0001  # factor between a price that keeps the time and one that does not, at the end
_ROUNDS = 64  # of growth and bisection, at most


@dataclass(frozen=True)
class Option:
    """One way to store a layer.

    Attributes:
        size: bytes in the file.
        cost: contribution to the squared relative error of the model output.
        format: format of the layer, None for unquantized.
        time: of a call in ms; None where it is not measured.
    """

    size: int
    cost: float
    format: FormatConfig | None = None
    time: float | None = None


@dataclass(frozen=True)
class Budget:
    """What an allocation may take.

    Attributes:
        size: largest size of all layers in bytes.
        error: relative error of the model output, below which no more bytes are spent; 0: as many as ``size`` allows.
        time: largest time of all layers in ms; every option must have a time then.
    """

    size: float = math.inf
    error: float = 0.0
    time: float = math.inf


@dataclass(frozen=True)
class Point:
    """Size of all layers in bytes, relative error of the model output, and time of all layers in ms, 0 where not measured."""

    size: int
    error: float
    time: float


@dataclass(frozen=True)
class Allocation:
    """The option of each layer, where it is on the curve, and the curve from the smallest size to the least error."""

    chosen: dict[str, Option]
    point: Point
    curve: list[Point]

    def keeps(self, budget: Budget) -> bool:
        """Whether the allocation is within the budget."""
        reached = budget.error == 0 or self.point.error <= budget.error
        return reached and self.point.size <= budget.size and self.point.time <= budget.time


def allocate(options: Mapping[str, list[Option]], budget: Budget) -> Allocation:
    """Choose an option for each layer.

    Returns:
        The allocation, which :meth:`Allocation.keeps` the budget if one of those on the convex hulls does.
    """
    result = _walk(options, 0.0, budget)
    if result.point.time <= budget.time:
        return result
    best, low, high, price = None, 0.0, math.inf, _first_price(options)
    for _ in range(_ROUNDS):
        result = _walk(options, price, budget)
        if result.point.time > budget.time:
            low = price
        else:
            high = price
            best = result if best is None or result.keeps(budget) else best
        if high < low * _PRECISION:
            break
        if high == math.inf:
            price = low * _GROWTH
        elif low:
            price = math.sqrt(low * high)
        else:
            price = high / _GROWTH
    return best or result


def _first_price(options: Mapping[str, list[Option]]) -> float:
    """A price of time at which it hardly counts: a billionth of the largest error per ms of the slowest options."""
    cost = sum(max(option.cost for option in its) for its in options.values())
    time = sum(max(option.time or 0.0 for option in its) for its in options.values())
    return 1e-9 * max(cost, 1e-30) / max(time, 1e-30)


def _walk(options: Mapping[str, list[Option]], price: float, budget: Budget) -> Allocation:
    """The best allocation within the size and error of the budget; ``price``: squared error that a ms counts as."""
    hulls = {name: _lower_hull(its, price) for name, its in options.items()}
    steps = sorted(
        ((name, smaller, larger) for name, hull in hulls.items() for smaller, larger in itertools.pairwise(hull)),
        key=lambda step: -_slope(step[1], step[2], price),
    )
    chosen = {name: hull[0] for name, hull in hulls.items()}
    point = Point(
        sum(option.size for option in chosen.values()),
        math.sqrt(sum(option.cost for option in chosen.values())),
        sum(option.time or 0.0 for option in chosen.values()),
    )
    curve = [point]
    finished: set[str] = set()  # layers with a step that was too large: their further steps do not apply
    for name, smaller, larger in steps:
        curve.append(_advance(curve[-1], smaller, larger))
        more = larger.size - smaller.size
        if point.error <= budget.error or name in finished or point.size + more > budget.size:
            finished.add(name)
        else:
            chosen[name], point = larger, _advance(point, smaller, larger)
    return Allocation(chosen, point, curve)


def _advance(point: Point, smaller: Option, larger: Option) -> Point:
    """The point after one step of a layer."""
    cost = max(point.error**2 + larger.cost - smaller.cost, 0.0)
    time = point.time + (larger.time or 0.0) - (smaller.time or 0.0)
    return Point(point.size + larger.size - smaller.size, math.sqrt(cost), time)


def _weigh(option: Option, price: float) -> float:
    """Cost of an option with that of its time."""
    return option.cost + price * (option.time or 0.0)


def _lower_hull(options: list[Option], price: float) -> list[Option]:
    """The lower convex hull of (size, weighed cost) from the smallest size on; of equal options the first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.size, _weigh(option, price))):
        if hull and _weigh(option, price) >= _weigh(hull[-1], price):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1], price) <= _slope(hull[-1], option, price):
            hull.pop()
        hull.append(option)
    return hull


def _slope(smaller: Option, larger: Option, price: float) -> float:
    """Decrease in weighed cost per byte."""
    return (_weigh(smaller, price) - _weigh(larger, price)) / (larger.size - smaller.size)
