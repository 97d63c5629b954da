"""Waiting for a thread while the cancellation check runs."""

from concurrent.futures import Future

import pytest

from learned_rounding.quant_core import cancellation
from learned_rounding.quant_core.cancellation import wait_for


class Cancelled(Exception):
    pass


def cancel():
    raise Cancelled


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch):
    monkeypatch.setattr(cancellation, "_POLL", 0.001)


def test_a_finished_result_is_returned_without_a_check():
    done = Future()
    done.set_result(7)
    assert wait_for(done, cancel) == 7


def test_the_check_runs_until_the_result_is_there():
    waiting, calls = Future(), []

    def check():
        calls.append(1)
        if len(calls) == 3:
            waiting.set_result("done")

    assert wait_for(waiting, check) == "done"
    assert len(calls) == 3


def test_the_check_can_cancel_the_wait():
    with pytest.raises(Cancelled):
        wait_for(Future(), cancel)


def test_an_error_of_the_thread_is_raised():
    failed = Future()
    failed.set_exception(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        wait_for(failed, cancel)
