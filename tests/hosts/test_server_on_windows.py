"""Links of a server where users have no privilege for symbolic ones."""

import sys
from types import SimpleNamespace

import pytest

from learned_rounding.benchmarks.memory import peak_memory
from learned_rounding.hosts.install import _lock, _python
from learned_rounding.hosts.server import _link_folder


@pytest.mark.posix(reason="symbolic links may be allowed")
def test_junction_replaces_a_symbolic_link(windows, tmp_path, monkeypatch):
    made = []
    junctions = SimpleNamespace(CreateJunction=lambda target, link: made.append((target, link)))
    monkeypatch.setitem(sys.modules, "_winapi", junctions)
    _link_folder(tmp_path / "link", tmp_path)
    assert made == [(str(tmp_path), str(tmp_path / "link"))]


@pytest.mark.posix(reason="there are junctions")
def test_link_that_cannot_be_created_is_an_error(windows, tmp_path):
    with pytest.raises(OSError):
        _link_folder(tmp_path / "link", tmp_path)


def test_interpreter_of_an_environment_on_windows(tmp_path):
    (tmp_path / "Scripts").mkdir()
    assert _python(tmp_path) == tmp_path / "Scripts" / "python.exe"


def test_interpreter_of_an_environment_on_other_systems(tmp_path):
    assert _python(tmp_path) == tmp_path / "bin" / "python"


def test_installation_is_locked_without_fcntl(windows, tmp_path):
    with _lock(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()


def test_peak_memory_is_measured_without_the_module_resource(windows):
    assert peak_memory() > 1 << 20
