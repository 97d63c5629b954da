"""Page-locked buffers: all bytes arrive in both directions, with a bounded number of buffers."""

import contextlib
import threading

import pytest
import torch

from learned_rounding.quant_core.sources import staging
from learned_rounding.quant_core.sources.staging import Staging, byte_views

BUFFER = 64  # bytes
SIZES = [0, 1, BUFFER - 1, BUFFER, BUFFER + 1, 40 * BUFFER + 7]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Event:
    """Event of a stream whose copies end at once."""

    made = 0

    def __init__(self):
        Event.made += 1
        self.recorded = False

    def record(self, stream=None) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """A GPU, or the CPU with its memory in the place of a GPU's and of page-locked memory."""
    monkeypatch.setattr(staging, "_BUFFER", BUFFER)
    if request.param == "cpu":
        monkeypatch.setattr(Event, "made", 0)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options))
    return torch.device(request.param)


def random_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def fill(ring: Staging, expected: torch.Tensor, device: torch.device) -> torch.Tensor:
    def read_into(view: memoryview, offset: int) -> None:
        view[:] = expected[offset : offset + len(view)].numpy().data

    target = torch.zeros(expected.numel(), dtype=torch.uint8, device=device)
    ring.fill(target, read_into)
    return target.cpu()


@pytest.mark.parametrize("inference", [False, True])
def test_threads_fill_every_byte(subtests, device, inference):
    for size in SIZES:
        expected, ring = random_bytes(size), Staging()
        with subtests.test(size=size), torch.inference_mode(inference):  # threads do not inherit it
            for _ in range(3):
                assert torch.equal(fill(ring, expected, device), expected)


def test_drained_parts_are_all_bytes(subtests, device):
    for size in SIZES:
        expected, ring = random_bytes(size), Staging()
        with subtests.test(size=size):
            for _ in range(3):
                assert b"".join(map(bytes, ring.drain(expected.to(device)))) == expected.numpy().tobytes()


def test_buffers_to_fill_are_as_many_as_threads(device):
    ring = Staging()
    for _ in range(3):
        fill(ring, random_bytes(SIZES[-1]), device)
    assert [len(buffers) <= staging._THREADS for buffers in ring._rings.values()] == [True]


def test_buffers_to_drain_are_bounded(device):
    ring = Staging()
    for _ in range(3):
        assert all(ring.drain(random_bytes(SIZES[-1]).to(device)))
    assert [len(buffers) <= staging._BUFFERS for buffers in ring._rings.values()] == [True]


def test_drained_part_is_valid_until_the_next_one_is_requested(device):
    expected = random_bytes(40 * BUFFER)
    for index, view in enumerate(Staging().drain(expected.to(device))):
        assert bytes(view) == expected[index * BUFFER :][:BUFFER].numpy().tobytes()


def test_error_of_a_read_ends_the_threads(device):
    def fail(view: memoryview, offset: int) -> None:
        if offset == 5 * BUFFER:
            raise OSError("5")

    with pytest.raises(OSError, match="5"):
        Staging().fill(torch.zeros(400 * BUFFER, dtype=torch.uint8, device=device), fail)
    assert not any(thread.name.startswith("learned-rounding-fill") for thread in threading.enumerate())


def test_byte_views_are_the_bytes_in_row_major_order(subtests):
    for dtype in [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]:
        with subtests.test(dtype=dtype):
            tensor = torch.arange(60).view(5, 12).to(dtype)
            expected = tensor.t().contiguous().view(torch.uint8).numpy().tobytes()
            assert b"".join(map(bytes, byte_views(tensor.t(), Staging()))) == expected
