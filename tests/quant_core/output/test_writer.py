"""The writer against the reader of safetensors; an output is either complete or absent."""

import errno
import itertools
import json
import os
import struct
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from learned_rounding.quant_core.errors import OutputError
from learned_rounding.quant_core.output import SafetensorsWriter, header_bytes, layout, partial, writer
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo
from learned_rounding.quant_core.sources.dtypes import DTYPE_NAMES


def info(tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(tensor.dtype, tuple(tensor.shape))


def write(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> int:
    reserve = header_bytes([(name, info(tensor)) for name, tensor in tensors.items()], metadata or {})
    with SafetensorsWriter(path, reserve) as out:
        for name, tensor in tensors.items():
            assert out.add(name, tensor) == tensor.nbytes
        return out.finish(metadata or {})


def mixed() -> dict[str, torch.Tensor]:
    """Scalars, empty tensors, sizes that are not multiples of 8; dtypes alternate, so that in this order none is aligned."""
    tensors = {}
    for shape in [(), (3,), (8, 4), (5, 7), (0, 3), (1, 1)]:
        for seed, (dtype, name) in enumerate(DTYPE_NAMES.items()):
            count = torch.Size(shape).numel() * dtype.itemsize
            data = torch.randint(0, 2, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
            tensors[f"{name}.{'x'.join(map(str, shape))}"] = data.view(dtype).view(shape)
    return tensors


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def header_of(path) -> tuple[dict, int]:
    """The header, and the offset of the data."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


def test_safetensors_reads_every_dtype_and_size(tmp_path):
    tensors, metadata = mixed(), {"format": "pt", "ß\n": '"quoted" \\ and \x01'}
    size = write(tmp_path / "a.safetensors", tensors, metadata)
    assert size == (tmp_path / "a.safetensors").stat().st_size
    loaded = load_file(tmp_path / "a.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert info(loaded[name]) == info(tensor), name
        assert raw(loaded[name]) == raw(tensor), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == set(tensors)
        assert torch.equal(file.get_tensor("F32.5x7"), tensors["F32.5x7"])
        assert list(file.get_slice("BF16.8x4").get_shape()) == [8, 4]


def test_own_reader_reads_every_dtype_and_size(tmp_path):
    tensors = mixed()
    write(tmp_path / "a.safetensors", tensors, {"a": "b"})
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"a": "b"}
        assert {name: (info(file.read(name)), raw(file.read(name))) for name in file.tensors} == {
            name: (info(tensor), raw(tensor)) for name, tensor in tensors.items()
        }


def test_every_tensor_is_aligned_without_gaps(tmp_path):
    """Readers map the file: an offset that is not a multiple of the item size costs a copy or fails."""
    write(tmp_path / "a.safetensors", mixed())
    header, start = header_of(tmp_path / "a.safetensors")
    header.pop("__metadata__", None)
    assert start % 8 == 0
    items = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}
    spans = []
    for name, entry in header.items():
        assert (start + entry["data_offsets"][0]) % items[entry["dtype"]] == 0, name
        spans.append(tuple(entry["data_offsets"]))
    spans.sort()
    assert spans[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert start + spans[-1][1] == (tmp_path / "a.safetensors").stat().st_size


def test_views_are_written_in_row_major_order(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {"t": base.t(), "s": base[1:3, ::2], "p": torch.nn.Parameter(base), "e": torch.zeros(1, 4).expand(3, 4)}
    write(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_deferred_tensors_larger_than_the_spool(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "_SPILL", 64)
    tensors = {f"t{index}": torch.full((1001 + 2 * index,), index, dtype=torch.uint8) for index in range(5)}
    write(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_same_tensors_give_same_bytes(tmp_path):
    write(tmp_path / "a.safetensors", mixed(), {"a": "b"})
    write(tmp_path / "b.safetensors", mixed(), {"a": "b"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_aligned_tensors_are_in_the_order_of_their_addition(tmp_path):
    names = ["z", "b", "m", "a"]
    write(tmp_path / "a.safetensors", {name: torch.zeros(2) for name in names})
    header, _ = header_of(tmp_path / "a.safetensors")
    assert [name for name in header if name != "__metadata__"] == names


def test_file_without_tensors(tmp_path):
    write(tmp_path / "a.safetensors", {}, {"a": "b"})
    assert load_file(tmp_path / "a.safetensors") == {}


NAMES = st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=6).map(tuple)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPE_NAMES)), SHAPES), max_size=8),
    st.dictionaries(st.text(max_size=12), st.text(max_size=40), max_size=4),
)
@example({'\U0001f600\x00"\\\x7f  ': (torch.bool, (1,) * 6)}, {"\U0001f600": '\x00\x1f"\\/'})
def test_header_fits_into_the_reserved_size(specs, metadata):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in specs.items()}
        write(path, tensors, metadata)
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(tensors)
            assert (file.metadata() or {}) == metadata
        with SafetensorsFile(path) as file:
            assert dict(file.tensors.items()) == {name: TensorInfo(*spec) for name, spec in specs.items()}
            assert file.metadata == metadata


# An output is either complete or absent.


def test_final_name_does_not_exist_before_finish(tmp_path, listing):
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, 4096) as out:
        assert not path.exists()
        out.add("a", torch.zeros(10_000))
        out.add("odd", torch.zeros(3, dtype=torch.uint8))
        assert not path.exists()
        (hidden,) = listing()
        assert hidden.startswith(".a.safetensors.")
        assert hidden.endswith(".partial")
        out.finish({})
        assert listing() == ["a.safetensors"]
    assert listing() == ["a.safetensors"]


def test_existing_file_is_intact_before_finish(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"old": torch.zeros(4)})
    before = path.read_bytes()
    with SafetensorsWriter(path, 4096) as out:
        out.add("new", torch.ones(4))
        assert path.read_bytes() == before
        out.finish({})
    assert set(load_file(path)) == {"new"}


def test_error_in_the_context_leaves_nothing(tmp_path, listing, subtests):
    for error in [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit]:
        with subtests.test(error=error):
            with pytest.raises(error), SafetensorsWriter(tmp_path / "a.safetensors", 4096) as out:
                out.add("a", torch.zeros(10_000))
                raise error
            assert listing() == []


def test_leaving_without_finish_leaves_nothing(tmp_path, listing):
    with SafetensorsWriter(tmp_path / "a.safetensors", 4096) as out:
        out.add("a", torch.zeros(100))
    assert listing() == []


@pytest.mark.parametrize("size", [1000, 3], ids=["in order", "of an odd size"])
def test_duplicate_name_is_refused(tmp_path, listing, size, sentences):
    """The header would contain one of the two, and the other would be a gap."""
    with (
        sentences.raises(ValueError),
        SafetensorsWriter(tmp_path / "a.safetensors", 1000) as out,
    ):
        out.add("a", torch.zeros(size, dtype=torch.uint8))
        out.add("a", torch.ones(1000, dtype=torch.uint8))
    assert listing() == []


def test_error_leaves_the_existing_file(tmp_path, listing):
    write(tmp_path / "a.safetensors", {"old": torch.zeros(4)})
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(RuntimeError), SafetensorsWriter(tmp_path / "a.safetensors", 4096):
        raise RuntimeError
    assert listing() == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_missing_folder_is_created(tmp_path, listing):
    write(tmp_path / "new" / "deep" / "a.safetensors", {"a": torch.zeros(1)})
    assert listing() == ["new/deep/a.safetensors"]


class _Full:
    """A file on a disk that is full after ``room`` bytes."""

    def __init__(self, file, room: int, code: int):
        self._file, self._room, self._code = file, room, code

    def write(self, data) -> int:
        size = memoryview(data).nbytes
        if size > self._room:
            raise OSError(self._code, os.strerror(self._code))
        self._room -= size
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


def fill_disk(patch, room: int, code: int) -> None:
    """Let partial files fail with this error after ``room`` bytes."""
    real = open
    patch.setattr(
        partial, "open", lambda path, mode, **options: _Full(real(path, mode, **options), room, code), raising=False
    )


def failing(code: int):
    """A function that raises this error of the system."""

    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    return fail


def test_failing_disk_leaves_nothing(tmp_path, listing, monkeypatch, sentences, subtests):
    """Both large tensors fit into 41,000 bytes; the deferred one and the header do not."""
    tensors = {"a": torch.zeros(1000), "b": torch.zeros(9000), "odd": torch.zeros(1001, dtype=torch.uint8)}
    for label, room, code in [
        ("first tensor", 0, errno.ENOSPC),
        ("second tensor", 5000, errno.EDQUOT),
        ("end", 41_000, errno.EIO),
    ]:
        with subtests.test(label), monkeypatch.context() as patch:
            fill_disk(patch, room, code)
            with sentences.raises(OutputError):
                write(tmp_path / "a.safetensors", tensors)
            patch.undo()
            assert listing() == []


def test_failing_fsync_or_rename_leaves_nothing(tmp_path, listing, monkeypatch, sentences, subtests):
    for call, code in [
        ("fsync", errno.ENOSPC),
        ("fsync", errno.EIO),
        ("replace", errno.EDQUOT),
        ("replace", errno.EIO),
    ]:
        with subtests.test(call, code=errno.errorcode[code]), monkeypatch.context() as patch:
            patch.setattr(os, call, failing(code))
            with sentences.raises(OutputError):
                write(tmp_path / "a.safetensors", {"a": torch.zeros(1000)})
            patch.undo()
            assert listing() == []


def test_short_writes_are_completed(tmp_path, monkeypatch):
    """A write call may take only a part of the bytes, without an error on a nearly full disk."""

    class Short(_Full):
        def write(self, data) -> int:
            return self._file.write(memoryview(data).cast("B")[:777])

    real = open
    monkeypatch.setattr(
        partial, "open", lambda path, mode, **options: Short(real(path, mode, **options), 0, 0), raising=False
    )
    tensors = {"a": torch.arange(1000), "odd": torch.arange(1001).to(torch.uint8)} | {
        f"long name {index}": torch.zeros(1) for index in range(40)
    }
    write(tmp_path / "a.safetensors", tensors)
    monkeypatch.undo()
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_read_only_folder_is_reported(tmp_path, listing, monkeypatch, sentences, subtests):
    for code in [errno.EACCES, errno.EPERM, errno.EROFS]:
        with subtests.test(code=code), monkeypatch.context() as patch:
            patch.setattr(partial, "open", failing(code), raising=False)
            with sentences.raises(OutputError):
                SafetensorsWriter(tmp_path / "a.safetensors", 100)
            assert listing() == []


def test_folder_that_cannot_be_created_is_reported(tmp_path, listing, sentences):
    (tmp_path / "file").write_text("in the way")
    with sentences.raises(OutputError):
        SafetensorsWriter(tmp_path / "file" / "a.safetensors", 100)
    assert listing() == ["file"]


def test_too_long_name_is_reported(tmp_path, listing, sentences):
    with sentences.raises(OutputError):
        SafetensorsWriter(tmp_path / ("a" * 300 + ".safetensors"), 100)
    assert listing() == []


CHECKED = {
    "a": torch.arange(1000.0),
    "odd": torch.arange(1001).to(torch.uint8),
    "b": torch.zeros(500),
    "large": torch.zeros(9_000_000, dtype=torch.uint8),
}


def test_file_that_another_process_wrote_to_is_not_published(tmp_path, listing, monkeypatch, sentences, subtests):
    for damaged in ["header", *CHECKED]:
        with subtests.test(damaged=damaged), monkeypatch.context() as patch:
            real = SafetensorsWriter._check_file

            def check(out: SafetensorsWriter, header: bytes, damaged=damaged, real=real) -> None:
                place = (
                    20 if damaged == "header" else out._data_start + out._layout.entries[damaged]["data_offsets"][1] - 1
                )
                (hidden,) = tmp_path.glob(".*.partial")
                with open(hidden, "r+b") as file:
                    file.seek(place)
                    (byte,) = file.read(1)
                    file.seek(place)
                    file.write(bytes([byte ^ 1]))
                real(out, header)

            patch.setattr(SafetensorsWriter, "_check_file", check)
            with sentences.raises(OutputError):
                write(tmp_path / "x.safetensors", CHECKED, {"key": "value"})
            assert listing() == []


def test_bytes_that_were_damaged_on_the_way_to_the_file_are_noticed(
    tmp_path, listing, monkeypatch, sentences, subtests
):
    for damaged in CHECKED:
        with subtests.test(damaged), monkeypatch.context() as patch:
            real = writer.byte_views

            def damage(tensor, staging, damaged=damaged, real=real):
                wrong = tensor.clone()
                wrong.view(torch.uint8)[-100] ^= 1
                return real(wrong if tensor is CHECKED[damaged] else tensor, staging)

            patch.setattr(writer, "byte_views", damage)
            with sentences.raises(OutputError):
                write(tmp_path / "x.safetensors", CHECKED)
            assert listing() == []


@pytest.mark.posix(reason="the file is removed while the check still reads it")
def test_check_of_the_file_is_shown_and_can_be_cancelled(tmp_path, listing, monkeypatch):
    shown, checks = [], []

    class Stop(Exception):
        pass

    def check() -> None:
        checks.append(1)
        if shown:
            raise Stop

    with pytest.raises(Stop), SafetensorsWriter(tmp_path / "a", 4096, check=check) as out:
        for name in "ab":
            out.add(name, torch.zeros(1000))
        reading, go_on = threading.Event(), threading.Event()
        real = writer.FileChecksums.compute

        def wait(self, file, sizes):
            for checksum in real(self, file, sizes):
                if out._checked:
                    reading.set()
                    assert go_on.wait(60)
                yield checksum

        monkeypatch.setattr(writer.FileChecksums, "compute", wait)
        try:
            out.finish({}, lambda done, total: shown.append((done, total)))
        finally:
            out.abort()
            go_on.set()
    assert shown == [(4000, 8000)]
    assert reading.is_set()
    assert listing() == []
