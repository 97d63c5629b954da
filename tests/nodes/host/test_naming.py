"""The name of the source model, found through the graph."""

from types import SimpleNamespace

import pytest

from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    from learned_rounding.nodes import host as pack

pytestmark = pytest.mark.usefixtures("in_comfyui")

# Case → (inputs of the nodes, name of the source model of the node "1").
GRAPHS = {
    "file": (
        {"1": {"quantized": ["2", 2]}, "2": {"source": ["3", 0]}, "3": {"model_file": "diffusion_models/a/flux.gguf"}},
        "flux",
    ),
    "LoRA": (
        {
            "1": {"quantized": ["2", 2]},
            "2": {"source": ["3", 0]},
            "3": {"lora_name": "x.safetensors", "model": ["4", 0]},
            "4": {"unet_name": "m-00001-of-00002.safetensors"},
        },
        "m",
    ),
    "text encoders": (
        {
            "1": {"quantized": ["2", 2]},
            "2": {"recipe": ["5", 0], "source": ["3", 1]},
            "3": {"clip_name1": "a\\t5.xxl.safetensors", "clip_name2": "b.safetensors"},
        },
        "t5.xxl",
    ),
    "unknown": ({"1": {"quantized": ["2", 0]}, "2": {"any": ["3", 0]}, "3": {"text": "no model"}}, "model"),
    "circle": ({"1": {"quantized": ["1", 0]}}, "model"),
}


def prompt_of(nodes: dict) -> SimpleNamespace:
    return SimpleNamespace(get_node=lambda node_id: {"inputs": nodes[node_id]})


def test_source_model_is_found_through_the_graph(subtests):
    for case, (nodes, name) in GRAPHS.items():
        with subtests.test(case):
            assert pack.insert_model_name("sub/%model%_x", prompt_of(nodes), "1") == f"sub/{name}_x"


def test_prefix_without_a_placeholder_stays():
    assert pack.insert_model_name("mine", prompt_of(GRAPHS["file"][0]), "1") == "mine"
