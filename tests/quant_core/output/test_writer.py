"""The writer against safetensors' own reader; and that a file is either complete or not there."""

import errno
import fcntl
import itertools
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from learned_rounding.quant_core.errors import OutputError
from learned_rounding.quant_core.output import SafetensorsWriter, header_bytes, layout, partial, remove_leftovers
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
    """Scalars, empty tensors, sizes that 8 does not divide; dtypes alternate, so that in this order none is aligned."""
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
    """The header and where the data begin."""
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
        assert info(loaded[name]) == info(tensor) and raw(loaded[name]) == raw(tensor), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == set(tensors)
        assert torch.equal(file.get_tensor("F32.5x7"), tensors["F32.5x7"])
        assert list(file.get_slice("BF16.8x4").get_shape()) == [8, 4]


def test_our_reader_reads_it_too(tmp_path):
    tensors = mixed()
    write(tmp_path / "a.safetensors", tensors, {"a": "b"})
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"a": "b"}
        assert {name: (info(file.read(name)), raw(file.read(name))) for name in file.tensors} == {
            name: (info(tensor), raw(tensor)) for name, tensor in tensors.items()
        }


def test_every_tensor_is_aligned_and_nothing_lies_between(tmp_path):
    """Readers view the mapped file in place: an offset that the item size does not divide costs a copy, or fails."""
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
    assert spans[0][0] == 0 and all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert start + spans[-1][1] == (tmp_path / "a.safetensors").stat().st_size


def test_views_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {"t": base.t(), "s": base[1:3, ::2], "p": torch.nn.Parameter(base), "e": torch.zeros(1, 4).expand(3, 4)}
    write(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_odd_sizes_larger_than_the_spill(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "_SPILL", 64)
    tensors = {f"t{index}": torch.full((1001 + 2 * index,), index, dtype=torch.uint8) for index in range(5)}
    write(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    write(tmp_path / "a.safetensors", mixed(), {"a": "b"})
    write(tmp_path / "b.safetensors", mixed(), {"a": "b"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_tensors_of_aligned_sizes_stand_in_the_order_they_came(tmp_path):
    names = ["z", "b", "m", "a"]
    write(tmp_path / "a.safetensors", {name: torch.zeros(2) for name in names})
    header, _ = header_of(tmp_path / "a.safetensors")
    assert [name for name in header if name != "__metadata__"] == names


def test_a_file_without_tensors(tmp_path):
    write(tmp_path / "a.safetensors", {}, {"a": "b"})
    assert load_file(tmp_path / "a.safetensors") == {}


NAMES = st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=6).map(tuple)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPE_NAMES)), SHAPES), max_size=8),
    st.dictionaries(st.text(max_size=12), st.text(max_size=40), max_size=4),
)
@example({'\U0001f600\x00"\\\x7f  ': (torch.bool, (1,) * 6)}, {"\U0001f600": '\x00\x1f"\\/'})
def test_the_room_left_for_the_header_is_never_too_small(specs, metadata):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in specs.items()}
        write(path, tensors, metadata)
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(tensors)
            assert (file.metadata() or {}) == metadata
        with SafetensorsFile(path) as file:
            assert {name: spec for name, spec in file.tensors.items()} == {
                name: TensorInfo(*spec) for name, spec in specs.items()
            }
            assert file.metadata == metadata


def test_the_room_suffices_for_files_of_many_terabytes():
    huge = {f"t{index}": TensorInfo(torch.float32, (2**20, 2**20)) for index in range(3)}
    header, end = {"__metadata__": {}}, 0
    for name, entry in huge.items():
        header[name] = {"dtype": "F32", "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    assert end > 10**13
    assert len(json.dumps(header, separators=(",", ":"))) <= header_bytes(huge.items(), {})


# A file is complete, or it is not there.


def test_nothing_stands_under_the_final_name_before_the_end(tmp_path, listing):
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, 4096) as out:
        assert not path.exists()
        out.add("a", torch.zeros(10_000))
        out.add("odd", torch.zeros(3, dtype=torch.uint8))
        assert not path.exists()
        (hidden,) = listing()
        assert hidden.startswith(".a.safetensors.") and hidden.endswith(".partial")
        out.finish({})
        assert listing() == ["a.safetensors"]
    assert listing() == ["a.safetensors"]


def test_an_existing_file_stays_whole_until_the_end(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"old": torch.zeros(4)})
    before = path.read_bytes()
    with SafetensorsWriter(path, 4096) as out:
        out.add("new", torch.ones(4))
        assert path.read_bytes() == before
        out.finish({})
    assert set(load_file(path)) == {"new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_inside_leaves_nothing(tmp_path, listing, error):
    with pytest.raises(error):
        with SafetensorsWriter(tmp_path / "a.safetensors", 4096) as out:
            out.add("a", torch.zeros(10_000))
            raise error
    assert listing() == []


def test_leaving_without_finish_leaves_nothing(tmp_path, listing):
    with SafetensorsWriter(tmp_path / "a.safetensors", 4096) as out:
        out.add("a", torch.zeros(100))
    assert listing() == []


@pytest.mark.parametrize("size", [1000, 3], ids=["in order", "of an odd size"])
def test_a_name_is_written_once(tmp_path, listing, size):
    """The header would hold one of the two, and the other be a hole."""
    with (
        pytest.raises(ValueError, match="tensor a is written twice"),
        SafetensorsWriter(tmp_path / "a.safetensors", 1000) as out,
    ):
        out.add("a", torch.zeros(size, dtype=torch.uint8))
        out.add("a", torch.ones(1000, dtype=torch.uint8))
    assert listing() == []


def test_an_error_leaves_the_existing_file(tmp_path, listing):
    write(tmp_path / "a.safetensors", {"old": torch.zeros(4)})
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(RuntimeError):
        with SafetensorsWriter(tmp_path / "a.safetensors", 4096):
            raise RuntimeError
    assert listing() == ["a.safetensors"] and (tmp_path / "a.safetensors").read_bytes() == before


def test_a_missing_folder_is_made(tmp_path, listing):
    write(tmp_path / "new" / "deep" / "a.safetensors", {"a": torch.zeros(1)})
    assert listing() == ["new/deep/a.safetensors"]


class _Full:
    """A file on a disk that fills up after so many bytes."""

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


SENTENCES = {
    errno.ENOSPC: "The disk is full: .*nothing of it is left; free some space",
    errno.EDQUOT: "The disk is full",
    errno.EIO: "cannot be written: Input/output error; check the disk",
}


@pytest.mark.parametrize("code", SENTENCES, ids=errno.errorcode.get)
@pytest.mark.parametrize("room", [0, 5000, 41_000], ids=["first tensor", "second tensor", "end"])
def test_a_disk_that_fails_leaves_nothing(tmp_path, listing, monkeypatch, room, code):
    """41,000 bytes hold both large tensors; what is left to write is the odd one and the header."""
    real = open
    monkeypatch.setattr(
        partial, "open", lambda path, mode, **options: _Full(real(path, mode, **options), room, code), raising=False
    )
    with pytest.raises(OutputError, match=SENTENCES[code]) as caught:
        write(
            tmp_path / "a.safetensors",
            {"a": torch.zeros(1000), "b": torch.zeros(9000), "odd": torch.zeros(1001, dtype=torch.uint8)},
        )
    monkeypatch.undo()
    assert str(tmp_path / "a.safetensors") in str(caught.value)
    assert listing() == []


@pytest.mark.parametrize("code", SENTENCES, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_the_very_end_leaves_nothing(tmp_path, listing, monkeypatch, call, code):
    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match=SENTENCES[code]):
        write(tmp_path / "a.safetensors", {"a": torch.zeros(1000)})
    monkeypatch.undo()
    assert listing() == []


def test_a_writer_takes_as_many_writes_as_the_system_wants(tmp_path, monkeypatch):
    """One write call may take only a part, and on a disk that is nearly full it does so without an error."""

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


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS], ids=errno.errorcode.get)
def test_a_read_only_folder(tmp_path, listing, monkeypatch, code):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(partial, "open", refuse, raising=False)
    with pytest.raises(OutputError, match=f"The folder {tmp_path} is read-only for this user; choose another output"):
        SafetensorsWriter(tmp_path / "a.safetensors", 100)
    assert listing() == []


def test_a_folder_that_cannot_be_made(tmp_path, listing):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        SafetensorsWriter(tmp_path / "file" / "a.safetensors", 100)
    assert listing() == ["file"]


def test_a_name_too_long_for_the_disk(tmp_path, listing):
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        SafetensorsWriter(tmp_path / ("a" * 300 + ".safetensors"), 100)
    assert listing() == []


# What dead runs left behind, and what living ones need.


def leftover(path: Path, mark: str = "00ab12cd") -> Path:
    left = path.with_name(f".{path.name}.{mark}.partial")
    left.write_bytes(b"half a file")
    return left


@pytest.mark.parametrize("name", ["a.safetensors", "with space.safetensors", "[x]*?.safetensors", "ü.safetensors"])
def test_leftovers_of_dead_runs_are_removed(tmp_path, listing, name):
    path = tmp_path / name
    leftover(path), leftover(path, "11111111")
    path.write_bytes(b"the file itself")
    assert remove_leftovers(path) == 2
    assert listing() == [name]


def test_leftovers_are_removed_where_no_open_file_can_be(tmp_path, listing, monkeypatch):
    """As on Windows."""
    real = Path.unlink

    def unlink(path, **options):
        opened = (os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
        if str(path) in opened:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        real(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(partial, "WINDOWS", True)
    leftover(tmp_path / "a.safetensors"), leftover(tmp_path / "a.safetensors", "11111111")
    assert remove_leftovers(tmp_path / "a.safetensors") == 2
    assert listing() == []


def test_files_of_other_outputs_are_left_alone(tmp_path, listing):
    others = [
        leftover(tmp_path / "b.safetensors"),
        leftover(tmp_path / "ba.safetensors"),
        leftover(tmp_path / "x.safetensors"),
    ]
    (tmp_path / "a.safetensors.partial").write_bytes(b"somebody else's")
    before = listing()
    assert remove_leftovers(tmp_path / "a.safetensors") == 0
    assert remove_leftovers(tmp_path / "[ax].safetensors") == 0
    assert listing() == before and all(other.exists() for other in others)


def test_a_living_run_in_this_process_keeps_its_file(tmp_path):
    with SafetensorsWriter(tmp_path / "a.safetensors", 4096) as out:
        out.add("a", torch.zeros(1000))
        leftover(tmp_path / "a.safetensors")
        assert remove_leftovers(tmp_path / "a.safetensors") == 1
        out.finish({})
    assert set(load_file(tmp_path / "a.safetensors")) == {"a"}


def test_a_living_run_in_another_process_keeps_its_file(tmp_path):
    left = leftover(tmp_path / "a.safetensors")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'rb'); fcntl.flock(f, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(left)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        assert remove_leftovers(tmp_path / "a.safetensors") == 0 and left.exists()
        holder.stdin.close()
        holder.wait()
    assert remove_leftovers(tmp_path / "a.safetensors") == 1 and not left.exists()


def test_the_partial_file_is_held_by_its_writer(tmp_path):
    with SafetensorsWriter(tmp_path / "a.safetensors", 4096):
        (hidden,) = tmp_path.glob(".*.partial")
        with open(hidden, "rb") as other, pytest.raises(OSError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
