"""Fixtures of sequential rounding: no call of a model may outlive its test."""

import threading

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _no_threads_left():
    yield
    threads = [thread for thread in threading.enumerate() if thread.name == "learned-rounding-call"]
    for thread in threads:  # one that is told to end may need a moment
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
