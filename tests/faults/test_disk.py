"""Disks that are full, fail, are slow or change below a run: the whole file or none, one sentence, and the next run works."""

import contextlib
import errno
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time

import gguf
import pytest
import torch
from safetensors.torch import save, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.calibration import (
    CalibrationFile,
    InMemoryCalibration,
    LayerStatistics,
    LowRankHessian,
)
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.errors import OutputError, SourceError
from learned_rounding.quant_core.events import LayerMeasured, LayerStarted
from learned_rounding.quant_core.output import partial as partial_files
from learned_rounding.quant_core.run import io_threads, quantize
from learned_rounding.quant_core.sources import tensor_file as reader
from learned_rounding.tests.faults.conftest import make_case, tensors
from learned_rounding.tests.faults.disk import Disk, failing, killed, once

pytestmark = pytest.mark.soak

SEED = 30
NAMES = [
    "with space",
    "ü€漢😀",
    "[a]*?",
    "-rf",
    "~",
    "%s{0}$HOME",
    "a'b\"c",
    "tab\tline\nbreak",
    "..",
    "\u202egnp",
    "#;&|<>",
    "\udcff raw byte",
    "CON",
]


def quantized(case):
    return quantize_file(case.source, case.target, case.recipe, device="cpu")


def operations(case, *modules) -> int:
    with Disk(reads=bool(modules)).under(*modules) as disk:
        quantized(case)
    case.clear()
    return len(disk.operations)


ERRORS = [errno.ENOSPC, errno.EIO]


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_writing_fails_anywhere(case, often, tried, code, sentences):
    """From the first failure on everything fails, removals too: they are left to the next run."""
    every = operations(case)
    named = every - 3  # then: the folder's flush, two removals
    points = random.Random(SEED).sample(range(every), often(24, every))
    for at in points:
        with Disk(at, failing(code)).under():
            failed = sentences.raises(OutputError, repeated=True)
            with failed if at <= named else contextlib.nullcontext():
                quantized(case)
            case.check(complete=at >= named)
        case.again()
        case.clear()
    tried(f"{errno.errorcode[code]} at a random write", len(points), "whole or none")


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_going_on_fails_anywhere(one_case, often, tried, code):
    """A run that resumes another, on a disk where one operation fails, reads included: what is uncertain is quantized again."""
    case = one_case

    def dead():
        assert killed(case.source, case.target, case.recipe, "disk", 40)

    dead()
    with Disk(reads=True).under() as disk:
        quantized(case)
    case.clear()
    points = random.Random(SEED).sample(range(len(disk.operations)), often(16, len(disk.operations)))
    points += [at for at, operation in enumerate(disk.operations) if operation.startswith("cut")]  # when all was read
    looked = next(
        at for at, operation in enumerate(disk.operations) if operation.startswith("write")
    )  # at the files of the killed run
    for at in points:
        dead()
        with (
            Disk(at, once(failing(code)), reads=True).under(),
            contextlib.nullcontext() if at < looked else contextlib.suppress(OutputError),
        ):
            quantized(case)
        case.check(complete=True if at < looked else None)
        case.again()
        case.clear()
    tried(
        f"{errno.errorcode[code]} at a random operation of a run that resumes another",
        len(points),
        "whole or none",
    )


def test_reading_fails_anywhere(case, often, tried, sentences):
    every = operations(case, reader)
    points = random.Random(SEED).sample(range(every), often(14, every))
    for at in points:
        with (
            Disk(at, failing(errno.EIO), reads=True).under(reader),
            sentences.raises(SourceError, repeated=True),
        ):
            quantized(case)
        case.check(complete=False)
        case.again()
        case.clear()
    tried("EIO at a random read", len(points), "whole or none")


CHANGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "written over": lambda path: path.write_bytes(save(tensors(1), {"author": "me"})),
    "one byte changed": lambda path: _poke(path),
}


def _poke(path):
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_below_a_run_makes_no_file(one_case, change, often, tried, sentences):
    layers = range(0, 8, often(3, 1))
    before = one_case.source.read_bytes()
    for index in layers:

        def listener(event, index=index):
            if isinstance(event, LayerStarted) and event.index == index:
                CHANGES[change](one_case.source)

        with sentences.raises(SourceError, repeated=True):
            quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu", on_event=listener)
        one_case.source.write_bytes(before)
        one_case.check(complete=False)
        one_case.again()
        one_case.clear()
    tried(f"source {change} during the run", len(layers), "none, one sentence, next run works")


def test_a_source_that_changes_while_formats_are_measured_makes_no_file(one_case, tried, sentences):
    """It is read three times: for its fingerprint, to measure, and to quantize."""
    inputs = torch.randn(96, 65, generator=torch.Generator().manual_seed(0))
    held_out = LowRankHessian(inputs.t() / 96**0.5, torch.zeros(65))
    known = InMemoryCalibration(
        {f"blocks.{block}.mlp": LayerStatistics(inputs.t() @ inputs / 96, held_out) for block in range(3)}
    )
    before = one_case.source.read_bytes()

    def listener(event):
        if isinstance(event, LayerMeasured) and event.index == 1:
            CHANGES["written over"](one_case.source)

    with sentences.raises(SourceError):
        quantize_file(
            one_case.source,
            one_case.target,
            Recipe(format="measured"),
            calibration=known,
            device="cpu",
            on_event=listener,
        )
    one_case.source.write_bytes(before)
    one_case.check(complete=False)
    one_case.again()
    tried("source written over while formats are measured", 1, "none, one sentence, next run works")


def _gguf(path):
    file = gguf.GGUFWriter(path, "flux")
    for name, tensor in tensors().items():
        file.add_tensor(name, tensor.float().numpy())
    for step in (file.write_header_to_file, file.write_kv_data_to_file, file.write_tensors_to_file, file.close):
        step()


@pytest.mark.parametrize(
    "suffix, write", [(".pt", lambda path: torch.save(tensors(), path)), (".gguf", _gguf)], ids=["pt", "gguf"]
)
def test_other_files_may_be_cut_short_below_a_run(tmp_path, monkeypatch, suffix, write, often, tried, sentences):
    """A file that is mapped and then cut short ends the process, and a server with it."""
    monkeypatch.setattr(io_threads, "_QUEUE", 0)  # else all of it is read before the first layer
    source, target, layers = tmp_path / f"model{suffix}", tmp_path / "out.safetensors", range(0, 4, often(2, 1))
    for index in layers:
        write(source)

        def listener(event, index=index):
            if isinstance(event, LayerStarted) and event.index == index:
                CHANGES["truncated"](source)

        with sentences.raises(SourceError, repeated=True):
            quantize_file(source, target, device="cpu", on_event=listener)
        assert list(tmp_path.iterdir()) == [source]
    tried(f"{suffix} file truncated during the run", len(layers), "none, one sentence, next run works")


def test_a_source_that_is_replaced_or_removed_is_read_to_its_end(one_case, tried):
    for change in (os.unlink, lambda path: os.replace(save_other(path), path)):
        before = one_case.source.read_bytes()

        def listener(event, change=change):
            if isinstance(event, LayerStarted) and event.index == 2:
                change(one_case.source)

        quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu", on_event=listener)
        one_case.source.write_bytes(before)
        one_case.check(complete=True)
        one_case.clear()
    tried("source replaced or removed during the run", 2, "the file of the old source, whole")


def save_other(path):
    other = path.with_name("other")
    save_file(tensors(1), other)
    return other


def test_a_read_only_folder(one_case, capsys, monkeypatch, tried, sentences):
    def refuse(path, mode="r", **options):
        if "x" in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open(path, mode, **options)

    monkeypatch.setattr(partial_files, "open", refuse, raising=False)
    assert main(["quantize", "-i", str(one_case.source), "-o", str(one_case.target), "--general"]) == 1
    sentences(capsys.readouterr().err.splitlines()[-1])
    monkeypatch.undo()
    one_case.check(complete=False)
    one_case.again()
    tried("read-only folder", 1, "none, one sentence, next run works")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name")
def test_a_pipe_is_no_output(one_case, tried, sentences):
    os.mkfifo(one_case.target)
    for overwrite in (False, True):
        with sentences.raises(OutputError):
            quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu", overwrite=overwrite)
    assert one_case.target.is_fifo()
    one_case.clear()
    tried("a pipe as the output", 2, "none, one sentence, next run works")


def test_a_link_is_followed(one_case, tmp_path_factory, tried, sentences):
    """The file it leads to is written, there already or not; the link stays."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "real.safetensors"
    one_case.target.symlink_to(elsewhere)
    for overwrite in (False, True):
        quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu", overwrite=overwrite)
        assert one_case.target.is_symlink()
        assert elsewhere.read_bytes() == one_case.expected
        assert [path.name for path in elsewhere.parent.iterdir()] == [elsewhere.name]
        elsewhere.write_bytes(b"another's")
    with sentences.raises(OutputError):
        quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu")
    assert elsewhere.read_bytes() == b"another's"
    tried("a link as the output", 3, "the file it leads to, whole or untouched")


@pytest.mark.parametrize(
    "name",
    ["a" * 300 + ".safetensors", "a" * 245 + ".safetensors", "new/folder/" + "a" * 300],
    ids=["300", "245", "folder"],
)
def test_names_that_no_disk_takes(one_case, name, tried, sentences):
    with sentences.raises(OutputError):
        quantize_file(one_case.source, one_case.target.parent / name, one_case.recipe, device="cpu")
    assert list(one_case.target.parent.iterdir()) == [one_case.source]
    tried("an output name that is too long", 1, "none, one sentence, next run works")


def test_a_run_that_fails_leaves_no_folder_behind(one_case, tried):
    deep = one_case.target.parent / "new" / "deep" / "out.safetensors"
    with Disk(3, failing(errno.EIO)).under(), pytest.raises(OutputError):
        quantize_file(one_case.source, deep, one_case.recipe, device="cpu")
    leftovers = sorted(path.name for path in deep.parent.iterdir())  # the disk refused to remove them
    with Disk(3, once(failing(errno.EIO))).under(), pytest.raises(OutputError):
        quantize_file(one_case.source, deep.with_name("other.safetensors"), one_case.recipe, device="cpu")
    assert sorted(path.name for path in deep.parent.iterdir()) == leftovers
    quantize_file(one_case.source, deep, one_case.recipe, device="cpu")
    assert [path.name for path in deep.parent.iterdir()] == [deep.name]
    further = one_case.target.parent / "further" / "out.safetensors"
    with Disk(3, once(failing(errno.EIO))).under(), pytest.raises(OutputError):
        quantize_file(one_case.source, further, one_case.recipe, device="cpu")
    assert not further.parent.exists()
    tried("a disk that fails below a new folder", 3, "none, one sentence, next run works")


@pytest.mark.parametrize("name", NAMES)
def test_odd_file_names(tmp_path, name, tried):
    """Under any name the file is the same, a killed run is resumed, and other files stay."""
    case = make_case(tmp_path, name=f"{name}.safetensors")
    other = tmp_path / f".other{name}.safetensors.00000000.partial"
    other.write_bytes(b"another's")
    renamed = case.source.rename(tmp_path / f"in {name}.safetensors")
    assert killed(renamed, case.target, case.recipe, "disk", 30)
    quantize_file(renamed, case.target, case.recipe, device="cpu")
    assert case.target.read_bytes() == case.expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.name, renamed.name, case.target.name])
    tried("a file name with odd characters", 1, "whole or none")


@pytest.fixture
def small_disk(tmp_path_factory):
    """A file system of its own with room for 64 KiB, where this machine lets a test have one."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = (
        shutil.which("mount")
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode
        == 0
    )
    if not mounted:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(one_case, small_disk, tried, sentences, monkeypatch):
    """First with the check of free space left out, as on a disk that fills up during the run."""
    check = quantize.check_disk_space
    monkeypatch.setattr(quantize, "check_disk_space", lambda path, size: None)
    for room in (0, 20_000, 60_000):
        (small_disk / "other").write_bytes(bytes(60_000 - room))
        with sentences.raises(OutputError):
            quantize_file(one_case.source, small_disk / "out.safetensors", one_case.recipe, device="cpu")
        assert [path.name for path in small_disk.iterdir()] == ["other"]
    monkeypatch.setattr(quantize, "check_disk_space", check)
    with sentences.raises(OutputError):
        quantize_file(one_case.source, small_disk / "out.safetensors", one_case.recipe, device="cpu")
    assert [path.name for path in small_disk.iterdir()] == ["other"]
    one_case.again()
    tried("a file system of 64 KiB that fills up", 4, "none, one sentence, next run works")


def test_the_command_line_prints_names_that_its_terminal_cannot(tmp_path, tried):
    case = make_case(tmp_path, name="\udcff 漢.safetensors")
    command = [
        sys.executable,
        "-m",
        "learned_rounding",
        "quantize",
        "--general",
        "-i",
        case.source,
        "-o",
        case.target,
        "--format",
        "int8_tensorwise",
        "--no-convrot",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    case.check(complete=True)
    tried("a file name that the terminal cannot show", 1, "whole or none")


def test_a_disk_that_stops_taking_data_does_not_stop_the_check(one_case, often, tried):
    """Each chosen operation, up to the last, goes on only after the run has looked at its cancellation check meanwhile."""
    every = operations(one_case)
    last = range(every - 6, every)  # header, flush, name, flush, two removals
    points = [*random.Random(SEED).sample(range(every - 6), often(3, 20)), *last]
    for at in points:
        looked, waiting = threading.Event(), threading.Event()

        def slow(file, data, looked=looked, waiting=waiting):
            waiting.set()
            assert looked.wait(timeout=60)

        with Disk(at, slow).under():
            quantize_file(
                one_case.source,
                one_case.target,
                one_case.recipe,
                device="cpu",
                check=lambda looked=looked, waiting=waiting: waiting.is_set() and looked.set(),
            )
        one_case.check(complete=True)
        one_case.clear()
    tried("a disk that keeps a write waiting", len(points), "whole; may be cancelled meanwhile")


def test_a_disk_that_takes_little_at_a_time(one_case, monkeypatch, tried):
    class Short:
        def __init__(self, file):
            self._file = file

        def write(self, data):
            return self._file.write(memoryview(data).cast("B")[:61])

        def __getattr__(self, name):
            return getattr(self._file, name)

    monkeypatch.setattr(partial_files, "open", lambda *args, **options: Short(open(*args, **options)), raising=False)
    quantized(one_case)
    one_case.check(complete=True)
    tried("a disk that takes 61 bytes at a time", 1, "whole or none")


class Stop(Exception):
    """What a host raises to cancel."""


@pytest.mark.parametrize("end", ["write", "read"])
def test_who_cancels_does_not_wait_for_a_disk_that_hangs(one_case, often, tried, end):
    """The run is over while the operation, at its end too, or the read still hangs; that ends when it can.

    Its files are gone at once, or its file is whole: it had its name already.
    """
    module = (reader,) if end == "read" else ()
    every = operations(one_case, *module)
    named = every - 3  # then, of a write: the folder's flush, two removals
    middle, last = (range(10, every // 2), []) if end == "read" else (range(every - 8), range(every - 8, every))
    points = [*random.Random(SEED).sample(middle, often(3, 20)), *last]
    for at in points:
        with cancelled_in_a_hanging(one_case, Disk(at, None, reads=bool(module)), *module):
            whole = end == "write" and at >= named
            one_case.check(complete=whole)
            if not whole:
                assert list(one_case.target.parent.iterdir()) == [one_case.source]
                one_case.again()  # a run of the same meanwhile
            one_case.clear()
        assert list(one_case.target.parent.iterdir()) == [one_case.source]
    tried(f"cancelled while a {end} hangs", len(points), "at once, whole or none, next run works")


@contextlib.contextmanager
def cancelled_in_a_hanging(case, disk, *modules):
    """A run that is cancelled when a thread of it hangs at the disk's point: it is over inside, and the thread goes on afterwards."""
    free, waiting = threading.Event(), threading.Event()

    def hang(file, data):
        if threading.current_thread().name.startswith("learned-rounding") and not waiting.is_set():
            waiting.set()
            assert free.wait(timeout=60)

    def check():
        if waiting.is_set():
            raise Stop

    disk.fault = hang
    with disk.under(*modules):
        with pytest.raises(Stop):
            quantize_file(case.source, case.target, case.recipe, device="cpu", check=check)
        try:
            yield
        finally:
            free.set()
            for thread in threading.enumerate():
                if thread.name.startswith("learned-rounding"):
                    thread.join(timeout=60)
                    assert not thread.is_alive()


def test_who_cancels_does_not_wait_for_what_a_dead_run_left_to_be_read(one_case, often, tried):
    """The journal is read before anything is resumed, and stays in place."""

    def dead() -> list[str]:
        assert killed(one_case.source, one_case.target, one_case.recipe, "disk", 60)
        return sorted(path.name for path in one_case.target.parent.iterdir())

    dead()
    with Disk(reads=True).under() as disk:
        quantized(one_case)
    one_case.clear()
    reads = next(at for at, operation in enumerate(disk.operations) if operation.startswith("cut"))
    points = random.Random(SEED).sample(range(reads), often(3, 20))
    for at in points:
        left = dead()
        with cancelled_in_a_hanging(one_case, Disk(at, None, reads=True)):
            assert sorted(path.name for path in one_case.target.parent.iterdir()) == left
        assert quantized(one_case).taken_up > 3
        one_case.again()
        one_case.clear()
    tried("cancelled while the journal of a killed run is read", len(points), "at once, it stays, next run resumes it")


def test_removals_that_fail_hide_no_error(one_case, monkeypatch, tried, sentences):
    """The disk fails, and then refuses to remove what was written: the first is told, the next run cleans up."""
    with Disk(30, failing(errno.EIO)).under(), sentences.raises(OutputError):
        quantized(one_case)
    assert len(list(one_case.target.parent.glob(".*"))) == 2
    one_case.again()
    tried("EIO at a write, and at every removal after it", 1, "none, one sentence, next run works")


def _folders_fail(monkeypatch, code: int) -> None:
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP], ids=errno.errorcode.get)
def test_a_disk_that_flushes_no_folders(one_case, monkeypatch, code, tried):
    _folders_fail(monkeypatch, code)
    one_case.again()
    tried("a disk that flushes no folders", 1, "whole")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_flushed_is_told_of_truly(one_case, monkeypatch, code, tried, sentences):
    _folders_fail(monkeypatch, code)
    with sentences.raises(OutputError):
        quantized(one_case)
    monkeypatch.undo()
    one_case.check(complete=True)
    one_case.again()
    tried("the folder's flush fails", 1, "whole, one sentence")


def _no_locks(*_, **__):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_disk_without_locks(one_case, monkeypatch, tried):
    """Active runs cannot be recognized there: files are kept for a day, then resumed or removed."""
    monkeypatch.setattr(partial_files, "lock_descriptor", _no_locks)
    assert killed(one_case.source, one_case.target, one_case.recipe, "disk", 40)
    partial, journal = sorted(one_case.target.parent.glob(".*"), reverse=True)
    assert quantized(one_case).taken_up == 0
    one_case.check(complete=True)
    assert partial.exists()
    assert journal.exists()
    one_case.clear()
    long_ago = time.time() - 90_000
    os.utime(partial, (long_ago, long_ago))
    assert quantized(one_case).taken_up > 0
    one_case.again()
    tried("a disk without locks", 2, "whole or none; a killed run is resumed after a day")


def test_a_new_file_that_another_run_takes_for_a_dead_ones(one_case, monkeypatch, tried):
    """The other has it locked, and removes it at the worst moment."""
    real, others = partial_files.lock_descriptor, []

    def lock(descriptor, blocking):
        if others:
            return real(descriptor, blocking=blocking)
        (partial,) = one_case.target.parent.glob(".*.partial")
        others.append(open(partial, "r+b"))
        assert real(others[0].fileno(), blocking=blocking)
        locked = real(descriptor, blocking=blocking)
        partial.unlink()
        return locked

    monkeypatch.setattr(partial_files, "lock_descriptor", lock)
    quantized(one_case)
    one_case.check(complete=True)
    others[0].close()
    one_case.again()
    tried("a new file is removed as that of a killed run", 1, "whole")


def test_a_calibration_that_changes_below_a_run_makes_no_file(one_case, often, tried, sentences):
    """Half of the layers rounded for one, half for the other, and the mark of the first."""
    path = one_case.source.with_name("x.calib.safetensors")

    def statistics(seed):
        inputs = torch.randn(200, 65, generator=torch.Generator().manual_seed(seed))
        return save({f"blocks.{block}.mlp.gram": inputs.t() @ inputs / 200 for block in range(3)})

    def listener(event):
        if isinstance(event, LayerStarted) and event.index == 4:
            path.write_bytes(statistics(2))

    path.write_bytes(statistics(1))
    with (
        CalibrationFile(path) as calibration,
        sentences.raises(SourceError),
    ):
        quantize_file(
            one_case.source, one_case.target, one_case.recipe, calibration=calibration, device="cpu", on_event=listener
        )
    one_case.check(complete=False)
    assert sorted(entry.name for entry in path.parent.iterdir()) == [one_case.source.name, path.name]
    path.unlink()
    one_case.again()
    tried("calibration written over during the run", 1, "none, one sentence, next run works")


def test_cancelled_at_a_random_check(case, often, tried):
    checks = []
    quantize_file(case.source, case.target, case.recipe, device="cpu", check=lambda: checks.append(1))
    case.clear()
    points = random.Random(SEED).sample(range(len(checks)), min(len(checks), often(20, 200)))
    for at in points:
        seen = []

        def check(at=at, seen=seen):
            seen.append(1)
            if len(seen) > at:
                raise Stop

        with pytest.raises(Stop):
            quantize_file(case.source, case.target, case.recipe, device="cpu", check=check)
        assert [path.name for path in case.target.parent.iterdir()] == [case.source.name]
        case.check(complete=False)
    case.again()
    tried("cancelled at a random check", len(points), "whole or none")


def test_a_check_during_the_read(one_case, tried):
    """A read that waits, as on a network disk, goes on only after the run has looked at its check."""
    looked, waiting = threading.Event(), threading.Event()

    def slow(file, data):
        if threading.current_thread().name.startswith("learned-rounding-read"):
            waiting.set()
            assert looked.wait(timeout=60)

    with Disk(operations(one_case, reader) - 3, slow, reads=True).under(reader):
        quantize_file(
            one_case.source,
            one_case.target,
            one_case.recipe,
            device="cpu",
            check=lambda: waiting.is_set() and looked.set(),
        )
    one_case.check(complete=True)
    assert looked.is_set()
    tried("a disk that keeps a read waiting", 1, "whole; may be cancelled meanwhile")
