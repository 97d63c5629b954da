"""Workflows in ComfyUI's API form: built node by node, or read from a file that the browser saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Graph", "Node", "to_api", "widget_names"]


class Node:
    """A node of a :class:`Graph`; ``node[slot]`` is the link to one of its outputs."""

    def __init__(self, node_id: str):
        self.id = node_id

    def __getitem__(self, slot: int) -> list:
        return [self.id, slot]


class Graph(dict):
    """An API workflow that is built by calls:

    graph = Graph()
    model = graph.add("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default")
    graph.add("ModelSave", model=model[0], filename_prefix="copy")
    """

    def add(self, class_type: str, **inputs: Any) -> Node:
        node = Node(str(len(self) + 1))
        self[node.id] = {"class_type": class_type, "inputs": inputs}
        return node


# Widgets after which the browser keeps a value of its own ("what happens to the seed after a run").
_CONTROLLED = ("seed", "noise_seed")


def widget_names(definition: Mapping[str, Any]) -> list[str | None]:
    """Names of a node's widgets in the order of ``widgets_values``; None for the browser's own."""
    names: list[str | None] = []
    for group in ("required", "optional"):
        for name, (kind, *options) in definition["input"].get(group, {}).items():
            options = options[0] if options else {}
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                names.append(name)
                if kind == "INT" and options.get("control_after_generate", name in _CONTROLLED):
                    names.append(None)
    return names


def to_api(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, dict]:
    """A workflow saved by the browser → what it would queue. ``object_info``: the server's node definitions.

    Covers plain nodes and notes; no subgraphs, reroutes or bypassed nodes. A node the server does not have is a KeyError.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    api = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        inputs = {
            entry["name"]: sources[entry["link"]] for entry in node.get("inputs", ()) if entry.get("link") is not None
        }
        names = widget_names(object_info[node["type"]])
        values = {
            name: value
            for name, value in zip(names, node.get("widgets_values") or (), strict=False)
            if name is not None
        }
        api[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **inputs}}
    return api
