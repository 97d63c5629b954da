"""Peak memory of this process."""

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Peak resident set size in bytes since the program started.

    On Linux this is VmHWM: ``getrusage`` includes the memory that the process shared with its parent between fork and
    exec. On macOS ``getrusage`` counts only this process, in bytes. Windows counts the working set.
    """
    if sys.platform == "linux":
        line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
