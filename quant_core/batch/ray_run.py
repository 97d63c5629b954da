"""A batch on a Ray cluster: each group is a task of Ray, or its layers are, one group after the other."""

import platform
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cancellation import CancelCheck
from ..events import Event, Listener
from ..workers.ray_cluster import RayCluster
from ..workers.ray_pool import RayPool
from .plan import BatchPlan, Group, Outcome
from .run import GroupStarted, GroupTask, run_group, run_in_pool

__all__ = ["absolute_plan", "check_cluster", "run_plan_on_ray"]


@dataclass(frozen=True)
class _NodeTask(GroupTask):
    """A group as a task of a :class:`~..workers.ray_pool.RayPool`; its start names the node."""

    def run(
        self, device: torch.device, emit: Listener, check: CancelCheck, *, cpu_fallback: bool
    ) -> tuple[Outcome, ...]:
        def receive(event: Event) -> Any:
            if isinstance(event, GroupStarted):
                event = replace(event, device=f"{event.device} of {platform.node()}")
            emit(event)

        return super().run(device, receive, check, cpu_fallback=cpu_fallback)


def absolute_plan(plan: BatchPlan) -> BatchPlan:
    """The plan with absolute paths, which mean the same on every node."""

    def convert(group: Group) -> Group:
        outputs = tuple(replace(output, path=output.path.absolute()) for output in group.outputs)
        calibration = group.calibration and group.calibration.absolute()
        return replace(group, source=group.source.absolute(), calibration=calibration, outputs=outputs)

    return replace(plan, groups=tuple(map(convert, plan.groups)))


def check_cluster(plan: BatchPlan, cluster: RayCluster) -> None:
    """Check the versions of the nodes and, unless the plan is split, that they share the paths of the plan.

    Raises:
        QuantizationError: names the node.
    """
    if plan.split:
        cluster.check_nodes()
        return
    sources = [path for group in plan.groups for path in (group.source, group.calibration) if path is not None]
    folders = {output.path.parent for group in plan.groups for output in group.outputs}
    cluster.check_nodes(list(dict.fromkeys(sources)), sorted(folders))


def run_plan_on_ray(plan: BatchPlan, cluster: RayCluster, emit: Listener) -> None:
    """Make the outputs of a plan; after an error of a group the others follow.

    Args:
        plan: the groups, with absolute paths. Where it is split, this process reads and writes, and the layers of one group
            at a time are tasks; otherwise each group is a task, whose node reads and writes.
        cluster: connection to the cluster.
        emit: listener of the events of :mod:`.run`, in this thread.

    Raises:
        ClusterLostError: the cluster does not answer; what is incomplete is kept, and the same plan continues it.
    """
    if not plan.split:
        run_in_pool(plan, lambda receive: RayPool(cluster, receive), _NodeTask, emit, cluster.check_lost)
        return
    with RayPool(cluster, lambda event: None) as pool:
        for group in plan.groups:
            pool.label = group.name
            run_group(group, pool.device, emit, cluster.check_lost, pool)
            pool.cancel()  # what an error has left
