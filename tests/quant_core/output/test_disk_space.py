"""The free space of a disk is checked before a file is written."""

import shutil
from pathlib import Path

from learned_rounding.quant_core.errors import OutputError
from learned_rounding.quant_core.output import check_disk_space


def free(monkeypatch, count: int) -> list:
    asked = []

    def usage(folder):
        asked.append(folder)
        return shutil._ntuple_diskusage(10**12, 10**12 - count, count)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return asked


def test_need_and_free_space_are_named(tmp_path, monkeypatch, sentences):
    asked = free(monkeypatch, 2_130_000_000)
    check_disk_space(tmp_path / "a.safetensors", 2_130_000_000)
    with sentences.raises(OutputError):
        check_disk_space(tmp_path / "new" / "folder" / "a.safetensors", 6_340_000_000)
    assert asked == [tmp_path, tmp_path]


def test_a_disk_that_does_not_answer_is_not_checked(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError("unknown")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    check_disk_space(tmp_path / "a", 10**18)


def test_relative_paths(tmp_path, monkeypatch, subtests):
    for path in ["a.safetensors", "new/a.safetensors"]:
        with subtests.test(path), monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            asked = free(patch, 1)
            check_disk_space(Path(path), 1)
            assert asked == [tmp_path]
