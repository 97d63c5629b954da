"""ComfyUI installations for tests, the demo and benchmarks.

    from learned_rounding.hosts import ComfyServer, available_hosts

    with ComfyServer(available_hosts()[0]) as server:
        result = server.queue(workflow)

`install` installs the hosts (`make hosts`), `server` runs one, `client` queues workflows, `browser` opens its page in headless
Chromium.
"""

from .install import Host, InstallError, available_hosts, find_host, install_hosts
from .results import Event, HostError, HostInterrupted, Result
from .server import ComfyServer

__all__ = [
    "ComfyServer",
    "Event",
    "Host",
    "HostError",
    "HostInterrupted",
    "InstallError",
    "Result",
    "available_hosts",
    "find_host",
    "install_hosts",
]
