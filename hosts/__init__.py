"""Real ComfyUI on this machine, for tests, the demo and benchmarks.

    from learned_rounding.hosts import ComfyServer, available_hosts

    with ComfyServer(available_hosts()[0]) as server:
        result = server.queue(workflow)

`install` makes the hosts (`make hosts`), `server` runs one, `browser` opens its page in headless Chromium.
"""

from .install import Host, InstallError, available_hosts, install_hosts
from .server import ComfyServer, Event, HostError, HostInterrupted, Result

__all__ = [
    "ComfyServer",
    "Event",
    "Host",
    "HostError",
    "HostInterrupted",
    "InstallError",
    "Result",
    "available_hosts",
    "install_hosts",
]
