"""What worker processes run, and what is reported of devices that fail."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..cancellation import CancelCheck
from ..display import shorten
from ..events import Listener

__all__ = ["DeviceFailure", "Task", "first_line"]


class Task(Protocol):
    """Work that any device can do. It and its result are pickled; tensors arrive on the CPU.

    A task with large tensors also has a method ``load(device)``, which returns it with those tensors on the device where its
    memory is large enough. A worker process calls it during the task before.

    Attributes:
        title: name for users, in the dashboard of a cluster.
    """

    @property
    def title(self) -> str: ...

    def run(self, device: torch.device, emit: Listener, check: CancelCheck, *, cpu_fallback: bool) -> Any:
        """Do the work.

        Args:
            device: device of the arithmetic.
            emit: listener of the events.
            check: called often; raises to cancel.
            cpu_fallback: compute on the CPU what the memory of the device is too small for. Otherwise
                :class:`~..errors.OutOfMemoryError` is raised, and another device repeats the task.
        """
        ...


@dataclass(frozen=True)
class DeviceFailure:
    """A device could not do a task, which another device repeats.

    Attributes:
        device: name of the device.
        lost: it does no other tasks either; otherwise it had too little memory for this one.
        reason: a phrase.
        repeated: number of tasks that are repeated.
    """

    device: str
    lost: bool
    reason: str
    repeated: int

    def __str__(self) -> str:
        """A sentence for users."""
        if self.lost and not self.repeated:
            return f"{self.device} was lost ({self.reason})."
        if self.lost:
            layers = f"{self.repeated} layer{'' if self.repeated == 1 else 's'}"
            return f"{self.device} was lost ({self.reason}); {layers} in progress there continued on other devices."
        return f"{self.device} had too little memory for a layer, which another device quantized ({self.reason})."


def first_line(error: object) -> str:
    """First line of an error, as part of a sentence."""
    text = str(error).strip() or type(error).__name__
    return shorten(text.splitlines()[0].rstrip(".:"), 300)
