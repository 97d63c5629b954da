"""What the node tests share: the probe node in a graph, and reading results."""

import json

from learned_rounding.benchmarks.tiny_model.graph import TinyGraph
from learned_rounding.hosts.workflows import Node
from learned_rounding.quant_core import FORMATS

__all__ = ["CASES", "ProbedGraph", "probed", "progress", "stock_loads", "text"]

CASES = [(name, granularity, "off") for name, entry in FORMATS.items() for granularity in entry.granularities]
CASES.append(("int8_tensorwise", "row", "on"))


class ProbedGraph(TinyGraph):
    """A graph of the tiny model that can look into a MODEL."""

    def probe(self, model: list) -> Node:
        return self.add("ProbeModel", model=model)


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def stock_loads(host, format: str) -> bool:
    """Whether the host's own loaders read files of that format."""
    since = FORMATS[format].stock_since
    return since is not None and _parts(host.version) >= _parts(since)


def text(result, node: Node) -> str:
    """What a node showed."""
    return result.outputs[node.id]["text"][0]


def probed(result, node: Node) -> dict:
    """What ProbeModel found."""
    return json.loads(text(result, node))


def progress(result) -> list[dict]:
    """The payloads of our events, in order."""
    return [event.data for event in result.of("learned_rounding.progress")]
