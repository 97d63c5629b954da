"""Shared memory: two views of the same bytes, which grow together and stay valid."""

import contextlib
import os

import pytest
import torch

from learned_rounding.quant_core.workers.shared_memory import SharedMemory

pytestmark = pytest.mark.posix(reason="Windows has no anonymous shared memory with a descriptor")


@pytest.fixture
def pair():
    """The memory of a process and that of another one, which has the same descriptor."""
    with contextlib.closing(SharedMemory()) as one, contextlib.closing(SharedMemory(os.dup(one.descriptor))) as other:
        yield one, other


def test_what_one_writes_the_other_reads(pair):
    one, other = pair
    for memory in pair:
        memory.reserve(100)
    one.tensor(64, torch.float32, (2, 3)).copy_(torch.arange(6.0).reshape(2, 3))
    assert other.tensor(64, torch.float32, (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_tensor_stays_valid_when_the_memory_grows(pair):
    one, other = pair
    one.reserve(10)
    before = one.tensor(0, torch.uint8, (10,)).fill_(3)
    one.reserve(10_000_000)
    assert before.tolist() == [3] * 10
    other.reserve(10_000_000)
    assert other.tensor(0, torch.uint8, (10,)).tolist() == [3] * 10


def test_memory_of_the_right_size_is_not_mapped_again():
    with contextlib.closing(SharedMemory()) as memory:
        memory.reserve(1000)
        before = memory.tensor(0, torch.uint8, (1,)).data_ptr()
        memory.reserve(10)
        memory.reserve(1100)
        assert memory.tensor(0, torch.uint8, (1,)).data_ptr() == before


def test_tensors_without_elements_need_no_memory():
    with contextlib.closing(SharedMemory()) as memory:
        memory.reserve(0)
        assert memory.tensor(0, torch.float32, (0, 3)).shape == (0, 3)


def test_closed_memory_cannot_grow_and_may_be_closed_again():
    memory = SharedMemory()
    memory.reserve(10)
    tensor = memory.tensor(0, torch.uint8, (10,)).fill_(1)
    memory.close()
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        memory.reserve(100_000)
    assert tensor.sum() == 10
