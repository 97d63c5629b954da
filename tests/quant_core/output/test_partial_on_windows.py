"""Partial files where the system removes and renames no open file, opens no folder and has no owners of files."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from learned_rounding.quant_core import Recipe, file_system, quantize_file
from learned_rounding.quant_core.errors import OutputError
from learned_rounding.quant_core.output import SafetensorsWriter, remove_leftovers
from learned_rounding.quant_core.output.durable import flush_in_background
from learned_rounding.quant_core.output.partial import PartialFile, open_leftover
from learned_rounding.tests.system import needs_symlinks

RECIPE = Recipe(format="int8_tensorwise", rounding="nearest", preset="none")


@pytest.fixture
def no_waits(monkeypatch):
    """A file that is open does not get more time to be closed."""
    monkeypatch.setattr(file_system, "_WAITS", ())


def write(path, overwrite: bool = True) -> None:
    with SafetensorsWriter(path, 4096, overwrite=overwrite) as out:
        out.add("a", torch.arange(1000.0))
        out.finish({})


@pytest.mark.parametrize("overwrite", [True, False])
def test_file_is_published(windows, tmp_path, listing, overwrite):
    write(tmp_path / "a.safetensors", overwrite)
    assert listing() == ["a.safetensors"]
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.arange(1000.0))


def test_existing_file_of_the_same_content_is_left_in_place(windows, tmp_path, listing):
    write(tmp_path / "a.safetensors")
    write(tmp_path / "a.safetensors", overwrite=False)
    assert listing() == ["a.safetensors"]


def test_aborted_file_is_removed(windows, tmp_path, listing):
    with SafetensorsWriter(tmp_path / "new" / "a.safetensors", 4096) as out:
        out.add("a", torch.zeros(1000))
    assert list(tmp_path.iterdir()) == []


def test_file_that_a_flush_has_open_is_removed_when_it_ends(windows, tmp_path, listing):
    file, go_on, flushes = PartialFile(tmp_path / "a"), threading.Event(), []
    with file.access():
        file.create()

    def submit(flush, copies):
        flushes.append(file.submit(lambda: (go_on.wait(60), flush(copies))))
        return flushes[0]

    flush_in_background(submit, [file.file])
    file.abort()
    assert len(listing()) == 1
    go_on.set()
    file._threads.shutdown()
    assert listing() == []


def test_leftovers_are_removed(windows, tmp_path, listing):
    (tmp_path / ".a.00ab12cd.partial").write_bytes(b"half a file")
    assert remove_leftovers(tmp_path / "a") == 1
    assert listing() == []


def test_file_of_a_live_run_is_not_removed(windows, tmp_path):
    with SafetensorsWriter(tmp_path / "a", 4096):
        assert remove_leftovers(tmp_path / "a") == 0
        assert len(list(tmp_path.glob(".*.partial"))) == 1


@needs_symlinks
def test_link_is_not_followed(windows, tmp_path):
    (tmp_path / "other").write_bytes(b"somebody else's")
    (tmp_path / ".a.00ab12cd.partial").symlink_to(tmp_path / "other")
    with pytest.raises(OSError):
        open_leftover(tmp_path / ".a.00ab12cd.partial")


def test_leftover_without_an_owner_is_opened(windows, tmp_path):
    (tmp_path / ".a.00ab12cd.partial").write_bytes(b"half a file")
    with open_leftover(tmp_path / ".a.00ab12cd.partial") as file:
        assert file.read() == b"half a file"


def test_output_that_is_open_is_refused(windows, no_waits, tmp_path, sentences):
    write(tmp_path / "a.safetensors")
    with open(tmp_path / "a.safetensors", "rb"), sentences.raises(OutputError):
        write(tmp_path / "a.safetensors")


def test_run_whose_output_was_open_is_resumed(windows, no_waits, tmp_path, model_file, listing):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"another file")
    source = model_file()
    with open(out, "rb"), pytest.raises(OutputError):
        quantize_file(source, out, RECIPE, overwrite=True)
    report = quantize_file(source, out, RECIPE, overwrite=True)
    assert report.taken_up == len(report.layers)
    assert listing() == ["model.safetensors", "out.safetensors"]
