"""The archive for a machine without a network: packages, hosts and files of the repository."""

import tarfile
from pathlib import Path

import pytest

from learned_rounding.hosts import carry


@pytest.fixture
def packed(monkeypatch, tmp_path):
    """packed(listed) → names in the archive, where pip lists ``listed`` and a host has files of users and of git."""
    host = tmp_path / "comfyui-0.3.75"
    for name in (
        "main.py",
        ".git/config",
        "models/m.safetensors",
        "comfy/ldm/models/unet.py",
        "comfy/__pycache__/a.pyc",
    ):
        (host / name).parent.mkdir(parents=True, exist_ok=True)
        (host / name).touch()
    monkeypatch.setattr(carry, "available_hosts", list)
    monkeypatch.setattr(carry, "find_sources", lambda: [("oldest", host)])
    downloaded = []

    def run_pip(python, command, *arguments):
        downloaded.append((command, arguments))
        Path(arguments[arguments.index("-d") + 1], "a.whl").touch()

    monkeypatch.setattr(carry, "run_pip", run_pip)

    def make(listed: list[str]):
        monkeypatch.setattr(carry, "run_command", lambda command, step: "\n".join(listed))
        carry.pack(tmp_path / "carried.tar", "3.12", "2.11.0")
        with tarfile.open(tmp_path / "carried.tar") as archive:
            names = archive.extractfile("wheels/names.txt").read().decode().split()
            return downloaded, names, set(archive.getnames())

    return make


def test_torch_this_package_and_the_frontend_are_left_out(packed):
    listed = [
        "torch==2.13.0",
        "nvidia-nccl==2",
        "learned_rounding==0.2",
        "comfyui_frontend_package==1.49.6",
        "av==16.0",
    ]
    ((command, arguments),), names, _ = packed(listed)
    assert command == "download"
    assert {"--no-deps", "--python-version", "3.12", "av==16.0"} <= set(arguments)
    assert {"torchvision==0.26.0", "torchaudio==2.11.0"} <= set(arguments)
    assert names == ["av", "torchvision", "torchaudio"]


def test_archive_has_sources_and_tracked_files_only(packed):
    if not (carry._ROOT / ".git").exists():
        pytest.skip("not a git clone")
    _, _, archived = packed([])
    assert {"cache/comfyui-0.3.75/main.py", "cache/comfyui-0.3.75/comfy/ldm/models/unet.py"} <= archived
    assert {"learned_rounding/Makefile", "learned_rounding/hosts/install.py", "wheels/a.whl"} <= archived
    assert not [name for name in archived if ".git/" in name or "__pycache__" in name or name.endswith("m.safetensors")]
