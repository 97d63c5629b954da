"""Name of the model that a node's input comes from, for the names of saved files."""

from collections.abc import Mapping

from ...quant_core.sources.shards import model_stem
from .folders import SOURCE_SUFFIXES

__all__ = ["MODEL_NAME", "insert_model_name"]

MODEL_NAME = "%model%"  # in a file name prefix: the name of the source model
_UNKNOWN = "model"
_WAYS = ("quantized", "source", "model", "clip", "model1", "clip1")  # inputs that lead to the source model, best first


def insert_model_name(prefix: str, prompt, node_id: str) -> str:
    """``prefix`` with the name of the source model in place of :data:`MODEL_NAME`; ``prompt``: ComfyUI's DynamicPrompt."""
    if MODEL_NAME not in prefix:
        return prefix
    return prefix.replace(MODEL_NAME, _find_model_name(prompt, node_id) or _UNKNOWN)


def _find_model_name(prompt, node_id: str) -> str | None:
    """Name, without folder and suffix, of the model file that the first loader above a node names; None if none does."""
    seen = set()
    while node_id not in seen:
        seen.add(node_id)
        inputs = prompt.get_node(node_id).get("inputs", {})
        links = {name: str(value[0]) for name, value in inputs.items() if isinstance(value, list) and len(value) == 2}
        way = next((name for name in _WAYS if name in links), None)
        if way is None and (file := _find_file(inputs)):
            return model_stem(file.replace("\\", "/").rpartition("/")[2])
        if not links:
            return None
        node_id = links[way or next(iter(links))]
    return None


def _find_file(inputs: Mapping[str, object]) -> str | None:
    """The first input that names a model file."""
    values = (value for value in inputs.values() if isinstance(value, str))
    return next((value for value in values if value.lower().endswith(SOURCE_SUFFIXES)), None)
