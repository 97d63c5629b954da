"""Fixtures of sequential rounding: no call of a model may outlive its test."""

import threading

import pytest
import torch

from . import models


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def twice_as_wide(monkeypatch):
    """Models whose layers have enough channels for what the solvers choose to differ between layers and seeds."""
    monkeypatch.setattr(models, "WIDTH", 2 * models.WIDTH)


@pytest.fixture(autouse=True)
def _no_threads_left():
    yield
    threads = [thread for thread in threading.enumerate() if thread.name == "learned-rounding-call"]
    for thread in threads:  # one that is told to end may need a moment
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
