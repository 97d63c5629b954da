"""Base class of the readers: opening, reading from threads, closing, and files that change while they are read."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo, positional
from learned_rounding.quant_core.sources import tensor_file as reader
from learned_rounding.quant_core.sources.tensor_file import MAX_NAME, TensorFile, open_regular_file

# Opening


def test_a_missing_file_is_refused(tmp_path, sentences):
    with sentences.raises(SourceError):
        open_regular_file(tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name")
def test_a_pipe_is_refused(tmp_path, sentences):
    """Opening a pipe without a writer would block."""
    os.mkfifo(tmp_path / "pipe")
    with sentences.raises(SourceError):
        open_regular_file(tmp_path / "pipe")


def test_names_that_no_disk_takes_are_refused(subtests, tmp_path, sentences):
    for name in ["a" * 300, "a\0b"]:
        with subtests.test(name=name), sentences.raises(SourceError):
            open_regular_file(tmp_path / name)


class Numbers(TensorFile):
    """A file format without a header: the whole file is one tensor, described by a subclass of the test."""

    name_of_tensor, info, offset = "a", TensorInfo(torch.uint8, (8,)), 0

    def _parse_header(self) -> None:
        self._add_tensor(self.name_of_tensor, self.info, self.offset)


@pytest.fixture
def numbers(tmp_path):
    """A file of eight bytes."""
    (tmp_path / "numbers").write_bytes(bytes(range(8)))
    return tmp_path / "numbers"


def test_a_file_is_described(numbers):
    with Numbers(numbers) as file:
        assert file.path == numbers
        assert file.paths == (numbers,)
        assert file.name == "numbers"
        assert file.size == 8


def test_a_tensor_is_the_bytes_at_its_offset(numbers):
    class Half(Numbers):
        info, offset = TensorInfo(torch.uint8, (2, 2)), 4

    with Half(numbers) as file:
        assert file.read("a").tolist() == [[4, 5], [6, 7]]


def test_a_sample_is_bytes_from_within_a_tensor(numbers):
    with Numbers(numbers) as file:
        assert file.sample("a", 2, 3) == bytes([2, 3, 4])


INVALID = {
    "reserved name": {"name_of_tensor": "__metadata__"},
    "long layer": {"name_of_tensor": "a" * (MAX_NAME + 1) + ".weight"},
    "long last part": {"name_of_tensor": "a." + "b" * (MAX_NAME + 1)},
    "surrogate": {"name_of_tensor": "\ud800"},
    "unknown dtype": {"info": TensorInfo(torch.qint8, (8,))},
    "negative side": {"info": TensorInfo(torch.uint8, (-8,))},
    "fractional side": {"info": TensorInfo(torch.uint8, (8.0,))},
    "63 bits": {"info": TensorInfo(torch.uint8, (2**62, 0, 2))},
    "beyond the end": {"offset": 1},
    "negative offset": {"offset": -1},
}


def test_invalid_tensors_make_a_damaged_file(subtests, numbers, sentences):
    for attributes in INVALID.values():
        with subtests.test(attributes=attributes), sentences.raises(SourceError):
            type("Invalid", (Numbers,), attributes)(numbers)


def test_a_tensor_that_occurs_twice_makes_a_damaged_file(numbers):
    class Twice(Numbers):
        def _parse_header(self) -> None:
            super()._parse_header()
            super()._parse_header()

    with pytest.raises(SourceError, match="occurs twice"):
        Twice(numbers)


def test_errors_of_a_parser_make_a_damaged_file(subtests, numbers):
    for error in [RecursionError, MemoryError, KeyError, EOFError, UnicodeDecodeError("a", b"", 0, 0, "")]:
        with subtests.test(error=error):

            class Broken(Numbers):
                raised = error

                def _parse_header(self) -> None:
                    raise self.raised

            with pytest.raises(SourceError, match="is damaged"):
                Broken(numbers)


def test_a_header_beyond_the_end_makes_a_damaged_file(numbers):
    class Long(Numbers):
        def _parse_header(self) -> None:
            self._read_header(4, 5)

    with pytest.raises(SourceError, match="header extends beyond the end"):
        Long(numbers)


def test_a_folder_is_refused(tmp_path, sentences):
    with sentences.raises(SourceError):
        Numbers(tmp_path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_that_is_not_opened_is_closed(numbers, monkeypatch, error):
    class Broken(Numbers):
        def _parse_header(self) -> None:
            raise error

    opened = []
    real = open
    monkeypatch.setattr(
        reader, "open", lambda *args, **options: opened.append(real(*args, **options)) or opened[-1], raising=False
    )
    with pytest.raises((SourceError, KeyboardInterrupt)):
        Broken(numbers)
    assert [file.closed for file in opened] == [True]


# Reading


def test_what_is_read_can_be_written_to(numbers):
    """No map of the file: a tensor is the caller's own."""
    with Numbers(numbers) as file:
        file.read("a").add_(1)
        assert file.read("a").tolist() == list(range(8))


def test_a_tensor_lives_on_after_the_file_is_closed(numbers):
    with Numbers(numbers) as file:
        tensor = file.read("a")
    assert tensor.tolist() == list(range(8))


def test_reading_from_several_threads(tmp_path):
    tensors = {f"t{index}": torch.full((5000 + index,), index) for index in range(24)}
    save_file(tensors, tmp_path / "a.safetensors")
    wrong = []
    with SafetensorsFile(tmp_path / "a.safetensors") as source:

        def work(start):
            for index in range(start, start + 24):
                name = f"t{index % 24}"
                if not torch.equal(source.read(name), tensors[name]):
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(start,)) for start in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize("parallel", [positional._PARALLEL, False], ids=["parallel", "one at a time"])
def test_file_closed_while_threads_read_it_stays_open_until_they_end(tmp_path, monkeypatch, parallel):
    """``parallel``: False as on Windows, which has no read at a given position."""
    monkeypatch.setattr(positional, "_PARALLEL", parallel)
    save_file({"a": torch.arange(100.0), "b": torch.arange(50.0)}, tmp_path / "a.safetensors")
    source, started, closed = SafetensorsFile(tmp_path / "a.safetensors"), threading.Barrier(3), threading.Event()
    read_at = source._read_at

    def wait(view, offset):
        started.wait()
        closed.wait()
        return read_at(view, offset)

    monkeypatch.setattr(source, "_read_at", wait)
    with ThreadPoolExecutor(2) as pool:
        reads = [pool.submit(source.read, name) for name in source.tensors]
        started.wait()
        source.close()
        assert not source._file.closed
        closed.set()
        assert {tuple(read.result().shape) for read in reads} == {(100,), (50,)}
    assert source._file.closed
    with pytest.raises(SourceError, match="was closed while tensor a was read"):
        source.read("a")


def test_a_file_cut_while_it_is_read(model_file, sentences):
    path = model_file()
    with SafetensorsFile(path) as source:
        last = list(source.tensors)[-1]
        os.truncate(path, source.size - source.tensors[last].nbytes)
        with sentences.raises(SourceError):
            source.read(last)


def test_a_disk_that_fails_while_reading(model_file, monkeypatch, sentences):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with SafetensorsFile(model_file()) as source:
        monkeypatch.setattr(source, "_read_at", fail)
        with sentences.raises(SourceError):
            source.read("step")


def test_a_disk_that_reads_few_bytes_at_a_time(numbers, monkeypatch):
    with Numbers(numbers) as file:
        read_at = file._read_at
        monkeypatch.setattr(file, "_read_at", lambda view, offset: read_at(view[:3], offset))
        assert file.read("a").tolist() == list(range(8))
