"""Flushes where the system has no fcntl and flushes no file that is open for reading only."""

import concurrent.futures

import pytest
import torch

from learned_rounding.quant_core.output import SafetensorsWriter, durable, writer


def test_file_is_flushed(windows, tmp_path):
    with open(tmp_path / "a", "wb") as file:
        durable.flush_to_disk(file.fileno())


def test_file_that_is_open_for_reading_only_is_not_flushed(windows, tmp_path):
    """So that the other tests notice a flush that fails on Windows."""
    (tmp_path / "a").touch()
    with open(tmp_path / "a", "rb") as file, pytest.raises(OSError):
        durable.flush_to_disk(file.fileno())


def test_file_is_flushed_in_the_background(windows, tmp_path):
    with open(tmp_path / "a", "wb") as file, concurrent.futures.ThreadPoolExecutor() as pool:
        assert durable.flush_in_background(pool.submit, [file]).result() is None


def test_large_file_is_written_without_posix_fadvise(windows, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_WRITEBACK", 1000)
    with SafetensorsWriter(tmp_path / "a", 4096) as out:
        out.add("a", torch.zeros(1000))
        assert out._writeback is None
        out.finish({})
