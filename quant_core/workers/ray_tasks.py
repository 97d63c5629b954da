"""What runs on the nodes of a Ray cluster."""

import contextlib
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import kernels
from ..sources.source import CPU
from .messages import Packed, pack, pack_error, unpack
from .process import apply_torch_settings, is_lost
from .task import Task

__all__ = ["NodeCheck", "check_node", "run_task"]


@dataclass(frozen=True)
class NodeCheck:
    """What a node reports before a run.

    Attributes:
        python, torch: versions, the latter without the part that names CUDA.
        cuda: torch is built for CUDA.
        problem: phrase on the paths of the run; empty if the node can use them.
    """

    python: str
    torch: str
    cuda: bool
    problem: str = ""


def run_task(
    packed: Packed, number: int, events: Any, cuda: bool, setting: tuple[str, dict[str, Any]], cpu_fallback: bool
) -> Packed:
    """Run a task; returns, packed, ("done", result) or ("failed", error and traceback).

    Args:
        packed: the :class:`.Task`.
        number: number of the task in events.
        events: a ``ray.util.queue.Queue`` for (number, packed event), first the name of this process.
        cuda: use the GPU that Ray has assigned, not the CPU.
        setting: backend of the kernels and :func:`.process.torch_settings` of the process that submits the task.
        cpu_fallback: see :meth:`.Task.run`.
    """

    def emit(event: Any) -> None:
        with contextlib.suppress(Exception):  # events are for display only; their actor may be on a node that is lost
            events.put_nowait((number, pack(event)))

    backend, settings = setting
    device = torch.device("cuda", 0) if cuda else CPU
    emit(f"process {os.getpid()} on {platform.node()}")
    apply_torch_settings(settings)
    task: Task = unpack(packed)
    del packed
    try:
        with kernels.using(backend):
            reply = "done", task.run(device, emit, _never_cancel, cpu_fallback=cpu_fallback)
    except Exception as error:
        if is_lost(device, error):
            os._exit(1)  # Ray repeats the task in another process
        reply = "failed", pack_error(error)
    return pack(reply)


def _never_cancel() -> None:
    """Check of a task: Ray ends the process of one that is cancelled."""


def check_node(sources: Sequence[str], markers: Sequence[str]) -> NodeCheck:
    """What this node has, see :meth:`.RayCluster.check_nodes`; ``markers``: files in the folders to write to."""
    missing = _first(sources, os.path.exists)
    lacking = _first(markers, os.path.exists)
    refused = _first(markers, lambda path: os.access(Path(path).parent, os.W_OK | os.X_OK))
    if missing:
        problem = f"does not see {missing}"
    elif lacking:
        problem = f"does not see the same folder {Path(lacking).parent}"
    elif refused:
        problem = f"cannot write to {Path(refused).parent}"
    else:
        problem = ""
    return NodeCheck(
        python=".".join(map(str, sys.version_info[:2])),
        torch=torch.__version__.partition("+")[0],
        cuda=torch.version.cuda is not None,
        problem=problem,
    )


def _first(paths: Sequence[str], accept: Callable[[str], bool]) -> str:
    """The first path that is not accepted; empty if all are."""
    return next((path for path in paths if not accept(path)), "")
