"""Connection to a Ray cluster: what its nodes have, whether they fit this process, and whether it still answers.

Everything that has to do with scheduling is Ray's. The code of this package is shipped to the nodes by Ray's runtime
environment, so that a clone and an installed package work alike; the nodes need Ray, torch and the packages of
``requirements.txt``.
"""

import contextlib
import logging
import platform
import re
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..display import shorten
from ..errors import ClusterLostError, MissingPackageError, QuantizationError
from .ray_tasks import NodeCheck, check_node
from .task import first_line

log = logging.getLogger(__name__)

__all__ = ["Node", "RayCluster", "describe_missing"]

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = __name__.removesuffix(".quant_core.workers.ray_cluster")
_SHIPPED = ("__init__.py", "pyproject.toml", "kernels", "quant_core")
_ANSWER = 5  # s for a connection to a port of the cluster
_GONE = 20  # s without an answer after which the cluster counts as lost; Ray ends this process after 60 s
_PAUSE = 1  # s between two looks whether the cluster answers
_CHECK = 180  # s for the tasks that check the nodes: the first one on a node unpacks this package and imports torch
_TYPE = "accelerator_type:"  # prefix of the resource by which Ray names the model of a node's GPUs


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        id: Ray's id.
        name: host name, for messages.
        gpus, cpus: number of each.
        model: of its GPUs as Ray names it; empty if unknown.
    """

    id: str
    name: str
    gpus: float
    cpus: float
    model: str


class RayCluster:
    """A connection to a Ray cluster; a context manager, which disconnects.

    Args:
        address: "auto", "HOST:6379" or "ray://HOST:10001".

    Attributes:
        nodes: those that do tasks: all with GPUs of the model that most GPUs are of or, without any GPU, all with
            as many CPUs as a task has threads.
        cuda: tasks run on GPUs, one each.
        workers: number of tasks that the cluster does at a time.
        options: resources of a task, as options of ``ray.remote``.
        note: sentence for users on what is not used or has to be waited for; empty without.

    Raises:
        MissingPackageError: Ray is not installed here.
        QuantizationError: the cluster does not answer, has another version, or has neither GPUs nor CPUs.
    """

    def __init__(self, address: str):
        self.address = address
        self._closed = threading.Event()
        self._lost = ""
        self._folder = tempfile.TemporaryDirectory(prefix="learned_rounding_")
        self.ray = _import_ray()
        # Ray prints errors of nodes to standard output, which may be for a JSON document; those of tasks are reported here.
        self.ray._private.worker.print_to_stdstream = _log_message
        try:
            self._connect()
            self._choose_nodes()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, name="learned-rounding-ray", daemon=True).start()

    @property
    def devices(self) -> str:
        """What does the tasks, for the report."""
        kind = (self.nodes[0].model or "GPU") if self.cuda else "CPU"
        nodes = f"{len(self.nodes)} node{'' if len(self.nodes) == 1 else 's'}"
        return f"{self.workers} × {kind} on {nodes} of a Ray cluster"

    @property
    def lost(self) -> str:
        """Sentence for users once the cluster does not answer; empty as long as it does."""
        return self._lost

    def check_lost(self) -> None:
        """Raise :class:`ClusterLostError` once the cluster does not answer."""
        if self._lost:
            raise ClusterLostError(self._lost)

    def report_lost(self, reason: object) -> None:
        """Note that the cluster does not answer."""
        if not self._lost and not self._closed.is_set():
            self._lost = (
                f"The Ray cluster {self.address} does not answer ({shorten(first_line(reason), 100)}); complete outputs are kept: start the "
                "cluster again and run the same command to continue."
            )

    def check_nodes(self, sources: Sequence[Path] = (), folders: Sequence[Path] = ()) -> None:
        """Let every node that does tasks check its versions, and the paths that it has to share with this machine.

        Args:
            sources: files or folders that the nodes read.
            folders: folders that the nodes write to.

        Raises:
            QuantizationError: a node lacks something; the first one found is named.
        """
        strategies = self.ray.util.scheduling_strategies
        with _place_markers(folders) as markers:
            read = [str(path.absolute()) for path in sources]
            pending = {}
            for node in self.nodes:
                remote = self.ray.remote(check_node).options(
                    num_cpus=0,
                    max_retries=0,
                    name=f"check of node {node.name}",
                    scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(node.id, soft=False),
                )
                pending[remote.remote(read, markers)] = node
            ended = time.monotonic() + _CHECK
            for reference, node in pending.items():
                self._check_result(node, self._wait(node, reference, ended))

    def _wait(self, node: Node, reference: Any, ended: float) -> NodeCheck:
        while True:
            self.check_lost()
            try:
                return self.ray.get(reference, timeout=_PAUSE)
            except self.ray.exceptions.GetTimeoutError:
                if time.monotonic() > ended:
                    raise QuantizationError(
                        f"Node {node.name} of the Ray cluster does not start tasks within {_CHECK} s; see Ray's logs there."
                    ) from None
            except Exception as error:
                raise QuantizationError(describe_missing(node.name, error)) from error

    def _check_result(self, node: Node, found: NodeCheck) -> None:
        versions = (("Python", found.python, _python_version()), ("torch", found.torch, _torch_version()))
        for name, there, here in versions:
            if there != here:
                raise QuantizationError(
                    f"Node {node.name} has {name} {there} and this machine {name} {here}; install the same version on both."
                )
        if self.cuda and not found.cuda:
            raise QuantizationError(
                f"Node {node.name} has GPUs and a torch without CUDA; install torch for CUDA there (https://pytorch.org)."
            )
        if found.problem:
            raise QuantizationError(
                f"Node {node.name} {found.problem}; use paths that all nodes share, or --split to read and write on this "
                "machine only."
            )

    def _connect(self) -> None:
        if (host := _host_and_port(self.address)) and not _answers(*host):
            raise QuantizationError(
                f"No Ray cluster answers at {self.address}; correct the address, or start one with ray start --head.",
                option="ray",
            )
        try:
            self.ray.init(
                address=self.address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"py_modules": [str(self._copy_package())]},
            )
            context = self.ray.get_runtime_context()
            self._control = None if self.address.startswith("ray://") else _split(context.gcs_address)
            self.node_id = context.get_node_id()
        except (Exception, SystemExit) as error:
            raise QuantizationError(
                f"The Ray cluster {self.address} cannot be used: {first_line(error)}.", option="ray"
            ) from error

    def _copy_package(self) -> Path:
        """A copy of what tasks need under the name of the package, which a clone may not have."""
        folder = Path(self._folder.name) / _PACKAGE
        for name in _SHIPPED:
            if (_ROOT / name).is_dir():
                shutil.copytree(_ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                folder.mkdir(exist_ok=True)
                shutil.copy2(_ROOT / name, folder / name)
        return folder

    def _choose_nodes(self) -> None:
        nodes = [_read_node(entry) for entry in self.ray.nodes() if entry["Alive"]]
        models: Counter[str] = Counter()
        for node in nodes:
            models[node.model] += int(node.gpus)
        self.note = ""
        self.cuda = max(models.values(), default=0) > 0
        if self.cuda:
            model = max(models, key=lambda name: (models[name], name))
            self.nodes = [node for node in nodes if node.gpus >= 1 and node.model == model]
            self.workers = models[model]
            self.options: dict[str, Any] = {"num_gpus": 1, **({"accelerator_type": model} if model else {})}
            others = ", ".join(
                f"{count} × {name or 'GPU'}" for name, count in models.items() if count and name != model
            )
            if others:
                self.note = f"Only GPUs of the model {model or 'GPU'} are used, as others may round ties differently: not {others}."
        else:
            most = max((int(node.cpus) for node in nodes), default=0)
            each = max(1, min(torch.get_num_threads(), most))  # threads of a task, as in this process
            self.nodes = [node for node in nodes if node.cpus >= each]
            self.workers = sum(int(node.cpus) // each for node in self.nodes)
            self.options = {"num_cpus": each}
        if not self.workers:
            raise QuantizationError(
                f"The Ray cluster {self.address} has neither a GPU nor a CPU for tasks; start nodes with some.",
                option="ray",
            )
        kind = "GPU" if self.cuda else "CPU"
        if not self.note and not self.ray.available_resources().get(kind):
            self.note = f"Every {kind} of the Ray cluster is in use; tasks wait until one is free."

    def _watch(self) -> None:
        """Notice that the control process of the cluster is gone; Ray itself waits without a word, then ends this process."""
        if self._control is None:
            return  # a client's calls fail by themselves
        answered = time.monotonic()
        while not self._closed.wait(_PAUSE):
            if _answers(*self._control):
                answered = time.monotonic()
            elif time.monotonic() - answered > _GONE:
                self.report_lost(f"no answer for {_GONE} s")
                return

    def close(self) -> None:
        """Disconnect; of a cluster that is lost, without waiting for it."""
        self._closed.set()
        self._folder.cleanup()
        if not self._lost:
            self.ray.shutdown()

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def describe_missing(node: str, error: BaseException) -> str:
    """Sentence for users on an error that ended a task before its work; ``node``: its name."""
    found = re.search(r"No module named '?([\w.]+)", str(error))
    if found:
        name = found[1].partition(".")[0]
        return f"The package {name} is not installed on node {node}; install it there with pip install {name}."
    return f"Node {node} of the Ray cluster cannot start tasks: {first_line(error)}."


def _import_ray() -> Any:
    try:
        import ray
        import ray.util.queue
        import ray.util.scheduling_strategies
    except ImportError:
        raise MissingPackageError(
            "A Ray cluster needs a package that is not installed here: run 'pip install ray' in the "
            "Python of lrq, or leave --ray out.",
            option="ray",
        ) from None
    return ray


def _log_message(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
    log.info("%s", "\n".join(data["lines"]))


def _python_version() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _torch_version() -> str:
    return torch.__version__.partition("+")[0]


def _read_node(entry: Mapping[str, Any]) -> Node:
    resources = entry["Resources"]
    model = next((name.removeprefix(_TYPE) for name in resources if name.startswith(_TYPE)), "")
    gpus, cpus = resources.get("GPU", 0), resources.get("CPU", 0)
    return Node(entry["NodeID"], entry["NodeManagerHostname"], gpus, cpus, model if gpus else "")


def _host_and_port(address: str) -> tuple[str, int] | None:
    """Where a cluster is asked whether it exists; None for "auto"."""
    if address == "auto":
        return None
    try:
        return _split(address.removeprefix("ray://"))
    except ValueError:
        raise QuantizationError(
            f"'{shorten(address, 100)}' is not the address of a Ray cluster; give auto, HOST:6379 or ray://HOST:10001.",
            option="ray",
        ) from None


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host:
        raise ValueError(address)
    return host.strip("[]"), int(port)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_ANSWER).close()
    except (OSError, OverflowError, UnicodeError):
        return False
    return True


@contextlib.contextmanager
def _place_markers(folders: Sequence[Path]) -> Iterator[list[str]]:
    """A hidden file in each folder, by which a node sees that the folder is the same one; one that does not exist is left out."""
    with contextlib.ExitStack() as opened:
        markers = []
        for folder in {folder.absolute() for folder in folders}:
            with contextlib.suppress(OSError):  # the run reports a folder that cannot be written here either
                marker = opened.enter_context(tempfile.NamedTemporaryFile(prefix=".learned_rounding_", dir=folder))
                markers.append(marker.name)
        yield markers
