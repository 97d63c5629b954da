"""Partial files: locked while their run lives, removed when it is dead."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import lock_descriptor
from safetensors.torch import load_file

from learned_rounding.quant_core.errors import OutputError
from learned_rounding.quant_core.output import SafetensorsWriter, partial, remove_leftovers
from learned_rounding.quant_core.output.partial import PartialFile
from learned_rounding.tests.system import needs_long_names, needs_symlinks


def leftover(path: Path, mark: str = "00ab12cd") -> Path:
    left = path.with_name(f".{path.name}.{mark}.partial")
    left.write_bytes(b"half a file")
    return left


def test_files_of_dead_runs_are_removed(tmp_path, listing, subtests):
    for name in ["a.safetensors", "with space.safetensors", "[x].safetensors", "ü.safetensors"]:
        with subtests.test(name):
            path = tmp_path / name
            leftover(path), leftover(path, "11111111")
            path.write_bytes(b"the file itself")
            assert remove_leftovers(path) == 2
            assert listing() == [name]
            path.unlink()


@pytest.mark.posix(reason="names may contain * and ?")
def test_files_of_dead_runs_are_removed_whatever_their_name_matches(tmp_path, listing):
    leftover(tmp_path / "[x]*?"), leftover(tmp_path / "x.a")
    assert remove_leftovers(tmp_path / "[x]*?") == 1
    assert listing() == [".x.a.00ab12cd.partial"]


def test_files_of_other_outputs_are_not_removed(tmp_path, listing):
    others = [
        leftover(tmp_path / "b.safetensors"),
        leftover(tmp_path / "ba.safetensors"),
        leftover(tmp_path / "x.safetensors"),
    ]
    (tmp_path / "a.safetensors.partial").write_bytes(b"somebody else's")
    before = listing()
    assert remove_leftovers(tmp_path / "a.safetensors") == 0
    assert remove_leftovers(tmp_path / "[ax].safetensors") == 0
    assert listing() == before
    assert all(other.exists() for other in others)


def test_file_of_a_live_run_in_this_process_is_not_removed(tmp_path):
    with SafetensorsWriter(tmp_path / "a.safetensors", 4096) as out:
        out.add("a", torch.zeros(1000))
        leftover(tmp_path / "a.safetensors")
        assert remove_leftovers(tmp_path / "a.safetensors") == 1
        out.finish({})
    assert set(load_file(tmp_path / "a.safetensors")) == {"a"}


def test_file_of_a_live_run_in_another_process_is_not_removed(tmp_path):
    left = leftover(tmp_path / "a.safetensors")
    hold = (
        "import sys; from filelock import lock_descriptor; f = open(sys.argv[1], 'rb'); lock_descriptor(f.fileno()); "
    )
    hold += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(left)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        assert remove_leftovers(tmp_path / "a.safetensors") == 0
        assert left.exists()
        holder.stdin.close()
        holder.wait()
    assert remove_leftovers(tmp_path / "a.safetensors") == 1
    assert not left.exists()


def test_writer_locks_its_partial_file(tmp_path):
    with SafetensorsWriter(tmp_path / "a.safetensors", 4096):
        (hidden,) = tmp_path.glob(".*.partial")
        with open(hidden, "rb") as other:
            assert not lock_descriptor(other.fileno(), blocking=False)


def test_abort_removes_the_files_and_ends_the_access(tmp_path, listing, sentences):
    file = PartialFile(tmp_path / "new" / "a")
    with file.access():
        file.create()
    assert len(listing()) == 1
    file.abort()
    assert list(tmp_path.iterdir()) == []
    with sentences.raises(OutputError), file.access():
        pass


def test_incomplete_file_is_not_published(tmp_path, listing, sentences):
    file = PartialFile(tmp_path / "a")
    with file.access():
        file.create()
        file.file.write(b"12345")
    with sentences.raises(OutputError), file.access():
        file.publish(8)
    assert listing() == []


@needs_long_names
def test_names_of_up_to_255_bytes_have_shorter_hidden_names(tmp_path, listing, subtests):
    """The letters have one, two and three bytes."""
    for size in (237, 238, 239, 254, 255):
        for letters in ("a", "ü", "層"):
            with subtests.test(letters, size=size):
                repeated = letters * (size // len(letters.encode()))
                path = tmp_path / (repeated + "a" * (size - len(repeated.encode())))
                with SafetensorsWriter(path, 4096) as out:
                    out.add("a", torch.zeros(10))
                    (hidden,) = tmp_path.glob(".*.partial")
                    assert len(os.fsencode(hidden.name)) <= 255
                    assert PartialFile(path).leftovers() == [hidden]
                    out.finish({})
                assert listing() == [path.name]
                path.unlink()


@needs_long_names
def test_long_names_with_the_same_beginning_do_not_share_hidden_files(tmp_path):
    one, other = (PartialFile(tmp_path / ("a" * 250 + end)) for end in ("x", "y"))
    with one.access():
        one.create()
    assert len(one.leftovers()) == 1
    assert other.leftovers() == []
    assert remove_leftovers(tmp_path / ("a" * 250 + "y")) == 0
    one.abort()


@needs_symlinks
@pytest.mark.parametrize("suffix", [".partial", ".journal"])
def test_links_are_removed_and_not_followed(tmp_path, listing, suffix):
    other = tmp_path / "other"
    other.write_bytes(b"somebody else's")
    (tmp_path / f".a.00ab12cd{suffix}").symlink_to(other)
    (tmp_path / f".a.11111111{suffix}").symlink_to(tmp_path / "missing")
    remove_leftovers(tmp_path / "a")
    assert listing() == ["other"]
    assert other.read_bytes() == b"somebody else's"


@pytest.mark.posix(reason="an open file is renamed")
def test_hidden_files_are_not_followed_where_the_system_cannot_refuse_links(tmp_path, monkeypatch):
    """As on Windows, which has no O_NOFOLLOW."""
    monkeypatch.setattr(partial, "_NO_FOLLOW", 0)
    other, link = tmp_path / "other", tmp_path / ".a.00ab12cd.partial"
    other.write_bytes(b"somebody else's")
    link.symlink_to(other)
    with pytest.raises(OSError):
        partial.open_leftover(link)
    os.replace(tmp_path / "other", link)
    with partial.open_leftover(link) as file:
        link.rename(other)
        link.write_bytes(b"replaced after it was opened")
        with pytest.raises(OSError):
            partial.check_leftover(file, link)
