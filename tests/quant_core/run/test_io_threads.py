"""Reading ahead and writing behind by bytes; an error of a thread ends the run where it happened."""

import threading
from concurrent.futures import Future

import pytest
import torch

from learned_rounding.quant_core.run import io_threads
from learned_rounding.quant_core.run.io_threads import LayerWriter, read_ahead
from learned_rounding.quant_core.sources import TensorSource
from learned_rounding.quant_core.sources.source import CPU


class Stop(Exception):
    """Raised by a cancellation check."""


class RecordingSource(TensorSource):
    """A state dict that lists its reads; a read of the name in ``broken`` fails."""

    def __init__(self, sizes: list[int], broken: str = ""):
        super().__init__({str(index): torch.full((size,), index).byte() for index, size in enumerate(sizes)})
        self.reads, self._broken = [], broken

    def read(self, name, device=CPU):
        self.reads.append(name)
        if name == self._broken:
            raise OSError(name)
        return super().read(name, device)


class Sink:
    """Sink that waits for :attr:`open` before each tensor, and sets :attr:`reached`; the tensor named in ``broken`` fails."""

    def __init__(self, broken: str = ""):
        self.added, self.open, self.reached, self._broken = [], threading.Event(), threading.Event(), broken

    def add(self, name: str, tensor: torch.Tensor) -> int:
        self.reached.set()
        self.open.wait()
        if name == self._broken:
            raise OSError(name)
        self.added.append(name)
        return tensor.nbytes


class InlineExecutor:
    """Executor that runs each call when it is submitted."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *arguments) -> Future:
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **_) -> None:
        pass


def never() -> None:
    """A check that does not cancel."""


def test_tensors_are_read_ahead_up_to_a_number_of_bytes_or_one_tensor(monkeypatch, subtests):
    for sizes, ahead in [
        ([10, 10, 10, 10, 10, 10], 4),
        ([10, 100, 10, 10], 1),
        ([100, 100, 100], 1),
        ([0, 0, 0, 0], 3),
        ([40, 30, 9, 2], 2),
    ]:
        with subtests.test(sizes=sizes, ahead=ahead), monkeypatch.context() as patch:
            patch.setattr(io_threads, "_QUEUE", 40)
            patch.setattr(io_threads, "ThreadPoolExecutor", InlineExecutor)
            source = RecordingSource(sizes)
            tensors = read_ahead(source, [(name, CPU) for name in source.tensors], never)
            found = [next(tensors)]
            assert source.reads == list(source.tensors)[: 1 + ahead]
            found += tensors
            assert [(name, tensor.tolist()) for name, tensor in found] == [
                (str(index), [index] * size) for index, size in enumerate(sizes)
            ]
            assert source.reads == list(source.tensors)


def test_error_of_a_read_is_raised_at_its_tensor():
    tensors = read_ahead(source := RecordingSource([1, 1, 1], broken="1"), [(n, CPU) for n in source.tensors], never)
    assert next(tensors)[0] == "0"
    with pytest.raises(OSError, match="1"):
        next(tensors)


def add(writer: LayerWriter, name: str, size: int) -> None:
    writer.add({name: torch.zeros(size, dtype=torch.uint8)}, [], None)


def stop() -> None:
    raise Stop


def test_layers_wait_for_room_of_a_number_of_bytes_or_until_they_are_alone(monkeypatch):
    monkeypatch.setattr(io_threads, "_QUEUE", 40)
    sink = Sink()
    writer = LayerWriter(sink, None, stop)  # raises where it has to wait
    add(writer, "large", 100)
    with pytest.raises(Stop):
        add(writer, "small", 1)
    sink.open.set()
    writer._pending[0][0].result()
    sink.open.clear()
    for name in ("a", "b", "c", "d"):
        add(writer, name, 10)
    with pytest.raises(Stop):
        writer.wait_for_room(1)
    sink.open.set()
    with writer:
        pass
    assert sink.added == ["large", "a", "b", "c", "d"]


def test_few_layers_wait_however_small():
    writer = LayerWriter(sink := Sink(), None, stop)
    for index in range(io_threads._LAYERS):
        add(writer, str(index), 0)
    with pytest.raises(Stop):
        writer.wait_for_room(0)
    sink.open.set()
    with writer:
        pass
    assert len(sink.added) == io_threads._LAYERS


def test_cancelling_the_wait_for_the_last_layers_does_not_wait_for_a_write_that_hangs():
    sink = Sink()
    with pytest.raises(Stop), LayerWriter(sink, None, stop) as writer:
        for name in ("a", "b"):
            add(writer, name, 10)
        sink.reached.wait()
    written = writer._pending[0][0]
    assert not written.done()
    sink.open.set()
    written.result()
    assert sink.added == ["a"]  # the second layer was cancelled


def test_nothing_is_written_after_a_layer_that_failed():
    sink = Sink(broken="b")
    with pytest.raises(OSError, match="b"), LayerWriter(sink, None, never) as writer:
        for name in ("a", "b", "c", "d"):
            add(writer, name, 10)
        sink.open.set()
    assert sink.added == ["a"]
