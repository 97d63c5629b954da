"""Layers on a Ray cluster of three nodes: the bytes of a local run, lost workers, errors of tasks, cancellation."""

import os
import signal

import psutil
import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.calibration import LayerStatistics
from learned_rounding.quant_core.errors import CalibrationError
from learned_rounding.quant_core.run.layer_task import LayerOrder, LayerTask
from learned_rounding.quant_core.run.quantize import Target, quantize_files
from learned_rounding.quant_core.sources.source import CPU
from learned_rounding.quant_core.workers.ray_cluster import RayCluster
from learned_rounding.quant_core.workers.ray_pool import RayPool
from learned_rounding.tests.quant_core.ray_nodes import LONG, wait_until

pytest.importorskip("ray")
pytestmark = pytest.mark.soak

SLOW = Recipe(format="int8", rounding="principal")
FAST = Recipe(format="int8", rounding="nearest")


@pytest.fixture(scope="module")
def cluster(ray_nodes):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nodes have one CPU
    with RayCluster(ray_nodes.address) as connected:
        yield connected
    torch.set_num_threads(threads)


@pytest.fixture
def pool(cluster):
    with RayPool(cluster, lambda event: None) as opened:
        yield opened


@pytest.fixture
def source(tmp_path):
    """A model of eight layers of different sizes, each of which takes long enough to be killed."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"blocks.{index}.weight": torch.randn(512, 512 + 32 * index, generator=generator) for index in range(8)}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def layer(recipe: Recipe = FAST, size: int = 64, statistics: LayerStatistics | None = None) -> LayerTask:
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    order = LayerOrder(recipe, calibrated=statistics is not None, corrected=False)
    return LayerTask("blocks.0", weight, None, statistics, [order])


def quantize_on(pool: RayPool, source, recipe: Recipe):
    """The report of a run whose layers the pool quantizes, and the bytes of its output."""
    output = source.with_name("pool.safetensors")
    (report,) = quantize_files(source, [Target(output, recipe)], general=True, pool=pool)
    return report, output.read_bytes()


def quantize_here(source, recipe: Recipe) -> bytes:
    output = source.with_name("here.safetensors")
    quantize_file(source, output, recipe, general=True, device="cpu")
    return output.read_bytes()


def test_every_node_is_used(cluster):
    assert len(cluster.nodes) == 3


def test_the_bytes_are_those_of_a_local_run(pool, source):
    assert quantize_on(pool, source, FAST)[1] == quantize_here(source, FAST)


def test_the_report_names_the_cluster(pool, source):
    assert quantize_on(pool, source, FAST)[0].device == "3 × CPU on 3 nodes of a Ray cluster"


def test_the_layer_of_a_killed_worker_is_repeated(pool):
    task = layer(SLOW, 1500)  # takes seconds
    future = pool.submit(task, 1)
    (name,) = wait_until(lambda: pool.running, "a layer in progress")
    os.kill(int(name.split()[1]), signal.SIGKILL)
    (made,), (expected,) = future.result(LONG), task.run(CPU, print, lambda: None, cpu_fallback=True)
    assert all(torch.equal(made.tensors[key], expected.tensors[key]) for key in expected.tensors)
    assert [failure.device for failure in pool.take_failures()] == [name]


def test_an_error_of_a_task_is_raised_here(pool):
    hessian = torch.full((64, 64), torch.nan)
    future = pool.submit(layer(Recipe(format="int8"), statistics=LayerStatistics(hessian=hessian)), 1)
    with pytest.raises(CalibrationError) as raised:
        future.result(LONG)
    assert "layer_task.py" in str(raised.value.__cause__)


def test_weights_can_be_written_to_on_a_node(pool):
    """Those that Ray hands out are read-only."""
    results = pool.submit(layer(), 1).result(LONG)
    assert results[0].tensors["blocks.0.weight"].dtype == torch.int8


def test_leaving_the_pool_ends_its_tasks(cluster):
    with RayPool(cluster, lambda event: None) as pool:
        futures = [pool.submit(layer(SLOW, 3000), 1) for _ in range(6)]
        running = wait_until(lambda: len(pool.running) == 3 and pool.running, "three layers in progress")
    pids = [int(name.split()[1]) for name in running]
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), "the end of the tasks")
    assert not any(future.done() for future in futures)
