"""Pools: the order of tasks, results and errors, devices that fail, and the end."""

import os
import sys
from traceback import extract_stack

import psutil
import pytest
import torch

from learned_rounding.quant_core.errors import QuantizationError, RecipeError
from learned_rounding.quant_core.workers import InProcess, WorkerPool, open_pool
from learned_rounding.tests.quant_core.workers.tasks import (
    Add,
    CheckForever,
    Die,
    DieAlways,
    Fail,
    Gate,
    Hold,
    NeedMemory,
    process_id,
)

DEVICES = [torch.device("cpu", index) for index in range(2)]
WAIT = 120  # s


def ignore(event) -> None:
    """Listener, and cancellation check."""


def never() -> None:
    """Cancellation check."""


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(DEVICES, ignore) as opened:
        yield opened


def test_one_device_does_a_task_at_once_in_this_process():
    with open_pool(DEVICES[:1], ignore, never) as opened:
        assert opened.submit(Add(torch.ones(1)), 4).done()


def test_one_device_keeps_an_error_for_who_asks():
    future = InProcess(DEVICES[0], ignore, never).submit(Fail(), 0)
    assert isinstance(future.exception(), RecipeError)


def test_several_devices_are_processes_of_their_own(pool):
    assert pool.submit(process_id, 0).result(WAIT) in pool.pids


def test_results_come_back(pool):
    assert pool.submit(Add(torch.arange(3)), 24).result(WAIT).tolist() == [1, 2, 3]


def test_errors_come_back(pool):
    with pytest.raises(RecipeError, match="no such format"):
        pool.submit(Fail(), 0).result(WAIT)


@pytest.mark.soak  # starts processes
def test_a_task_that_cannot_be_pickled_is_an_error_of_its_own():
    class Local:
        """Cannot be pickled: it is not the attribute of a module."""

    with WorkerPool(DEVICES, ignore) as pool:
        with pytest.raises((AttributeError, TypeError), match="pickle"):
            pool.submit(Local(), 0).result(WAIT)
        assert pool.submit(process_id, 0).result(WAIT)


@pytest.mark.soak  # starts processes
def test_a_task_during_which_two_devices_are_lost_is_an_error_of_its_own(tmp_path, sentences):
    with WorkerPool([torch.device("cpu", index) for index in range(3)], ignore) as pool:
        with sentences.raises(QuantizationError):
            pool.submit(DieAlways(), 0).result(WAIT)
        assert pool.submit(process_id, 0).result(WAIT) in pool.pids


@pytest.mark.soak  # starts processes
def test_a_listener_that_fails_does_not_stop_the_others():
    def fail(event) -> None:
        raise ValueError("the listener")

    with WorkerPool(DEVICES[:1], fail) as pool:
        assert isinstance(pool.submit(Add(torch.ones(1)), 4).exception(WAIT), QuantizationError)


def test_names_of_the_devices_are_those_given(pool):
    assert pool.devices == "cpu:0, cpu:1"


@pytest.mark.soak  # starts processes
def test_the_largest_waiting_task_is_next():
    with WorkerPool(DEVICES[:1], ignore, ahead=1) as pool, Gate() as gate:
        pool.submit(Hold(gate.port, "first"), 0)
        gate.arrivals(1)
        for name, size in (("small", 1), ("large", 3), ("middle", 2)):
            pool.submit(Hold(gate.port, name), size)
        order = []
        for name in ("first", "large", "middle", "small"):
            gate.release(name)
            order += gate.arrivals(1) if name != "small" else ()
        assert order == ["large", "middle", "small"]


def test_a_task_goes_to_the_device_that_has_less_to_do(pool):
    with Gate() as gate:
        futures = [pool.submit(Hold(gate.port, name), 0) for name in "ab"]
        assert gate.arrivals(2) == {"a", "b"}  # each device has one; none waits behind the other
        for name in "ab":
            gate.release(name)
        assert {future.result(WAIT) for future in futures} == {"a", "b"}


def test_too_little_memory_on_one_device_is_tried_on_the_other_and_then_with_the_cpu(pool, tmp_path):
    assert pool.submit(NeedMemory(tmp_path), 0).result(WAIT) is True
    tried = sorted(path.name.partition(" ")[2] for path in tmp_path.iterdir())
    assert tried == ["False", "False", "True"]


def test_too_little_memory_is_reported_where_another_device_follows(pool, tmp_path, sentences):
    pool.take_failures()
    pool.submit(NeedMemory(tmp_path), 0).result(WAIT)
    (failure,) = pool.take_failures()
    assert not failure.lost
    sentences(str(failure).replace("cpu:1", "cpu:0"))


@pytest.mark.soak  # starts processes
def test_the_task_of_a_lost_device_is_repeated_by_another(tmp_path, sentences):
    with WorkerPool(DEVICES, ignore) as pool:
        survivor = pool.submit(Die(tmp_path / "mark"), 0).result(WAIT)
        assert [survivor] == pool.pids
        (failure,) = pool.take_failures()
        assert failure.lost
        sentences(str(failure).replace("cpu:1", "cpu:0"))


@pytest.mark.soak  # starts processes
def test_all_devices_lost_is_one_sentence(sentences):
    with WorkerPool(DEVICES, ignore) as pool, Gate() as gate:
        futures = [pool.submit(Hold(gate.port, name), 0) for name in "ab"]
        gate.arrivals(2)
        for pid in pool.pids:
            psutil.Process(pid).kill()
        with sentences.raises(QuantizationError):
            futures[0].result(WAIT)
        assert futures[1].exception(WAIT) is not None
        assert isinstance(pool.submit(process_id, 0).exception(WAIT), QuantizationError)


@pytest.mark.soak  # starts processes
def test_threads_work_until_the_processes_are_ready():
    with WorkerPool(DEVICES, ignore, threads=True) as pool:
        found = [pool.submit(process_id, 0).result(WAIT)]
        assert found == [os.getpid()]
        while len(set(found)) < 3:
            found.append(pool.submit(process_id, 0).result(WAIT))
        assert set(found) == {os.getpid(), *pool.pids}


@pytest.mark.soak  # starts processes
def test_an_error_in_a_thread_of_this_process_is_that_of_the_task():
    with WorkerPool(DEVICES, ignore, threads=True) as pool:
        assert isinstance(pool.submit(Fail(), 0).exception(WAIT), RecipeError)


@pytest.mark.soak  # starts processes
def test_a_task_that_this_process_has_no_memory_for_is_for_another(tmp_path):
    with WorkerPool(DEVICES, ignore, threads=True) as pool:
        assert pool.submit(NeedMemory(tmp_path), 0).result(WAIT) is True
    ours = str(os.getpid())
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(ours)} == {f"{ours} False"}


@pytest.mark.soak  # starts processes
def test_the_end_stops_the_threads():
    with WorkerPool(DEVICES, ignore, threads=True) as pool:
        future = pool.submit(CheckForever(), 0)
    assert not future.done()
    assert "_work_here" not in {
        frame.name for stack in sys._current_frames().values() for frame in extract_stack(stack)
    }


@pytest.mark.soak  # starts processes
def test_the_end_does_not_wait_for_tasks():
    with Gate() as gate:
        with WorkerPool(DEVICES, ignore) as pool:
            pids = pool.pids
            for name in "ab":
                pool.submit(Hold(gate.port, name), 0)
            gate.arrivals(2)
        assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.soak  # starts processes
def test_a_device_that_cannot_start_leaves_no_process(monkeypatch):
    started = []
    from learned_rounding.quant_core.workers import pool as module

    def start(device, slots):
        if started:
            raise OSError("no more processes")
        started.append(module_process(device, slots))
        return started[0]

    module_process = module.WorkerProcess
    monkeypatch.setattr(module, "WorkerProcess", start)
    with pytest.raises(OSError, match="no more processes"):
        WorkerPool(DEVICES, ignore)
    assert not psutil.pid_exists(started[0].pid)
