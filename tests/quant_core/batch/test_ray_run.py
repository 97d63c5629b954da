"""lrq batch on a Ray cluster of three nodes: the bytes of a local batch, lost workers, a lost head, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.tests.quant_core.ray_nodes import (
    LONG,
    kill_head,
    local_cluster,
    task_processes,
)

pytest.importorskip("ray")
pytestmark = pytest.mark.soak

CLONE = Path(__file__).resolve().parents[3]
PLAN = """
general = true
output = "FOLDER/"
sources = ["a.safetensors", "b.safetensors", "c.safetensors"]
[recipes.int8]
format = "int8"
rounding = "principal"
[recipes.fp8]
format = "fp8"
rounding = "nearest"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models of ten layers, and in the folder "local" the outputs of a local batch."""
    folder = tmp_path_factory.mktemp("ray")
    for seed, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(seed)
        weights = {f"blocks.{i}.weight": torch.randn(512, 512 + 32 * i, generator=generator) for i in range(10)}
        save_file(weights, folder / f"{name}.safetensors")
    finish(start(folder, "local", "--device", "cpu"))
    return folder


@pytest.fixture
def outputs(folder):
    """outputs(name) → name → bytes of the files of a batch, hidden ones too."""
    return lambda name: {path.name: path.read_bytes() for path in (folder / name).iterdir()}


@pytest.fixture
def expected(outputs):
    return outputs("local")


@pytest.fixture
def batch(folder):
    """batch(name, *options) → a running lrq batch, whose outputs are in a folder of this name; it is killed at the end."""
    started = []

    def run(name: str, *options: str) -> subprocess.Popen:
        started.append(start(folder, name, *options))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def start(folder: Path, name: str, *options: str) -> subprocess.Popen:
    (folder / f"{name}.toml").write_text(PLAN.replace("FOLDER", name), encoding="utf-8")
    command = [sys.executable, "-u", str(CLONE), "batch", f"{name}.toml", "--verbose", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # nodes have one CPU
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_layers(process: subprocess.Popen, name: str = "blocks.1.", models: int = 1) -> None:
    """Wait until this layer of so many models is finished, of ten; an output of these models is not complete then."""
    for line in process.stdout:
        models -= line.startswith(name) and "int8" in line
        if models == 0:
            return
    pytest.fail(process.stderr.read())


def finish(process: subprocess.Popen) -> tuple[int, str, list[str]]:
    """Exit code, standard output, and the lines of lrq on standard error."""
    out, err = process.communicate(timeout=LONG)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("lrq:")]


def workers(cluster) -> list[psutil.Process]:
    """Processes that make the outputs of a model, which Ray names by the task."""
    return task_processes(cluster, ": int8, fp8")


def complete(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.startswith(".")}


@pytest.mark.parametrize("split", [(), ("--split",)], ids=["groups", "split"])
def test_the_files_are_those_of_a_local_batch(split, batch, expected, outputs, ray_nodes, request):
    name = request.node.callspec.id
    code, out, err = finish(batch(name, "--ray", ray_nodes.address, *split))
    assert (code, err) == (0, [])
    assert out.splitlines()[-1].startswith("6 done")
    assert outputs(name) == expected


def test_the_model_of_a_killed_worker_is_resumed(batch, expected, outputs, ray_nodes, folder):
    running = batch("killed", "--ray", ray_nodes.address)
    wait_for_layers(running, models=3)
    process = workers(ray_nodes)[0]
    process.send_signal(signal.SIGKILL)
    code, out, err = finish(running)
    assert code == 0
    assert [f"process {process.pid} " in line for line in err] == [True]
    assert "resuming" in out
    assert outputs("killed") == expected
    assert len(json.loads((folder / "killed.json").read_text())["warnings"]) == 1


def test_ctrl_c_leaves_complete_outputs_only(batch, expected, outputs, ray_nodes):
    running = batch("cancelled", "--ray", ray_nodes.address)
    wait_for_layers(running)
    running.send_signal(signal.SIGINT)
    code, _, err = finish(running)
    assert (code, len(err)) == (130, 1)
    assert workers(ray_nodes) == []
    assert outputs("cancelled").items() <= expected.items()


def test_a_lost_head_leaves_what_another_cluster_continues(batch, expected, outputs):
    """Two batches at once: models as tasks, and layers as tasks."""
    kinds = {"lost": (), "lost-split": ("--split",)}
    with local_cluster(cpus=2) as cluster:
        running = {name: batch(name, "--ray", cluster.address, *split) for name, split in kinds.items()}
        for process in running.values():
            wait_for_layers(process)
        kill_head(cluster)
        ended = {name: finish(process) for name, process in running.items()}
    for name, (code, _, err) in ended.items():
        assert (name, code, len(err)) == (name, 1, 1)
        assert "does not answer" in err[0]
        assert complete(outputs(name)).items() <= expected.items()
        assert any(file.endswith(".journal") for file in outputs(name))
    with local_cluster(cpus=2) as cluster:
        running = {name: batch(name, "--ray", cluster.address, *split) for name, split in kinds.items()}
        ended = {name: finish(process) for name, process in running.items()}
    for name, (code, out, _) in ended.items():
        assert (name, code, "resuming" in out) == (name, 0, True)
        assert outputs(name) == expected


def test_the_devices_of_a_cluster_are_its_own(batch, ray_nodes):
    code, _, err = finish(batch("devices", "--ray", ray_nodes.address, "--device", "cpu"))
    assert (code, len(err)) == (1, 1)
