"""Messages between processes: tensors keep their bytes, errors their type, and a pipe that ends is noticed."""

import io
import os
import threading

import pytest
import torch

from learned_rounding.quant_core.errors import RecipeError, UnknownNameError
from learned_rounding.quant_core.sources.dtypes import TORCH_DTYPES
from learned_rounding.quant_core.workers.messages import RemoteTraceback, pack_error, read_message, write_message


def sent(message):
    file = io.BytesIO()
    write_message(file, message)
    file.seek(0)
    return read_message(file)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_keep_dtype_shape_and_bytes(subtests):
    generator = torch.Generator().manual_seed(0)
    for name, dtype in TORCH_DTYPES.items():
        with subtests.test(name):
            data = torch.randint(0, 2 if dtype is torch.bool else 256, (96,), generator=generator, dtype=torch.uint8)
            tensor = data.view(dtype).reshape(2, -1)
            got = sent({"weight": tensor})["weight"]
            assert (got.dtype, got.shape, raw(got)) == (dtype, tensor.shape, raw(tensor))


def test_tensors_of_any_strides_arrive(subtests):
    whole = torch.arange(24.0).reshape(4, 6)
    cases = {"transposed": whole.t(), "part": whole[1:, ::2], "scalar": whole[0, 0], "empty": whole[:, :0]}
    for name, tensor in cases.items():
        with subtests.test(name):
            assert torch.equal(sent(tensor), tensor)


def test_received_tensors_can_be_changed():
    got = sent(torch.zeros(3))
    got += 1
    assert got.tolist() == [1, 1, 1]


def test_parameters_arrive_as_tensors():
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


def test_errors_keep_type_text_and_what_they_concern():
    error, _ = sent(pack_error(raised(RecipeError("no such format", option="format"))))
    assert isinstance(error, RecipeError)
    assert str(error) == "no such format"
    assert error.option == "format"


def test_errors_with_other_arguments_arrive():
    error, _ = sent(pack_error(raised(UnknownNameError("format", "fp9", ["fp8"]))))
    assert isinstance(error, UnknownNameError)
    assert error.known == ["fp8"]


def test_errors_that_cannot_be_pickled_arrive_as_text():
    unpicklable = ValueError("too large")
    unpicklable.function = lambda: None
    error, _ = sent(pack_error(raised(unpicklable)))
    assert str(error) == "ValueError: too large"


def test_the_traceback_of_the_other_process_is_shown():
    _, trace = sent(pack_error(raised(RecipeError("no such format"))))
    assert "in raised" in str(RemoteTraceback(trace))
