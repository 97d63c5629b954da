"""Bit allocation: the least error within a size and a time, and the least size within an error and a time."""

import itertools
import math
import random

import pytest

from learned_rounding.quant_core.run.allocation import Budget, Option, allocate


def make_options(seed: int, layers: int = 5) -> dict[str, list[Option]]:
    """Layers of several sizes: unquantized, two of 8 bits, and two of 4 bits of which one is fast and bad."""
    draw, made = random.Random(seed), {}
    for index in range(layers):
        size, cost = draw.choice([100, 200, 400]), 10 ** draw.uniform(-4, -1)
        near, time = (lambda value: value * draw.uniform(0.8, 1.25)), size / 100
        made[f"layer{index}"] = [
            Option(2 * size, 0.0, time=time),
            Option(size, near(0.3 * cost), time=near(0.6) * time),
            Option(size + 5, near(0.2 * cost), time=near(0.65) * time),
            Option(size // 2 + 3, near(5 * cost), time=near(0.65) * time),
            Option(size // 2, near(20 * cost), time=near(0.45) * time),
        ]
    return made


def total(options, attribute: str) -> float:
    return sum(getattr(option, attribute) for option in options)


def combine(options) -> list[tuple[float, float, float]]:
    """(cost, size, time) of every combination."""
    return [
        tuple(total(chosen, attribute) for attribute in ("cost", "size", "time"))
        for chosen in itertools.product(*options.values())
    ]


def least_cost(combinations, budget: Budget) -> float | None:
    within = (cost for cost, size, time in combinations if size <= budget.size and time <= budget.time)
    return min(within, default=None)


def sizes_and_times(options):
    """Some budgets, from tight to wide."""
    least, most = (
        sum(pick(its, key=lambda option: option.size).size for its in options.values()) for pick in (min, max)
    )
    whole = sum(its[0].time for its in options.values())
    for size, time in itertools.product((0.1, 0.3, 0.6, 1.0), (0.5, 0.62, 0.7, 0.8, 1.0)):
        yield Budget(size=least + size * (most - least), time=time * whole)


def test_curve_is_convex_and_ends_unquantized(subtests):
    for seed in range(4):
        with subtests.test(seed=seed):
            curve = allocate(make_options(seed), Budget(error=10.0)).curve
            saved = [(a.error**2 - b.error**2) / (b.size - a.size) for a, b in itertools.pairwise(curve)]
            assert min(saved) > 0
            assert saved == pytest.approx(sorted(saved, reverse=True))
            assert curve[-1].error == pytest.approx(0, abs=1e-6)


def test_every_point_of_the_curve_is_found_by_its_size(subtests):
    for seed in range(4):
        with subtests.test(seed=seed):
            options = make_options(seed)
            for point in allocate(options, Budget(error=10.0)).curve:
                for spare in (0, 1):  # bytes that buy nothing, or something of little use
                    taken = allocate(options, Budget(size=point.size + spare)).point
                    assert taken.size <= point.size + spare
                    assert taken.error <= point.error + 1e-9


def test_an_error_is_reached_with_the_next_point_of_the_curve(subtests):
    for seed in range(4):
        with subtests.test(seed=seed):
            options = make_options(seed)
            curve = allocate(options, Budget(error=10.0)).curve
            for worse, point in itertools.pairwise(curve[:-1]):
                taken = allocate(options, Budget(error=(worse.error + point.error) / 2)).point
                assert taken.size == point.size
                assert taken.error == pytest.approx(point.error)


def test_size_and_time_are_kept_wherever_any_allocation_keeps_them():
    kept, missed, ratios = 0, 0, []
    for seed in range(12):
        options = make_options(seed)
        combinations = combine(options)
        for budget in sizes_and_times(options):
            best, made = least_cost(combinations, budget), allocate(options, budget)
            assert made.point.size <= budget.size
            assert made.keeps(budget) is (made.point.time <= budget.time)
            if made.keeps(budget):
                kept += 1
                ratios.append(math.sqrt(total(made.chosen.values(), "cost") / best) if best else 1.0)
                assert best is not None
            else:
                missed += best is not None
    # The hull leaves out allocations: those within it may need a little more time, or have a little more error.
    assert kept > 100
    assert missed < 0.1 * kept
    assert sorted(ratios)[len(ratios) // 2] < 1.02
    assert sorted(ratios)[int(0.9 * len(ratios))] < 1.4


def test_less_time_costs_error():
    options = make_options(1, layers=40)
    whole, size = sum(its[0].time for its in options.values()), sum(its[1].size for its in options.values())
    points = [allocate(options, Budget(size=1.1 * size, time=time * whole)).point for time in (1.0, 0.65, 0.6, 0.55)]
    assert all(point.time <= time * whole for point, time in zip(points, (1.0, 0.65, 0.6, 0.55), strict=True))
    errors = [point.error for point in points]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


def test_error_and_time_are_kept_together_or_the_allocation_reports_that_it_keeps_neither():
    options = make_options(2, layers=40)
    whole, easy = sum(its[0].time for its in options.values()), allocate(options, Budget(error=0.3)).point
    budget = Budget(error=0.3, time=0.98 * easy.time)
    made = allocate(options, budget)
    assert made.keeps(budget)
    assert made.point.size >= easy.size
    assert not allocate(options, Budget(error=1e-3, time=0.5 * whole)).keeps(Budget(error=1e-3, time=0.5 * whole))


def test_options_without_times_are_allocated_by_size_alone():
    timed = make_options(3)
    plain = {name: [Option(option.size, option.cost) for option in its] for name, its in timed.items()}
    size = sum(its[1].size for its in timed.values())
    taken = [allocate(options, Budget(size=size)).point for options in (timed, plain)]
    assert taken[0].size == taken[1].size
    assert taken[0].error == taken[1].error
    assert taken[1].time == 0


def test_of_equal_options_the_first_is_taken():
    option = Option(10, 1.0, time=1.0)
    assert allocate({"a": [option, Option(10, 1.0, time=1.0)]}, Budget(size=10)).chosen["a"] is option
