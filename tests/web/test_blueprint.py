"""The blueprint of a subgraph: listed by the server, and in a page it runs as one node."""

import json

import pytest

from learned_rounding.benchmarks.tiny_model.graph import MODEL, pictures
from learned_rounding.benchmarks.tiny_model.place import DATASET
from learned_rounding.hosts.browser import load_workflow, queue_prompt

pytestmark = pytest.mark.browser

NAME = "Quantize and Sample"

# Sources around the blueprint's node, and what keeps its outputs: [type, widget values, {its output: our input}].
_AROUND = [
    ["UNETLoader", {"unet_name": MODEL}, {"MODEL": "source"}],
    ["LoadTrainingDataset", {"folder_name": DATASET}, {"conditioning": "positive"}],
    ["ConditioningZeroOut", {}, {"CONDITIONING": "negative"}],
    ["EmptySD3LatentImage", {"width": 64, "height": 64}, {"LATENT": "latent_image"}],
    ["VAELoader", {"vae_name": "taesd3"}, {"VAE": "vae"}],
]

_CONNECT = r"""(around) => {
    const {graph} = window.app
    const [node] = graph._nodes
    const add = (type, values = {}) => {
        const made = LiteGraph.createNode(type)
        graph.add(made)
        for (const [name, value] of Object.entries(values)) made.widgets.find((widget) => widget.name === name).value = value
        return made
    }
    const slot = (slots, name) => slots.findIndex((each) => each.name === name)
    const made = Object.fromEntries(around.map(([type, values, links]) => {
        const source = add(type, values)
        for (const [output, input] of Object.entries(links)) source.connect(slot(source.outputs, output), node, slot(node.inputs, input))
        return [type, source]
    }))
    const {LoadTrainingDataset, ConditioningZeroOut} = made
    LoadTrainingDataset.connect(slot(LoadTrainingDataset.outputs, 'conditioning'), ConditioningZeroOut, 0)
    const keep = {SaveImage: 'IMAGE', LearnedRoundingSave: 'quantized', PreviewAny: 'report'}
    for (const [type, output] of Object.entries(keep)) {
        const target = add(type)
        node.connect(slot(node.outputs, output), target, 0)
        const prefix = target.widgets?.find((widget) => widget.name === 'filename_prefix')
        if (prefix) prefix.value = 'blueprint'
    }
    return node.widgets.map((widget) => widget.name.replace(/^\d+: /, '')) // older frontends put the inner node first
}"""


def test_the_blueprint_is_listed_and_runs(comfy, comfy_page):
    listed = comfy.get("/global_subgraphs")
    (entry,) = (key for key, value in listed.items() if value["info"]["node_pack"].endswith("learned_rounding"))
    assert listed[entry]["name"] == NAME
    blueprint = json.loads(comfy.get(f"/global_subgraphs/{entry}")["data"])
    load_workflow(comfy_page, blueprint)
    shown = comfy_page.evaluate(_CONNECT, _AROUND)
    assert {"format", "preset", "steps", "cfg", "sampler_name", "scheduler"} <= set(shown)
    assert queue_prompt(comfy_page)["type"] == "execution_success"
    assert pictures(comfy.output_dir, "blueprint").shape[1:] == (64, 64, 3)
    assert list((comfy.output_dir / "diffusion_models").glob("blueprint_*.safetensors"))
