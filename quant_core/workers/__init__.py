"""Worker processes: tasks of a run on several devices, one process per device."""

from .devices import Devices, parse_devices, same_model, usable_device, without_number
from .pool import InProcess, TaskPool, WorkerPool, open_pool
from .task import DeviceFailure, Task

__all__ = [
    "DeviceFailure",
    "Devices",
    "InProcess",
    "Task",
    "TaskPool",
    "WorkerPool",
    "open_pool",
    "parse_devices",
    "same_model",
    "usable_device",
    "without_number",
]
