"""Shared by the node tests: graphs with the probe node, formats that a host reads, results."""

import json
import re
from pathlib import Path

from learned_rounding.benchmarks.tiny_model.graph import TinyGraph
from learned_rounding.hosts.workflows import Node
from learned_rounding.quant_core import FORMATS

__all__ = [
    "CASES",
    "ProbedGraph",
    "case_name",
    "loads",
    "probed",
    "progress",
    "saved_path",
    "stock_loads",
    "takes_layouts",
    "text",
    "unique",
]

# Format, options of Configure Quantization.
CASES = [(name, {"granularity": granularity}) for name, entry in FORMATS.items() for granularity in entry.granularities]
CASES += [
    ("int8_tensorwise", {"granularity": "row", "convrot": "on"}),
    ("asym_w4a8_int8", {"bits": 6}),
    ("convrot_w4a4", {"linear_dtype": "int4"}),
]


def case_name(value) -> str:
    """Test ids: "asym_w4a8_int8-6"."""
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


class ProbedGraph(TinyGraph):
    """A graph of the tiny model with a node that inspects a MODEL."""

    def sample(self, model: list, prefix: str, seed: int = 1, steps: int = 6) -> None:
        """Sample as :class:`TinyGraph` does; 6 steps are enough to compare two models bit for bit."""
        super().sample(model, prefix, seed, steps)

    def probe(self, model: list) -> Node:
        return self.add("ProbeModel", model=model)


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def stock_loads(host, format: str) -> bool:
    """Whether the host's own loaders read files of that format without this pack."""
    since = FORMATS[format].stock_since
    return since is not None and _parts(host.version) >= _parts(since)


def takes_layouts(host) -> bool:
    """Whether this pack can register its formats with the host's own loaders."""
    return (
        "def _load_quantized_module(module, super_load, state_dict, prefix,"
        in (host.path / "comfy" / "ops.py").read_text()
    )


def loads(host, format: str) -> bool:
    """Whether the host's own loaders read files of that format when this pack is installed."""
    return takes_layouts(host) if FORMATS[format].stock_since is None else stock_loads(host, format)


def text(result, node: Node) -> str:
    """The text that a node shows."""
    return result.outputs[node.id]["text"][0]


def saved_path(result, node: Node) -> Path:
    """The file of Save Quantized."""
    return Path(text(result, node))


def unique(request, *parts: str) -> str:
    """A file name that no other test uses."""
    return re.sub(r"\W+", "-", "-".join((request.node.name, *parts)))


def probed(result, node: Node) -> dict:
    """The result of ProbeModel."""
    return json.loads(text(result, node))


def progress(result) -> list[dict]:
    """The payloads of this pack's progress events, in order."""
    return [event.data for event in result.of("learned_rounding.progress")]
