"""Parking: where the tensors of suspended calls are, that they come back bit for bit, and that nothing is left."""

import errno

import pytest
import torch
from torch import nn

from learned_rounding.quant_core.errors import OutputError
from learned_rounding.quant_core.sequential import Block
from learned_rounding.quant_core.sequential import parking as parking_module
from learned_rounding.quant_core.sequential.calls import BlockCall
from learned_rounding.quant_core.sequential.parking import Parking, call_tensors
from learned_rounding.quant_core.sequential.streams import Streams

from .models import CPU, Pairs, make, make_arguments, replay

MIB = 1 << 20


def make_tensor(seed: int, mebibytes: int = 1) -> torch.Tensor:
    """Random bytes, seen as bfloat16: NaNs and subnormals too."""
    data = torch.randint(0, 256, (mebibytes * MIB,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return data.view(torch.bfloat16)


def make_call(*args, **kwargs) -> BlockCall:
    return BlockCall(nn.Identity(), args, kwargs)


def is_away(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == 0


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.fixture
def parking(tmp_path):
    """parking(device=0, ram=0) → Parking with these limits in MiB, for a model without tensors."""
    return lambda device=0, ram=0, model=None: Parking(model or nn.Identity(), CPU, device * MIB, ram * MIB, tmp_path)


def test_tensors_stay_on_the_device_then_go_to_main_memory_then_to_files(parking, listing):
    place = parking(device=2, ram=2)
    tensors = [make_tensor(index, 2) for index in range(3)]
    calls = [make_call(tensor) for tensor in tensors]
    for call in calls:
        place.park(call)
    assert [is_away(tensor) for tensor in tensors] == [False, True, True]
    assert len(listing()) == 1
    for index, call in enumerate(calls):
        place.release(call)
        assert same_bytes(tensors[index], make_tensor(index, 2))
    assert listing() == []


def test_limits_are_free_again_after_a_call_goes_on(parking, listing):
    place = parking(device=1, ram=1)
    calls = [make_call(make_tensor(index)) for index in range(3)]
    for call in calls:
        place.park(call)
    assert [is_away(call.args[0]) for call in calls] == [False, True, True]
    assert len(listing()) == 1
    place.release(calls[0])
    place.release(calls[1])
    others = [make_call(make_tensor(index)) for index in (3, 4)]
    for call in others:
        place.park(call)
    assert [is_away(call.args[0]) for call in others] == [False, True]
    assert len(listing()) == 1
    for call in (calls[2], *others):
        place.release(call)
    assert listing() == []


@pytest.mark.parametrize("ram", [0, 8], ids=["file", "main memory"])
def test_tensors_are_restored_bit_for_bit_as_often_as_asked(parking, ram):
    place, tensor = parking(ram=ram), make_tensor(5)
    call = make_call({"nested": [(tensor,)]})
    place.park(call)
    for _ in range(3):
        assert is_away(tensor)
        place.restore(call)
        assert same_bytes(tensor, make_tensor(5))
        place.restore(call)  # once more does nothing
        assert same_bytes(tensor, make_tensor(5))
        place.leave(call)
    place.release(call)
    assert same_bytes(tensor, make_tensor(5))


def test_views_of_a_storage_are_moved_once_and_stay_views(parking, listing):
    place, whole = parking(), make_tensor(6, 2)
    first, transposed = whole[: MIB // 2], whole.view(1024, 1024).t()
    call = make_call(first, other=transposed)
    place.park(call)
    assert is_away(whole)
    assert len(listing()) == 1
    place.release(call)
    assert same_bytes(whole, make_tensor(6, 2))
    whole[0] = 1.0
    assert first[0] == 1
    assert transposed[0, 0] == 1


def test_frames_of_the_model_see_the_restored_tensor(parking):
    """The tensor object is the model's own; only its storage is emptied."""
    place, tensor = parking(), make_tensor(7)
    held, call = tensor, make_call(tensor)
    place.park(call)
    place.release(call)
    assert held is call.args[0]
    assert same_bytes(held, make_tensor(7))


def test_small_tensors_stay(parking, listing):
    tensor = torch.ones(100)
    parking().park(make_call(tensor))
    assert not is_away(tensor)
    assert listing() == []


class Holder(nn.Module):
    """Holds a parameter, a buffer, a plain attribute and one in nested lists."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(make_tensor(1), requires_grad=False)
        self.register_buffer("table", make_tensor(2))
        self.cached = make_tensor(3)
        self.inner = nn.Identity()
        self.inner.cache = {"tables": [make_tensor(4)]}


def test_tensors_that_the_model_holds_stay(parking):
    model = Holder()
    held = [model.weight, model.table, model.cached, model.inner.cache["tables"][0]]
    place, own = parking(model=model), make_tensor(5)
    call = make_call(*held, model.cached[: MIB // 4], own)
    place.park(call)
    assert [is_away(tensor) for tensor in (*held, own)] == [False] * 4 + [True]
    place.release(call)
    assert all(same_bytes(tensor, make_tensor(seed)) for seed, tensor in enumerate((*held, own), 1))


@pytest.mark.parametrize("on_device", [0, 1])
def test_tensor_of_two_calls_stays_until_both_go_on(parking, on_device):
    """Such as a table that a host keeps elsewhere: one call must not take it away from the other."""
    place, shared = parking(device=on_device), make_tensor(8)
    first, second = make_call(shared), make_call(shared)
    place.park(first)
    place.park(second)
    for call in (second, first, second):
        place.restore(call)
        assert same_bytes(shared, make_tensor(8))
        place.leave(call)
    place.release(first)
    place.restore(second)
    assert same_bytes(shared, make_tensor(8))
    place.release(second)
    assert same_bytes(shared, make_tensor(8))


def test_tensor_that_cannot_be_emptied_stays(parking):
    """Memory of numpy and of mapped files has a fixed size."""
    tensor = torch.from_numpy(make_tensor(9).view(torch.uint8).numpy().copy())
    place, call = parking(), make_call(tensor)
    place.park(call)
    place.restore(call)
    assert torch.equal(tensor, make_tensor(9).view(torch.uint8))
    place.release(call)
    assert torch.equal(tensor, make_tensor(9).view(torch.uint8))


def test_full_disk_is_named_and_nothing_is_lost(parking, listing, monkeypatch, sentences):
    def write(file, data):
        file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parking_module, "write_all", write)
    place, tensor = parking(), make_tensor(10)
    call = make_call(tensor)
    with sentences.raises(OutputError):
        place.park(call)
    place.release(call)
    assert same_bytes(tensor, make_tensor(10))
    assert listing() == []


def test_tensors_in_nested_arguments_are_found():
    a, b, c = torch.zeros(3)
    assert list(call_tensors(((a, [b, "text", None]), {"x": {"y": c}, 3: object()}))) == [a, b, c]


# In streams


def open_streams(tmp_path, **limits) -> tuple[Streams, nn.Module]:
    root = make(Pairs)
    arguments = [(x.repeat(1, 100, 1), time) for x, time in make_arguments(2)]  # tensors of more than 1 MiB
    model = replay(root, tmp_path, arguments=arguments, **limits)
    blocks = [Block(f"blocks.{index}", block, ()) for index, block in enumerate(root.blocks)]
    return Streams(model, blocks, lambda: None, weights_only=False), root
