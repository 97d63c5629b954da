"""Estimates from the table of measured throughput."""

import os

import pytest
import torch

from learned_rounding.quant_core.run.throughput import THROUGHPUT, predict_seconds

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """As many cores as the measurements on a CPU had."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def seconds(rounding: str, bits: float, parameters: float = 1e6) -> float | None:
    return predict_seconds([(int(parameters), rounding, bits)], CPU)


def test_time_is_that_of_the_measurement():
    found = THROUGHPUT["cpu", "calibrated", True]
    assert seconds("calibrated", 8) == pytest.approx(1e6 / found.parameters_per_second)


def test_time_is_proportional_to_the_parameters():
    assert seconds("auto", 8, 3e6) == pytest.approx(3 * seconds("auto", 8))


def test_times_of_layers_are_added():
    layers = [(1000, "auto", 8.0), (500, "nearest", 4.0)]
    assert predict_seconds(layers, CPU) == pytest.approx(sum(predict_seconds([layer], CPU) for layer in layers))


def test_twice_the_cores_take_half_of_the_time(monkeypatch):
    before = seconds("auto", 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert seconds("auto", 8) == pytest.approx(before / 2)


def test_fewer_bits_take_longer():
    assert seconds("calibrated", 4.5) > seconds("calibrated", 8)


def test_rounding_that_was_measured_in_one_width_is_as_fast_in_the_other():
    assert ("cpu", "principal", False) not in THROUGHPUT
    assert seconds("principal", 4) == seconds("principal", 8)


def test_rounding_that_was_not_measured_has_no_estimate():
    assert seconds("stochastic", 8) is None


def test_other_devices_have_no_estimate():
    assert predict_seconds([(1000, "auto", 8.0)], torch.device("meta")) is None


def test_every_measurement_has_a_speed_and_names_its_source():
    for key, found in THROUGHPUT.items():
        assert found.parameters_per_second > 0, key
        assert found.source, key
