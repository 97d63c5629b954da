"""A Ray cluster on this machine: nodes are processes, whose death is tested."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

LONG = 600  # s that a cluster or a run may take on a busy machine

# Ray reads these when it is imported. Its nodes are started by this process and inherit them.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}


@contextlib.contextmanager
def local_cluster(nodes: int = 3, cpus: int = 1) -> Iterator:
    """A cluster of nodes without GPUs, on free ports, with an object store of 100 MB each.

    The value is a ``ray.cluster_utils.Cluster``; its nodes are killed at the end, whatever is left of them.
    """
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    folder = tempfile.mkdtemp(prefix="ray")  # a short path, as that of a socket is limited
    cluster = cluster_utils.Cluster()
    started = set()
    try:
        for index in range(nodes):
            head = {"temp_dir": folder} if index == 0 else {}
            cluster.add_node(num_cpus=cpus, num_gpus=0, object_store_memory=100 << 20, include_dashboard=False, **head)
            started |= {psutil.Process(pid) for node in cluster.list_all_nodes() for pid in node_pids(node)}
        yield cluster
    finally:
        end(process for parent in started for process in (parent, *_children(parent)))
        with contextlib.suppress(Exception):  # of processes that are dead already
            cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def node_pids(node) -> list[int]:
    """Processes of a node: raylet and, of the head, the control process."""
    return [info.process.pid for infos in node.all_processes.values() for info in infos]


def kill_head(cluster) -> None:
    """kill -9 of everything that a lost machine with the head takes along."""
    processes = [psutil.Process(pid) for pid in node_pids(cluster.head_node)]
    end(each for parent in processes for each in (parent, *_children(parent)))


def task_processes(cluster, name: str) -> list[psutil.Process]:
    """Processes of tasks whose name contains a text."""
    raylets = [psutil.Process(pid) for node in cluster.list_all_nodes() for pid in node_pids(node)]
    return [child for parent in raylets for child in _children(parent) if name in _name(child)]


def end(processes) -> None:
    """kill -9, and wait for the end."""
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=LONG)


def wait_until(found: Callable[[], object], what: str):
    """Wait for an event; returns its value."""
    ends = time.monotonic() + LONG
    while not (value := found()):
        if time.monotonic() > ends:
            pytest.fail(f"not within {LONG} s: {what}")
        time.sleep(0.02)
    return value


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""
