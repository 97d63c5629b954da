"""Optimizers and learning rate schedules of gradient-based rounding."""

import sys

import pytest
import torch

from learned_rounding.quant_core.errors import MissingPackageError
from learned_rounding.quant_core.rounding.optimizers import OPTIMIZERS, SCHEDULES, Original, set_mode


def parameter(values) -> torch.Tensor:
    return torch.tensor(values).requires_grad_()


def rates(schedule: str, *steps: tuple[bool, int]) -> list[float]:
    """Learning rates after each step (improved, since), from the rate 1."""
    optimizer = torch.optim.SGD([parameter([0.0])], lr=1.0)
    running = SCHEDULES[schedule](optimizer)
    found = []
    for step in steps:
        running.step(*step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_a_step_has_the_length_of_the_learning_rate_along_the_gradient():
    x = parameter([1.0, 2.0, 3.0, 4.0])
    x.grad = torch.tensor([3.0, 0.0, -4.0, 0.0])
    Original([x], lr=0.5).step()
    # √4 · 0.5 · g/‖g‖: the root mean square of the step is 0.5.
    torch.testing.assert_close(x.detach(), torch.tensor([0.4, 2.0, 3.8, 4.0]))


def test_without_a_gradient_there_is_no_step():
    x = parameter([1.0, 2.0])
    x.grad = torch.zeros(2)
    Original([x], lr=0.5).step()
    assert x.tolist() == [1, 2]


def test_schedules_of_optimizers_exist(subtests):
    for name, choice in OPTIMIZERS.items():
        with subtests.test(name):
            assert choice.schedule in SCHEDULES


def test_every_optimizer_lowers_a_quadratic(subtests):
    for name, choice in OPTIMIZERS.items():
        x = parameter([3.0, -2.0])
        optimizer = choice.make([x], lr=choice.lr)
        set_mode(optimizer, "train")
        for _ in range(60):
            optimizer.zero_grad()
            x.square().sum().backward()
            optimizer.step()
        set_mode(optimizer, "eval")
        with subtests.test(name):
            assert float(x.detach().square().sum()) < 0.9 * 13


def test_no_optimizer_decays_weights(subtests):
    """Decay would pull every weight towards its lower neighbour."""
    for name in ("adamw", "radam", "original"):
        x = parameter([3.0])
        x.grad = torch.zeros(1)
        OPTIMIZERS[name].make([x], lr=0.1).step()
        with subtests.test(name):
            assert x.item() == 3


def test_the_missing_package_is_named(monkeypatch, sentences):
    monkeypatch.setitem(sys.modules, "prodigyplus.prodigy_plus_schedulefree", None)
    with sentences.raises(MissingPackageError):
        OPTIMIZERS["prodigy"].make([parameter([1.0])], lr=1.0)


def test_optimizers_without_modes_are_left_alone():
    set_mode(torch.optim.SGD([parameter([0.0])], lr=1.0), "eval")


def test_adaptive_rates_grow_on_a_new_best_and_the_more_the_longer_it_took():
    assert rates("adaptive", (True, 0)) == [1.25]
    assert rates("adaptive", (True, 60)) == [1.375]
    assert rates("adaptive", (True, 10**6)) == [3.0]


def test_adaptive_rates_shrink_otherwise_and_the_less_the_longer_it_takes():
    assert rates("adaptive", (False, 1)) == [0.95]
    assert rates("adaptive", (False, 60)) == [0.985]
    assert rates("adaptive", (False, 10**6)) == [0.995]


def test_exponential_rates_halve_in_200_steps():
    assert rates("exponential", *[(True, 0)] * 200)[-1] == pytest.approx(0.5)


def test_plateau_rates_fall_after_every_ten_steps_without_a_new_best():
    steps = [(False, since) for since in range(1, 21)]
    assert rates("plateau", *steps) == pytest.approx([1.0] * 9 + [0.95] * 10 + [0.95**2])


def test_plateau_rates_stay_on_a_new_best():
    assert rates("plateau", (True, 10)) == [1.0]
