"""Copies to a device and back, and jobs that run on a GPU beside the model."""

import threading

import pytest
import torch

from learned_rounding.quant_core.calibration.background import BackgroundWorker, Transfer

CPU = torch.device("cpu")


def copy_through(device: torch.device, count: int) -> torch.Tensor:
    """Double the blocks of a tensor in host memory on a device."""
    values = torch.arange(4.0 * count)
    transfer = Transfer(device)
    for block in values.split(4):
        transfer.store(transfer.fetch(block) * 2, block)
    transfer.wait()
    return values


def test_blocks_are_fetched_and_stored_on_a_cpu():
    assert torch.equal(copy_through(CPU, 5), 2 * torch.arange(20.0))


def test_fetched_block_on_the_same_device_is_the_block_itself():
    block = torch.ones(4)
    assert Transfer(CPU).fetch(block) is block


@pytest.mark.gpu
def test_more_blocks_than_copies_in_flight_are_stored_on_a_gpu():
    assert torch.equal(copy_through(torch.device("cuda"), 9), 2 * torch.arange(36.0))


@pytest.fixture
def worker():
    worker = BackgroundWorker(torch.device("cuda"))
    yield worker
    worker.close()


@pytest.mark.gpu
def test_jobs_run_in_order_with_the_activations_as_they_were_computed(worker):
    found = []
    for number in range(5):
        x = torch.full((1000, 1000), 1.0, device="cuda") * number  # may still be computed when it is submitted
        worker.submit(lambda activations: found.append(float(activations.mean())), x)
    worker.wait()
    assert found == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.gpu
def test_error_of_a_job_is_raised_by_the_wait(worker):
    def fail(activations):
        raise ZeroDivisionError

    worker.submit(fail, torch.ones(1, device="cuda"))
    with pytest.raises(ZeroDivisionError):
        worker.wait()


@pytest.mark.gpu
def test_closing_drops_the_queued_jobs(worker):
    started, release, ran = threading.Event(), threading.Event(), []

    def wait(activations):
        started.set()
        release.wait(60)

    x = torch.ones(1, device="cuda")
    worker.submit(wait, x)
    assert started.wait(60)
    worker.submit(ran.append, x)
    closing = threading.Thread(target=worker.close)
    closing.start()
    while not worker._jobs[-1].cancelled():
        closing.join(0.01)
    release.set()
    closing.join(60)
    assert ran == []
