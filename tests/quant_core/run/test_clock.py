"""Elapsed time and ETA of a run."""

import time

import pytest

from learned_rounding.quant_core.run.clock import Clock


@pytest.fixture
def now(monkeypatch):
    """now(seconds) sets the time since the clock started."""
    current = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: current[0])
    return lambda seconds: current.__setitem__(0, 100.0 + seconds)


def test_elapsed_time_is_counted_from_the_start(now):
    clock = Clock(10)
    now(2.5)
    assert clock.elapsed == 2.5


def test_eta_follows_from_the_bytes_per_second_so_far(now):
    clock = Clock(100)
    now(2.0)
    assert clock.advance(20) == 8.0
    now(10.0)
    assert clock.advance(30) == 10.0


def test_eta_is_zero_at_the_end_and_before_the_first_byte(now):
    clock = Clock(100)
    now(5.0)
    assert clock.advance(0) == 0.0
    assert clock.advance(100) == 0.0


def test_resumed_bytes_are_excluded_from_the_eta(now):
    clock = Clock(100)
    clock.exclude(60)
    now(2.0)
    assert clock.advance(20) == 2.0
