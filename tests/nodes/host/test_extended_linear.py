"""The short forward pass of ComfyUI's quantized linear layers, with the CPU in the place of a GPU."""

import contextlib
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from learned_rounding.quant_core import FORMATS
from learned_rounding.tests.in_comfyui import IN_COMFYUI
from learned_rounding.tests.nodes.probing import stock_loads

if IN_COMFYUI:
    import comfy.ops

    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.host import extended_linear, native_int8
    from learned_rounding.tests.nodes.host.cpu_in_place_of_gpu import on_cpu
    from learned_rounding.tests.nodes.host.tiny_model import TinyModel, distance

pytestmark = pytest.mark.usefixtures("in_comfyui")

OURS = [name for name, entry in FORMATS.items() if entry.stock_since is None]
# Format of a whole model → recipe and largest relative difference from ComfyUI's forward pass.
RECIPES = {
    "fp8": ({"format": "float8_e4m3fn"}, 0.02),
    **{name: ({"format": name, **({"block_size": 64} if "block" in name else {})}, 1e-3) for name in OURS},
    "int8 row": ({"format": "int8_tensorwise"}, 1e-3),
    "int8 convrot": ({"format": "int8_tensorwise", "convrot": True}, 1e-3),
}


@contextlib.contextmanager
def counted():
    """Let layers on the CPU take the short forward pass; yields the list of the layouts that took it."""
    taken = []

    def count(layout, run):
        def call(*arguments):
            taken.append(layout)
            return run(*arguments)

        return call

    table = {layout: count(layout, run) for layout, run in extended_linear._short_forwards().items()}
    with (
        patch.object(extended_linear, "_DEVICES", ("cpu", "cuda")),
        patch.object(extended_linear, "_short_forwards", lambda: table),
    ):
        yield taken


@pytest.fixture
def tiny(host):
    if not stock_loads(host, "int8_tensorwise"):
        pytest.skip(f"ComfyUI {host.version} has no quantized layers of its own")
    pack.add_layouts()
    with on_cpu():
        native_int8._set_setting("on")
        yield TinyModel()


def test_short_forward_pass_gives_the_results_of_comfyui(tiny, subtests):
    """Alone, with a LoRA, and with a LoRA and little memory."""
    for name, (recipe, bound) in RECIPES.items():
        model = pack.build_model(tiny.original, tiny.file(**recipe))
        layers, patched, counts = len(pack.quantized_layers(model)), tiny.with_lora(model), {}
        cases = {"alone": (model, {}), "LoRA": (patched, {}), "little memory": (patched, {"lowvram_model_memory": 1})}
        for case, (model, options) in cases.items():
            expected = tiny.run(model, **options)
            with counted() as taken, subtests.test(f"{name}, {case}"):
                assert distance(tiny.run(model, **options), expected) < bound
            counts[case] = len(taken)
        with subtests.test(f"{name}: layers that take it"):
            if name == "fp8":  # ComfyUI dequantizes FP8 on a GPU without FP8 tensor cores
                assert counts["alone"] in (0, layers)
            else:
                assert counts["alone"] == layers
                assert layers > 30
                assert counts["LoRA"] == layers  # the LoRA is in the weights, which are quantized again
                assert counts["little memory"] < layers


@pytest.fixture
def layer(tiny):
    """An INT8 layer that has a short forward pass."""
    model = pack.build_model(tiny.original, tiny.file(**RECIPES["int8 convrot"][0]))
    return next(module for module in model.model.modules() if extended_linear.has_short_forward(module))


@pytest.fixture
def x(layer):
    return torch.zeros(2, layer.in_features, dtype=layer.weight.dtype)


def runs(layer, x, **attributes) -> bool:
    """Whether the short forward pass runs the layer with some of its attributes replaced."""
    with patch.dict(layer.__dict__, attributes):
        return extended_linear._run_short(layer, x) is not None


def test_only_what_needs_no_preparation_takes_the_short_pass(layer, x, subtests):
    other = next(dtype for dtype in (torch.float16, torch.bfloat16) if dtype is not x.dtype)
    prepared = {
        "other dtype": (x.to(other), {}),
        "full precision": (x, {"_full_precision_mm": True}),
        "forced cast": (x, {"comfy_force_cast_weights": True}),
        "prefetched": (x, {"_prefetch": {}}),
        "patched": (x, {"weight_function": [lambda weight: weight]}),
        "patched bias": (x, {"bias_function": [lambda bias: bias]}),
        "another device": (x.to("meta"), {}),
        "another layout": (x, {"layout_type": extended_linear._FP8_LAYOUT}),
        "gradient": (x.clone().requires_grad_(), {}),
    }
    with counted():
        assert runs(layer, x)
        for name, (inputs, attributes) in prepared.items():
            with subtests.test(name):
                assert not runs(layer, inputs, **attributes)


def test_banks_of_experts_have_no_short_pass(layer):
    experts = comfy.ops.mixed_precision_ops().MoEExperts(2, 64, 64)
    experts.layout_type = layer.layout_type
    assert not extended_linear.has_short_forward(experts)


class Pages:
    """Stand-in of comfy_aimdo.model_vbar: pages with a signature that changes when they are moved, None if VRAM is full."""

    def __init__(self):
        self.signature, self.pins = 1, 0

    def vbar_fault(self, pages):
        self.pins += self.signature is not None
        return self.signature

    def vbar_signature_compare(self, a, b):
        return a == b

    def vbar_unpin(self, pages):
        self.pins -= 1


def run_out_of_memory(*arguments):
    raise torch.OutOfMemoryError


def test_weights_in_pages_of_dynamic_vram(layer):
    """The weight of the layer is elsewhere, and a copy is in pages that are in VRAM or not."""
    pages, x = Pages(), torch.randn(2, layer.in_features, dtype=layer.weight.dtype)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    moved = {"_v": "pages", "_v_signature": 1, "_v_weight": weight, "_v_bias": bias}
    aimdo = SimpleNamespace(model_vbar=pages)
    with counted(), patch.dict(sys.modules, comfy_aimdo=aimdo), patch.dict(layer.__dict__, moved):
        expected = extended_linear._run_short(layer, x)
        with patch.dict(layer._parameters, {"weight": weight.to("meta"), "bias": bias}):
            assert torch.equal(extended_linear._run_short(layer, x), expected)
            assert pages.pins == 0
            failing = {layer.layout_type: run_out_of_memory}
            with (
                patch.object(extended_linear, "_short_forwards", lambda: failing),
                contextlib.suppress(torch.OutOfMemoryError),
            ):
                extended_linear._run_short(layer, x)
            assert pages.pins == 0
            for pages.signature in (2, None):  # moved, and out of VRAM
                assert extended_linear._run_short(layer, x) is None
                assert pages.pins == 0
