"""Open files, names and paths as Windows has them."""

import ntpath
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
import torch

from learned_rounding.quant_core import file_system
from learned_rounding.quant_core.file_system import (
    FOLDER,
    find_invalid_part,
    find_special_kind,
    is_same_path,
    long_path,
    remove_file,
    rename_file,
    replace_file,
)

INVALID = (
    "CON", "nul", "Aux.safetensors", "com1", "LPT9.a.b", "COM¹", "CONIN$", "prn .txt", "a:b", "a?", "a*", 'a"', "<a", "a>", "a|b",
    "a.", "a ", "a\tb",
)  # fmt: skip
VALID = ("console", "com10", "nul_", "a.b", ".a", " a", "ä é 層", "a'b", "[x]", "COM0", "..")


@pytest.fixture
def windows_paths(monkeypatch):
    """Paths are those of Windows."""
    monkeypatch.setattr(file_system, "os", SimpleNamespace(path=ntpath))
    monkeypatch.setattr(file_system, "Path", PureWindowsPath)


def test_names_that_windows_cannot_store_are_found(windows, subtests):
    for name in INVALID:
        with subtests.test(name):
            assert find_invalid_part(Path("folder", name, "file")) == name


def test_names_that_windows_can_store_are_accepted(windows, subtests):
    for name in VALID:
        with subtests.test(name):
            assert find_invalid_part(Path("folder", name, "file")) is None


def test_drive_is_not_a_name(windows):
    assert find_invalid_part(PureWindowsPath(r"C:\folder\file")) is None


def test_prefix_is_not_a_name(windows):
    assert find_invalid_part(PureWindowsPath(r"\\?\C:\folder\file")) is None


@pytest.mark.posix(reason="the names are valid on other systems only")
def test_other_systems_store_all_names(monkeypatch, subtests):
    monkeypatch.setattr(file_system, "WINDOWS", False)
    for name in INVALID:
        with subtests.test(name):
            assert find_invalid_part(Path(name)) is None


def test_long_path_gets_the_prefix(windows_paths):
    path = PureWindowsPath(f"C:\\{'a' * 250}")
    assert str(long_path(path)) == f"\\\\?\\{path}"


def test_long_path_of_a_share_gets_the_prefix_of_shares(windows_paths):
    path = PureWindowsPath(f"\\\\server\\share\\{'a' * 250}")
    assert str(long_path(path)) == f"\\\\?\\UNC\\server\\share\\{'a' * 250}"


def test_long_path_with_the_prefix_is_unchanged(windows_paths):
    path = PureWindowsPath(f"\\\\?\\C:\\{'a' * 250}")
    assert long_path(path) is path


def test_path_whose_hidden_file_would_be_too_long_gets_the_prefix(windows_paths):
    assert str(long_path(PureWindowsPath(f"C:\\{'a' * 227}"))).startswith("\\\\?\\")


def test_short_path_is_unchanged(windows_paths):
    path = PureWindowsPath(f"C:\\{'a' * 226}")
    assert long_path(path) is path


@pytest.mark.posix(reason="its paths have no drive")
def test_long_path_of_another_system_is_unchanged(tmp_path):
    path = tmp_path / ("a" * 255)
    assert long_path(path) is path


def test_names_of_different_case_are_the_same_file(windows_paths):
    assert is_same_path(PureWindowsPath(r"C:\folder\Out.safetensors"), PureWindowsPath(r"c:\Folder\out.safetensors"))


def test_path_with_the_prefix_is_the_same_file(windows_paths):
    assert is_same_path(PureWindowsPath(r"\\?\C:\folder\out"), PureWindowsPath(r"C:\folder\out"))


def test_open_file_stays(windows, tmp_path):
    path = tmp_path / "a"
    with open(path, "wb"):
        assert not remove_file(path)
    assert path.exists()


def test_mapped_file_stays(windows, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(8))
    mapped = torch.from_file(str(path), size=8, dtype=torch.uint8)
    assert not remove_file(path)
    assert not mapped.any()


def test_closed_file_is_removed(windows, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"content")
    assert remove_file(path)
    assert not path.exists()


def test_file_that_does_not_exist_counts_as_removed(tmp_path):
    assert remove_file(tmp_path / "missing")


@pytest.mark.parametrize("rename", [rename_file, replace_file])
def test_file_that_is_open_for_a_moment_is_renamed(windows, tmp_path, monkeypatch, rename):
    """As while a virus scanner reads it."""
    path = tmp_path / "a"
    path.write_bytes(b"content")
    scanner = open(path, "rb")
    monkeypatch.setattr(file_system.time, "sleep", lambda seconds: scanner.close())
    rename(path, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"


def test_file_that_stays_open_is_not_replaced(windows, tmp_path, monkeypatch):
    monkeypatch.setattr(file_system.time, "sleep", lambda seconds: None)
    path, target = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"new")
    target.write_bytes(b"old")
    with open(target, "rb"), pytest.raises(PermissionError):
        replace_file(path, target)
    assert target.read_bytes() == b"old"


@pytest.mark.posix(reason="waits on Windows")
def test_other_systems_try_once(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    def sleep(_):
        raise AssertionError("it waits")

    monkeypatch.setattr(file_system.os, "replace", refuse)
    monkeypatch.setattr(file_system.time, "sleep", sleep)
    with pytest.raises(PermissionError):
        replace_file(tmp_path / "a", tmp_path / "b")


def test_a_folder_is_a_special_kind(tmp_path):
    assert find_special_kind(tmp_path) == FOLDER


def test_regular_and_missing_files_have_no_special_kind(tmp_path, subtests):
    (tmp_path / "a").touch()
    for name in ("a", "none", "null\0"):
        with subtests.test(name):
            assert find_special_kind(tmp_path / name) is None
