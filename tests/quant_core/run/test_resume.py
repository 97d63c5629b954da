"""The journal of a run with its writer: flushes in the background, records that come back, layers that are restored."""

import errno
import os
import stat
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core.errors import OutputError
from learned_rounding.quant_core.events import LayerKept
from learned_rounding.quant_core.output import SafetensorsWriter, header_bytes, partial, remove_leftovers
from learned_rounding.quant_core.run import resume
from learned_rounding.quant_core.run.recorded import RecordedSource
from learned_rounding.quant_core.run.resume import JournalFile, RunJournal
from learned_rounding.quant_core.sources import SafetensorsFile, TensorSource
from learned_rounding.quant_core.sources.source import CPU
from learned_rounding.tests.system import needs_symlinks


class Run:
    """A writer with its journal, over tensors that are their own source, or over a source of its own."""

    def __init__(
        self, path, tensors: dict[str, torch.Tensor], key: str = "a run", source: RecordedSource | None = None
    ):
        self.source = source = source or RecordedSource(TensorSource(tensors))
        self.journal = RunJournal(key, source, lambda name: CPU)
        reserve = header_bytes(source.tensors.items(), {})
        self.writer = SafetensorsWriter(path, reserve, journal=self.journal)

    def add(self, name: str) -> None:
        tensor = self.source.read(name)
        self.writer.add(name, tensor)
        self.journal.record_layer([LayerKept(name=name, shape=tuple(tensor.shape), reason="test")], None)

    @property
    def restored(self) -> list[str]:
        return [layer.events[0].name for layer in self.journal.layers]

    def kill(self) -> None:
        """Close the files and leave them as a killed process does."""
        self.writer._partial.abort(keep=True)


@pytest.fixture
def tensors():
    """Three tensors, one of them of a size that 8 does not divide."""
    return {"a": torch.arange(1000.0), "odd": torch.arange(1001).to(torch.uint8), "b": torch.ones(500)}


def test_writer_does_not_wait_for_flushes_before_the_end(tmp_path, listing, monkeypatch):
    tensors = {name: torch.randn(40_000) for name in "abc"}
    main, released, synced = threading.get_ident(), threading.Event(), []

    def fsync(descriptor: int) -> None:
        files = {path.stat().st_ino for path in tmp_path.iterdir()}  # a thread of another test may still flush its file
        if threading.get_ident() != main and os.fstat(descriptor).st_ino in files:
            synced.append(descriptor)
            assert released.wait(60)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(resume, "_FLUSH_INTERVAL", 1)
    run = Run(tmp_path / "a.safetensors", tensors)
    with run.writer:
        for name in tensors:
            run.add(name)
        released.set()
        run.writer.finish({})
    # The file and its journal once, as the first flush ran all the time, and the file twice at the end: while it is
    # checked, and before it gets its name.
    assert len(synced) == 4
    assert listing() == ["a.safetensors"]
    assert all(torch.equal(load_file(tmp_path / "a.safetensors")[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("layers", [1, 2], ids=["at the end", "at the next layer"])
def test_failed_flush_in_the_background_leaves_nothing(tmp_path, listing, monkeypatch, layers, sentences):
    """The system reports lost writes once, perhaps to a flush whose result is not yet read."""
    tensors = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    main, failed = threading.get_ident(), threading.Event()

    def fsync(descriptor: int) -> None:
        if threading.get_ident() != main:
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(resume, "_FLUSH_INTERVAL", 1)
    run = Run(tmp_path / "a.safetensors", tensors)
    run.add("a")
    assert failed.wait(60)
    with pytest.raises(OSError):
        run.journal.wait_for_flush()
    with sentences.raises(OutputError):
        if layers == 2:
            run.add("b")
        else:
            run.writer.finish({})
    assert listing() == []


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_killed_run_is_resumed_and_the_file_has_the_same_bytes(tmp_path, listing, tensors, layers):
    names = list(tensors)

    def complete(path, killed_after: int) -> list[str]:
        if killed_after:
            killed = Run(path, tensors)
            for name in names[:killed_after]:
                killed.add(name)
            killed.kill()
        run = Run(path, tensors)
        for name in names[killed_after:]:
            run.add(name)
        run.writer.finish({"a": "b"})
        return run.restored

    assert complete(tmp_path / "whole", 0) == []
    assert complete(tmp_path / "resumed", layers) == names[:layers]
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert listing() == ["resumed", "whole"]


def test_tensors_after_the_last_layer_record_are_not_restored(tmp_path, tensors):
    killed = Run(tmp_path / "a", tensors)
    killed.add("a")
    killed.writer.add("b", tensors["b"])
    killed.kill()
    run = Run(tmp_path / "a", tensors)
    assert run.restored == ["a"]
    run.add("b")
    run.add("odd")
    run.writer.finish({})
    assert all(torch.equal(load_file(tmp_path / "a")[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("changed", ["key", "weights"])
def test_another_run_is_not_resumed(tmp_path, tensors, changed):
    killed = Run(tmp_path / "a", tensors)
    killed.add("a")
    killed.kill()
    if changed == "weights":
        tensors["a"][500] = -1
    run = Run(tmp_path / "a", tensors, key="another run" if changed == "key" else "a run")
    assert run.restored == []
    run.writer.abort()


NEEDS_PIPES = pytest.mark.posix(reason="pipes have names")
PLANTED = {
    "link": lambda hidden, other: hidden.symlink_to(other),
    "hard link": lambda hidden, other: hidden.hardlink_to(other),
    "pipe": lambda hidden, other: os.mkfifo(hidden),
    "folder": lambda hidden, other: hidden.mkdir(),
}


@pytest.mark.parametrize(
    "planted, suffix",
    [
        pytest.param("link", ".partial", marks=needs_symlinks),
        pytest.param("link", ".journal", marks=needs_symlinks),
        ("hard link", ".partial"),
        pytest.param("pipe", ".journal", marks=NEEDS_PIPES),
        pytest.param("pipe", ".partial", marks=NEEDS_PIPES),
        ("folder", ".journal"),
    ],
)
def test_planted_file_is_not_followed(tmp_path, tensors, planted, suffix):
    """The other file has the bytes of the killed run, so that only its place shows that another run wrote it."""
    killed = Run(tmp_path / "a", tensors)
    killed.add("a")
    killed.kill()
    (hidden,) = tmp_path.glob(f".a.*{suffix}")
    other = tmp_path / "other file of the user"
    hidden.rename(other)
    before = other.read_bytes()
    PLANTED[planted](hidden, other)
    run = Run(tmp_path / "a", tensors)
    assert run.restored == []
    for name in tensors:
        run.add(name)
    run.writer.finish({})
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "a").stat().st_nlink == 1
    assert other.read_bytes() == before
    remove_leftovers(tmp_path / "a")
    left = {path.name for path in tmp_path.iterdir()} - {hidden.name}
    assert left == {"a", other.name}
    assert not hidden.exists() or planted == "folder"
    assert other.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner")
@pytest.mark.parametrize("same_owner", [False, True], ids=["another user", "a disk of one owner"])
def test_files_of_another_user_are_not_resumed(tmp_path, tensors, monkeypatch, same_owner):
    killed = Run(tmp_path / "a", tensors)
    killed.add("a")
    killed.kill()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    if not same_owner:
        real = os.fstat
        monkeypatch.setattr(partial.tempfile, "TemporaryFile", lambda **options: open(os.devnull, "rb"))
        monkeypatch.setattr(
            os, "fstat", lambda descriptor: OwnedBy(real(descriptor), user + stat.S_ISCHR(real(descriptor).st_mode))
        )
    run = Run(tmp_path / "a", tensors)
    assert run.restored == (["a"] if same_owner else [])
    run.writer.abort()


class OwnedBy:
    """The status of a file with another owner."""

    def __init__(self, status: os.stat_result, user: int):
        self._status, self.st_uid = status, user

    def __getattr__(self, name: str):
        return getattr(self._status, name)


@pytest.mark.posix(reason="an open file is renamed")
def test_file_that_is_replaced_before_it_has_its_name_is_not_published(tmp_path, tensors, sentences):
    run = Run(tmp_path / "a", tensors)
    for name in tensors:
        run.add(name)
    (hidden,) = tmp_path.glob(".a.*.partial")
    hidden.rename(tmp_path / "elsewhere")
    hidden.write_bytes(b"of somebody else")
    with sentences.raises(OutputError):
        run.writer.finish({})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("changed", [None, "a", "b"])
def test_source_that_is_changed_in_place_is_resumed_up_to_the_change(tmp_path, listing, changed):
    """One bit in the middle of a tensor, with the times of before: no sample of the fingerprint is there."""
    path, out = tmp_path / "source.safetensors", tmp_path / "out"
    save_file({name: torch.zeros(100_000, dtype=torch.uint8) for name in "abc"}, path)

    def start() -> Run:
        return Run(out, {}, source=RecordedSource(opened))

    with SafetensorsFile(path) as opened:
        killed = start()
        for name in "ab":
            killed.add(name)
        killed.kill()
        if changed:
            before = path.stat()
            with open(path, "r+b") as file:
                file.seek(opened._offsets[changed] + 50_001)
                file.write(b"\x80")
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with SafetensorsFile(path) as opened:
        run = start()
        assert run.restored == {None: ["a", "b"], "a": [], "b": ["a"]}[changed]
        for name in "abc"[len(run.restored) :]:
            run.add(name)
        run.writer.finish({})
    remove_leftovers(out)
    assert load_file(out).keys() == set("abc")
    assert all(torch.equal(load_file(out)[name], tensor) for name, tensor in load_file(path).items())
    assert listing() == ["out", "source.safetensors"]


def test_layers_of_a_killed_run_are_read_back(tmp_path):
    """Also tensors that wait for the end of the file since 8 does not divide their size."""
    tensors = {
        "blocks.1.weight": torch.arange(64, dtype=torch.int8).reshape(8, 8),
        "blocks.1.weight_scale": torch.tensor([0.5, 0.25, 0.125]),
        "blocks.1.comfy_quant": torch.arange(13, dtype=torch.uint8),
        "blocks.10.weight": torch.ones(4),
        "blocks.1.inner.weight": torch.ones(4),
    }
    killed = Run(tmp_path / "a", tensors)
    for name in tensors:
        killed.add(name)
    killed.kill()
    run = Run(tmp_path / "a", tensors)
    for _ in range(2):
        found = run.journal.read_layer("blocks.1")
        assert found.keys() == {"weight", "weight_scale", "comfy_quant"}
        assert all(torch.equal(tensor, tensors[f"blocks.1.{suffix}"]) for suffix, tensor in found.items())
    assert run.journal.read_layer("blocks.10").keys() == {"weight"}
    assert run.journal.read_layer("blocks.1.inner").keys() == {"weight"}
    assert run.journal.read_layer("blocks.2") == {}
    run.writer.finish({})
    assert all(torch.equal(load_file(tmp_path / "a")[name], tensor) for name, tensor in tensors.items())


def test_run_with_a_live_writer_is_not_resumed(tmp_path, tensors):
    alive = Run(tmp_path / "a", tensors)
    alive.add("a")
    other = Run(tmp_path / "a", tensors)
    assert other.restored == []
    other.writer.abort()
    alive.writer.abort()


def test_tensor_that_is_recorded_twice_ends_the_restored_layers(tmp_path, tensors, sentences):
    killed = Run(tmp_path / "a", tensors)
    killed.add("a")
    with sentences.raises(ValueError):
        killed.add("a")
    killed.add("b")
    killed.kill()
    run = Run(tmp_path / "a", tensors)
    assert run.restored == ["a"]
    run.writer.abort()


def test_records_come_back_up_to_the_first_torn_one(tmp_path):
    with open(tmp_path / "journal", "w+b", buffering=0) as file:
        journal = JournalFile(file)
        begin = journal.append({"a": float("inf")}, b"payload")
        journal.append({"b": "ü"})
        assert [(record, size) for record, _, size in journal.records()] == [({"a": float("inf")}, 7), ({"b": "ü"}, 0)]
        assert journal.payload(begin, 7) == b"payload"
        file.seek(begin + 7 + 17)
        file.write(b"\xff")
        assert [record for record, _, _ in journal.records()] == [{"a": float("inf")}]
