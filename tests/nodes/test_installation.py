"""Installation as by ComfyUI Manager: clone into custom_nodes, install requirements.txt, restart."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from learned_rounding.benchmarks.tiny_model.place import place
from learned_rounding.hosts.install import PYTHON_VARIABLE
from learned_rounding.hosts.server import PACK
from learned_rounding.tests.nodes.probing import ProbedGraph, text

FRONTEND = "comfyui-frontend-package"


def pip(host, *arguments: str, path: Path | None = None) -> str:
    """Output of pip, which also finds the packages in ``path``."""
    command = [host.python, "-m", "pip", "--disable-pip-version-check", *arguments]
    env = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def version(host, package: str, path: Path | None = None) -> str:
    lines = pip(host, "show", package, path=path).splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("Version: "))


def install_frontend(host, folder: Path) -> str:
    """Tell pip that the frontend of that ComfyUI is installed, which the tests unpack elsewhere; returns its version."""
    requirements = (host.path / "requirements.txt").read_text(encoding="utf-8")
    (number,) = re.findall(rf"^{FRONTEND}==(.+)$", requirements, re.M)
    metadata = folder / f"comfyui_frontend_package-{number}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {FRONTEND}\nVersion: {number}\n")
    return number


def test_clone_with_its_requirements_runs(host, server_factory, tmp_path):
    if shutil.which("git") is None or not (PACK / ".git").exists():
        pytest.skip("not a git clone")
    if os.environ.get(PYTHON_VARIABLE):
        pytest.skip(f"{PYTHON_VARIABLE}: nothing is installed, and there may be no network")
    base = tmp_path / "comfyui"
    place(base, prompts=("red apple",))
    clone = base / "custom_nodes" / "ComfyUI-Learned-Rounding"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", f"file://{PACK}", clone], check=True)

    frontend = install_frontend(host, tmp_path / "frontend")
    before = version(host, "torch")
    wanted = json.loads(
        pip(
            host,
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--report",
            "-",
            "-r",
            str(clone / "requirements.txt"),
        )
    )
    names = {package["metadata"]["name"].lower() for package in wanted["install"]}
    assert not {name for name in names if name.startswith(("torch", "nvidia", "triton"))}, names
    said = pip(host, "install", "-r", str(clone / "requirements.txt"), path=tmp_path / "frontend")
    assert f"Requirement already satisfied: {FRONTEND}" in said
    assert version(host, FRONTEND, tmp_path / "frontend") == frontend
    assert version(host, "torch") == before

    server = server_factory(base=base, links={})
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.load()[0]), "installed")
    assert text(server.queue(graph), saved).endswith("installed_float8_e4m3fn.safetensors")
