"""Host installation: incomplete parts are never used, complete ones are not installed again. pip and downloads are mocked."""

from pathlib import Path

import pytest

from learned_rounding.hosts import InstallError, available_hosts, find_host, install_hosts
from learned_rounding.hosts import install as module


def fake_source(folder, version, requirements):
    folder.mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    (folder / "requirements.txt").write_text(requirements)


@pytest.fixture
def pip_calls(tmp_path, monkeypatch):
    """Cache with two sources; returns the list of pip commands that install_hosts() runs."""
    monkeypatch.setenv("LEARNED_ROUNDING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "newer"))
    monkeypatch.setenv("TORCH", "torch==2.13.0")
    fake_source(
        tmp_path / "cache" / "comfyui-0.3.75", "0.3.75", "comfyui-frontend-package==1.32.9\ntorch\nav>=14.2.0  # x\n"
    )
    fake_source(
        tmp_path / "newer", "0.33.0", "comfyui-frontend-package==1.49.6\ntorchvision\nkornia>=0.7\nav>=16.0.0\n"
    )
    calls = []
    monkeypatch.setattr(
        module, "run_command", lambda command, step: module.Path(command[-1]).mkdir()
    )  # python -m venv PATH
    monkeypatch.setattr(module, "run_pip", lambda python, *arguments: calls.append(arguments))
    monkeypatch.setattr(module, "_evaluate", lambda python, code: "2.13.0+cpu")
    monkeypatch.setattr(module, "_make_companions_importable", lambda python: None)
    monkeypatch.setattr(module, "_unpack", lambda cache, requirement, folder, target, drop="": target.mkdir())
    return calls


def test_hosts_share_one_environment_but_not_the_frontend(pip_calls, tmp_path):
    oldest, newer = install_hosts()
    assert oldest.name == "oldest"
    assert oldest.version == "0.3.75"
    assert newer.name == "newer"
    assert newer.version == "0.33.0"
    assert oldest.python == newer.python
    assert oldest.frontend.name == "frontend-1.32.9"
    assert newer.frontend.name == "frontend-1.49.6"
    assert pip_calls[0] == ("install", "torch==2.13.0")
    asked = (oldest.python.parents[1] / "requirements.txt").read_text().split()
    assert {"av>=14.2.0", "av>=16.0.0"} <= set(asked)
    assert not [line for line in asked if line.startswith(("torch", "kornia", "comfyui"))]
    assert (oldest.python.parents[1] / "constraints.txt").read_text() == "torch==2.13.0+cpu\n"


def test_second_run_installs_nothing(pip_calls):
    hosts = install_hosts()
    pip_calls.clear()
    assert install_hosts() == available_hosts() == hosts
    assert pip_calls == []


def test_host_is_found_by_version(pip_calls):
    with pytest.raises(InstallError, match="ComfyUI is not installed"):
        find_host()
    oldest, newer = install_hosts()
    assert find_host() == find_host(newer.version) == newer
    assert find_host(oldest.version) == oldest
    with pytest.raises(InstallError, match=r"ComfyUI 9\.9"):
        find_host("9.9")


def test_incomplete_environment_is_rebuilt(pip_calls, monkeypatch):
    def fail(torch_version):
        raise InstallError("no network")

    with monkeypatch.context() as broken:
        broken.setattr(module, "companion_requirements", fail)
        with pytest.raises(InstallError, match="no network"):
            install_hosts()
    assert available_hosts() == []
    assert len(install_hosts()) == 2
    assert pip_calls.count(("install", "torch==2.13.0")) == 2


def test_changed_requirements_need_a_new_environment(pip_calls, monkeypatch, tmp_path):
    first = install_hosts()[0].python
    monkeypatch.setenv("TORCH", "torch==2.14.1")
    assert available_hosts() == []
    second = install_hosts()[0].python
    with (tmp_path / "newer" / "requirements.txt").open("a") as file:
        file.write("blake3\n")
    assert len({first, second, install_hosts()[0].python}) == 3


def test_wrong_comfyui_path_is_reported(pip_calls, monkeypatch, sentences):
    monkeypatch.setenv("COMFYUI_PATH", "/nowhere")
    with sentences.raises(InstallError):
        install_hosts()


@pytest.mark.parametrize(
    "torch, vision, audio",
    [("2.13.0+cpu", "0.28.0", "2.11.0"), ("2.14.1", "0.29.1", "2.11.0"), ("2.9.1", "0.24.1", "2.9.1")],
)
def test_companion_requirements_match_torch(torch, vision, audio):
    assert module.companion_requirements(torch) == [f"torchvision=={vision}", f"torchaudio=={audio}"]


def test_given_interpreter_is_used_without_installing(pip_calls, monkeypatch, tmp_path):
    monkeypatch.setenv("LEARNED_ROUNDING_HOST_PYTHON", "/usr/bin/python3")
    hosts = install_hosts()
    given = Path("/usr/bin/python3")
    assert [(host.version, host.python) for host in hosts] == [("0.3.75", given), ("0.33.0", given)]
    assert all((host.frontend / "index.html").exists() for host in hosts)
    assert pip_calls == []
    assert available_hosts() == hosts
