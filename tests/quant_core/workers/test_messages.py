"""Messages between processes: tensors keep their bytes, errors their type, and a pipe that ends is noticed."""

import contextlib
import errno
import io
import os
import threading

import pytest
import torch

from learned_rounding.quant_core.errors import RecipeError, UnknownNameError
from learned_rounding.quant_core.sources.dtypes import TORCH_DTYPES
from learned_rounding.quant_core.sources.recycled import RecycledMemory
from learned_rounding.quant_core.workers.messages import RemoteTraceback, pack_error, read_message, write_message
from learned_rounding.quant_core.workers.shared_memory import SharedMemory

MEMORY = [
    None,
    pytest.param("shared", marks=pytest.mark.posix(reason="needs memfd_create")),
]  # in the pipe, or in shared memory


@pytest.fixture(params=MEMORY)
def sent(request):
    """Sends a message and returns what arrives."""
    memories = [SharedMemory() for _ in range(2)] if request.param else []

    def send(message):
        file = io.BytesIO()
        write_message(file, message, 1, memories[1] if memories else None)
        file.seek(0)
        return read_message(file, memories)

    yield send
    for memory in memories:
        memory.close()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_keep_dtype_shape_and_bytes(subtests, sent):
    generator = torch.Generator().manual_seed(0)
    for name, dtype in TORCH_DTYPES.items():
        with subtests.test(name):
            data = torch.randint(0, 2 if dtype is torch.bool else 256, (96,), generator=generator, dtype=torch.uint8)
            tensor = data.view(dtype).reshape(2, -1)
            got = sent({"weight": tensor})["weight"]
            assert (got.dtype, got.shape, raw(got)) == (dtype, tensor.shape, raw(tensor))


def test_tensors_of_any_strides_arrive(subtests, sent):
    whole = torch.arange(24.0).reshape(4, 6)
    cases = {"transposed": whole.t(), "part": whole[1:, ::2], "scalar": whole[0, 0], "empty": whole[:, :0]}
    for name, tensor in cases.items():
        with subtests.test(name):
            assert torch.equal(sent(tensor), tensor)


def test_received_tensors_can_be_changed(sent):
    got = sent(torch.zeros(3))
    got += 1
    assert got.tolist() == [1, 1, 1]


def test_parameters_arrive_as_tensors(sent):
    assert type(sent(torch.nn.Parameter(torch.ones(2)))) is torch.Tensor


def test_messages_follow_each_other_through_a_pipe():
    read, write = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    messages = [torch.full((300_000,), float(index)) for index in range(3)]  # larger than a pipe's buffer
    writer = threading.Thread(target=lambda: [write_message(write, message) for message in messages])
    writer.start()
    with read, write:
        got = [read_message(read) for _ in messages]
        writer.join()
    assert all(torch.equal(one, other) for one, other in zip(got, messages, strict=True))


@pytest.mark.posix(reason="Windows has no anonymous shared memory with a descriptor")
def test_shared_memory_is_used_again_and_grows():
    with (
        contextlib.closing(SharedMemory()) as memory,
        contextlib.closing(SharedMemory(os.dup(memory.descriptor))) as other,
    ):
        for count in (10, 5, 3000):
            file = io.BytesIO()
            write_message(file, torch.full((count,), float(count)), 0, memory)
            assert len(file.getvalue()) < 1000
            file.seek(0)
            got = read_message(file, [other])
            assert got.tolist() == [count] * count
            memory.tensor(0, torch.float32, (count,)).zero_()
            assert not got.any()  # a view


@pytest.mark.posix(reason="Windows has no anonymous shared memory with a descriptor")
def test_copied_tensors_stay_when_the_memory_is_used_again():
    with contextlib.closing(SharedMemory()) as memory:
        got = []
        for value in (1.0, 2.0):
            file = io.BytesIO()
            write_message(file, torch.full((3,), value), 0, memory)
            file.seek(0)
            got += read_message(file, [memory], RecycledMemory()).tolist()
        assert got == [1, 1, 1, 2, 2, 2]


@pytest.mark.posix(reason="Windows has no anonymous shared memory with a descriptor")
def test_without_shared_memory_left_tensors_are_in_the_pipe(monkeypatch):
    def refuse(descriptor, size):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with contextlib.closing(SharedMemory()) as memory:
        monkeypatch.setattr(os, "ftruncate", refuse)
        file = io.BytesIO()
        write_message(file, torch.ones(3), 0, memory)
        file.seek(0)
        assert read_message(file, [memory]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [0, 1, 100, 4_000_100])
def test_a_message_that_ends_early_is_an_end(size):
    file = io.BytesIO()
    write_message(file, torch.zeros(1_000_100))
    assert len(file.getvalue()) > size
    with pytest.raises(EOFError):
        read_message(io.BytesIO(file.getvalue()[:size]))


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_errors_keep_type_text_and_what_they_concern(sent):
    error, _ = sent(pack_error(raised(RecipeError("no such format", option="format"))))
    assert isinstance(error, RecipeError)
    assert str(error) == "no such format"
    assert error.option == "format"


def test_errors_with_other_arguments_arrive(sent):
    error, _ = sent(pack_error(raised(UnknownNameError("format", "fp9", ["fp8"]))))
    assert isinstance(error, UnknownNameError)
    assert error.known == ["fp8"]


def test_errors_that_cannot_be_pickled_arrive_as_text(sent):
    unpicklable = ValueError("too large")
    unpicklable.function = lambda: None
    error, _ = sent(pack_error(raised(unpicklable)))
    assert str(error) == "ValueError: too large"


def test_the_traceback_of_the_other_process_is_shown(sent):
    _, trace = sent(pack_error(raised(RecipeError("no such format"))))
    assert "in raised" in str(RemoteTraceback(trace))
