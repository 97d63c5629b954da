"""Memory that is used again: never while a tensor or a view of it lives, and only so much is kept."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from learned_rounding.quant_core.sources import recycled
from learned_rounding.quant_core.sources.recycled import RecycledMemory

LARGE = recycled._LARGE


def address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()


def test_memory_of_a_tensor_that_is_gone_is_used_again():
    memory = RecycledMemory()
    tensor = memory.empty(2 * LARGE)
    before = address(tensor)
    del tensor
    assert address(memory.empty(2 * LARGE - 100)) == before


@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x[8:].view(torch.float32), lambda x: x.numpy()[5:], lambda x: x.untyped_storage()]
)
def test_memory_is_not_used_again_while_a_view_of_it_lives(view):
    memory = RecycledMemory()
    tensor = memory.empty(LARGE)
    before, held = address(tensor), view(tensor)
    del tensor
    others = [memory.empty(LARGE) for _ in range(3)]
    assert before not in map(address, others)
    del held
    assert address(memory.empty(LARGE)) == before


def test_small_tensors_are_those_of_the_allocator():
    memory = RecycledMemory()
    memory.empty(LARGE - 1)
    assert not memory._kept


def test_memory_much_larger_than_needed_is_not_taken():
    memory = RecycledMemory()
    memory.empty(4 * LARGE)
    assert memory._take(LARGE) is None


def test_sizes_that_are_not_needed_any_more_are_freed():
    memory = RecycledMemory()
    memory.empty(4 * LARGE)
    memory.empty(LARGE)
    assert [whole.nbytes for whole in memory._kept] == [LARGE]


def test_only_so_much_is_kept(monkeypatch):
    monkeypatch.setattr(recycled, "_MOST_KEPT", 2 * LARGE)
    memory = RecycledMemory()
    tensors = [memory.empty(LARGE) for _ in range(4)]
    del tensors
    assert len(memory._kept) == 2


def test_nothing_is_kept_while_few_tensors_are_in_use():
    memory = RecycledMemory(others=2)
    tensors = [memory.empty(LARGE) for _ in range(4)]
    for kept in (1, 2, 2, 2):  # the first two are given back while two others are in use
        tensors.pop()
        assert len(memory._kept) == kept


def test_a_tensor_may_outlive_the_memory_object():
    memory = RecycledMemory()
    tensor = memory.empty(LARGE).fill_(7)
    del memory
    assert int(tensor.sum()) == 7 * LARGE


def test_copies_have_the_same_values():
    source = torch.arange(LARGE // 2, dtype=torch.float32).reshape(2, -1)
    assert torch.equal(RecycledMemory().copy(source), source)


def test_threads_have_different_memory():
    memory = RecycledMemory()

    def is_own(value: int) -> bool:
        return all(bool((memory.empty(LARGE).fill_(value) == value).all()) for _ in range(30))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(is_own, range(4))) == [True] * 4
