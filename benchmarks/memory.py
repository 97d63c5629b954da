"""Peak memory of this process."""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Peak resident set size in bytes since the program started.

    On Linux this is VmHWM: ``getrusage`` includes the memory that the process shared with its parent between fork and
    exec. On macOS ``getrusage`` counts only this process, in bytes.
    """
    if sys.platform == "linux":
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
