"""Workflows in ComfyUI's API format: built node by node, or converted from the frontend's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Graph", "Node", "to_api", "widget_names"]


class Node:
    """Node of a :class:`Graph`; ``node[slot]`` is a link to one of its outputs."""

    def __init__(self, node_id: str):
        self.id = node_id

    def __getitem__(self, slot: int) -> list:
        return [self.id, slot]


class Graph(dict):
    """API workflow built by calls:

    graph = Graph()
    model = graph.add("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default")
    graph.add("ModelSave", model=model[0], filename_prefix="copy")
    """

    def add(self, class_type: str, **inputs: Any) -> Node:
        """Add a node with its inputs: values, or links such as ``node[0]``."""
        node = Node(str(len(self) + 1))
        self[node.id] = {"class_type": class_type, "inputs": inputs}
        return node


# Widgets that the frontend follows by a value of its own, control_after_generate.
_CONTROLLED = ("seed", "noise_seed")


def widget_names(definition: Mapping[str, Any]) -> list[str | None]:
    """Widget names of a node definition in the order of ``widgets_values``; None for the frontend's own values."""
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
    """Convert a workflow from the frontend's format to the API format.

    Supports plain nodes and notes, not subgraphs, reroutes or bypassed nodes.

    Args:
        workflow: as the frontend saves it.
        object_info: the server's node definitions.

    Raises:
        KeyError: the server does not have one of the node classes.
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
