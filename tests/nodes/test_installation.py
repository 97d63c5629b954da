"""Installation as by ComfyUI Manager: clone into custom_nodes, install requirements.txt, restart."""

import json
import os
import shutil
import subprocess

import pytest

from learned_rounding.benchmarks.tiny_model.place import place
from learned_rounding.hosts.install import PYTHON_VARIABLE
from learned_rounding.hosts.server import PACK
from learned_rounding.tests.nodes.probing import ProbedGraph, text


def pip(host, *arguments: str) -> str:
    command = [host.python, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def torch_version(host) -> str:
    return next(line for line in pip(host, "show", "torch").splitlines() if line.startswith("Version"))


def test_clone_with_its_requirements_runs(host, server_factory, tmp_path):
    if shutil.which("git") is None or not (PACK / ".git").exists():
        pytest.skip("not a git clone")
    if os.environ.get(PYTHON_VARIABLE):
        pytest.skip(f"{PYTHON_VARIABLE}: nothing is installed, and there may be no network")
    base = tmp_path / "comfyui"
    place(base, prompts=("red apple",))
    clone = base / "custom_nodes" / "ComfyUI-Learned-Rounding"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", f"file://{PACK}", clone], check=True)

    before = torch_version(host)
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
    pip(host, "install", "--quiet", "-r", str(clone / "requirements.txt"))
    assert torch_version(host) == before

    server = server_factory(base=base, links={})
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.load()[0]), "installed")
    assert text(server.queue(graph), saved).endswith("installed_float8_e4m3fn.safetensors")
