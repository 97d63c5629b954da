"""What is taken away for `pytest --windows`, and that the package has another way for all of it."""

import ast
import importlib
import os
import re
from pathlib import Path

import pytest

import learned_rounding
from learned_rounding.tests import windows as masked

ROOT = Path(learned_rounding.__file__).parent
SHIPPED = [
    *(path for folder in ("quant_core", "kernels", "nodes") for path in sorted((ROOT / folder).rglob("*.py"))),
    *ROOT.glob("*.py"),
]
# What Windows lacks → the only modules that use it. Each looks it up first, and has a test with the fixture `windows`.
USES = {
    "fcntl": {"quant_core/file_system.py", "quant_core/output/durable.py"},
    "geteuid": {"quant_core/file_system.py", "quant_core/output/partial.py"},
    "posix_fadvise": {"quant_core/output/writer.py"},
    "preadv": {"quant_core/sources/positional.py", "nodes/host/file_slices.py"},
    "O_NOFOLLOW": {"quant_core/output/partial.py"},
    "O_NONBLOCK": {"quant_core/output/partial.py", "quant_core/sources/tensor_file.py"},
    "memfd_create": {"quant_core/workers/shared_memory.py"},  # else tensors travel in pipes
    "mmap": {"quant_core/workers/shared_memory.py"},
    "signal": {"quant_core/workers/process.py"},  # SIGINT, which Windows has, and names of signals that ended a process
}
LACKING = {*masked.MODULES, *masked.FUNCTIONS, *masked.FLAGS, "signal", "select", "multiprocessing", "mmap"}
# Functions that behave otherwise on Windows → the only modules that call them.
CALLS = {
    "replace": {"quant_core/file_system.py", "kernels/tuning.py"},
    "rename": {"quant_core/file_system.py", "quant_core/output/publish.py"},
    "link": {"quant_core/output/publish.py", "nodes/host/folders.py"},
    "symlink": set(),
    "chmod": set(),
    "fsync": {"quant_core/output/durable.py"},
}


def names_of(path: Path) -> set[str]:
    """Modules that a file imports, and attributes of ``os`` that it uses or looks up."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            owner, name = node.args[:2]
            if isinstance(owner, ast.Name) and owner.id == "os" and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return found


OPENING = re.compile(r"\b(open|read_text|write_text)\b")  # files without these words need not be parsed


def opens_in_code_page(node: ast.AST) -> bool:
    """Whether a call opens a text file without its encoding, which is a code page on Windows."""
    if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
        return False
    if isinstance(node.func, ast.Attribute):
        return node.func.attr in ("read_text", "write_text")
    modes = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
    binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
    return isinstance(node.func, ast.Name) and node.func.id == "open" and not binary


@pytest.fixture(scope="module")
def uses():
    """Name → shipped files that use it."""
    found: dict[str, set[str]] = {}
    for path in SHIPPED:
        for name in names_of(path):
            found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_what_windows_lacks_is_used_where_there_is_another_way(uses):
    assert {name: files for name, files in uses.items() if name in LACKING} == USES


def test_functions_that_behave_otherwise_are_called_where_that_is_known(uses, subtests):
    for name, files in CALLS.items():
        with subtests.test(name):
            assert uses.get(name, set()) <= files


def test_text_files_are_opened_with_their_encoding():
    files = [*SHIPPED, *(ROOT / "hosts").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    trees = {path: ast.walk(ast.parse(text)) for path, text in texts.items() if OPENING.search(text)}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}" for path in trees for node in trees[path] if opens_in_code_page(node)
    ]
    assert not found


def test_modules_find_what_windows_has(windows, subtests):
    """With --windows they have looked it up themselves."""
    for module, values in masked.AT_IMPORT.items():
        for name, value in values.items():
            with subtests.test(f"{module}.{name}"):
                assert getattr(importlib.import_module(f"learned_rounding.{module}"), name) == value


def test_functions_that_windows_lacks_are_missing(windows):
    assert not [name for name in (*masked.FUNCTIONS, *masked.FLAGS) if hasattr(os, name)]


def test_modules_that_windows_lacks_cannot_be_imported(windows, subtests):
    for name in masked.MODULES:
        with subtests.test(name), pytest.raises(ImportError):
            importlib.import_module(name)


def test_folder_is_not_opened(windows, tmp_path):
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)


def test_rename_does_not_replace(windows, tmp_path):
    for name in "ab":
        (tmp_path / name).touch()
    with pytest.raises(FileExistsError):
        (tmp_path / "a").rename(tmp_path / "b")


def test_mode_of_a_folder_does_not_change(windows, tmp_path):
    before = tmp_path.stat().st_mode
    tmp_path.chmod(0o500)
    assert tmp_path.stat().st_mode == before


@pytest.mark.posix(reason="the mask is for other systems")
def test_links_are_refused_to_the_package_only(windows, tmp_path):
    (tmp_path / "a").touch()
    os.link(tmp_path / "a", tmp_path / "b")
    place = {"__name__": "learned_rounding.nodes.host.folders", "os": os}
    with pytest.raises(OSError):
        exec("def link(path, target): os.link(path, target)", place) or place["link"](tmp_path / "a", tmp_path / "c")
