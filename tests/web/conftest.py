import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.benchmarks.tiny_model.model import MMDiT
from learned_rounding.hosts.browser import load_workflow

WORKFLOW = json.loads((Path(__file__).parent / "workflow.json").read_text(encoding="utf-8"))
SEED = 3  # its place among the widgets of Configure Quantization

# Keeps what the page hears; noteStep() makes what was changed a step to undo, under either name that frontends have for it.
_RECORD = """() => {
    window.noteStep = () => {
        const {changeTracker} = window.app.extensionManager.workflow.activeWorkflow
        ;(changeTracker.captureCanvasState ?? changeTracker.checkState).call(changeTracker)
    }
    window.heard = []
    window.comfyAPI.api.api.addEventListener('learned_rounding.progress', ({detail}) => window.heard.push(detail))
}"""


@pytest.fixture(scope="module")
def model_file(comfy):
    """A small random model in ComfyUI's folder: (name to choose, path)."""
    torch.manual_seed(0)
    path = comfy.models_dir / "diffusion_models" / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().to(torch.bfloat16).contiguous() for key, tensor in MMDiT().state_dict().items()}
    for key, tensor in state.items():
        if tensor.ndim == 2 and not tensor.any():
            state[key] = torch.randn_like(tensor) * 0.02
    save_file(state, path)
    return f"diffusion_models/{path.name}", path


@pytest.fixture
def gate(comfy):
    """gate(n): n more layers are quantized, and the next one waits; None: none waits any more."""

    def set_gate(layers: int | None) -> None:
        comfy.post("/probe/gate", {"layers": layers})

    yield set_gate
    set_gate(None)


@pytest.fixture(scope="module", params=[False, True], ids=["canvas-nodes", "vue-nodes"])
def page(open_comfy_page, model_file, request):
    """One page for all tests of a module: opening one takes longer than any of them."""
    page = open_comfy_page(vue_nodes=request.param)
    page.vue_nodes = request.param
    page.evaluate(_RECORD)
    return page


@pytest.fixture
def workflow():
    """workflow(seed=…, model=…, rounding=…, further keys of the workflow) → Load Model → Configure → Quantize → Save, as a graph with positions."""

    def make(*, seed=0, model=None, rounding="auto", **more):
        graph = copy.deepcopy(WORKFLOW)
        graph["nodes"][1]["widgets_values"][SEED : SEED + 2] = [seed, rounding]
        if model:
            graph["nodes"][0]["widgets_values"][0] = model
        return {**graph, **more}

    return make


@pytest.fixture
def graph(page, workflow):
    """The page with that workflow in view."""
    load_workflow(page, workflow())
    page.evaluate("() => { window.heard.length = 0 }")
    page.locator(".lr-progress").wait_for(state="visible")
    return page
