"""The most memory that this process has held."""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Bytes resident at the peak since the program of this process began.

    On Linux that is VmHWM. ``getrusage`` counts there what a new process shared with its parent until it started its
    own program, the parent's whole memory that is; on macOS it counts this process alone, in bytes already.
    """
    if sys.platform == "linux":
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
