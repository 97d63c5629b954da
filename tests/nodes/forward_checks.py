"""Checks of in_process.py: the short forward pass of ComfyUI's quantized linear layers, with the CPU in the place of a GPU."""

import contextlib
import sys
from types import SimpleNamespace
from unittest.mock import patch

import comfy.ops
import torch
from layout_checks import OURS, TinyModel, distance
from native_checks import native, on_cpu
from pack.nodes import host

extended = sys.modules["pack.nodes.host.extended_linear"]
RECIPES = {
    "fp8": {"format": "float8_e4m3fn"},
    **{name: {"format": name, **({"block_size": 64} if "block" in name else {})} for name in OURS},
    "int8 row": {"format": "int8_tensorwise"},
    "int8 convrot": {"format": "int8_tensorwise", "convrot": True},
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

    table = {layout: count(layout, run) for layout, run in extended._short_forwards().items()}
    with patch.object(extended, "_DEVICES", ("cpu", "cuda")), patch.object(extended, "_short_forwards", lambda: table):
        yield taken


def short() -> dict:
    """Every layout by the short and by ComfyUI's own forward pass: alone, with a LoRA, with little memory."""
    host.add_layouts()
    tiny, found = TinyModel(), {}
    with on_cpu():
        native._set_setting("on")
        for name, recipe in RECIPES.items():
            model = host.build_model(tiny.original, tiny.file(**recipe))
            patched = tiny.with_lora(model)
            cases = (model, {}), (patched, {}), (patched, {"lowvram_model_memory": 1})
            wanted = [tiny.run(case, **options) for case, options in cases]
            runs, counts = [], []
            with counted() as taken:
                for case, options in cases:
                    taken.clear()
                    runs.append(tiny.run(case, **options))
                    counts.append(len(taken))
            found[name] = {
                "layers": len(host.quantized_layers(model)),
                "taken": counts,
                "distances": [distance(got, want) for got, want in zip(runs, wanted, strict=True)],
            }
        layer = next(module for module in model.model.modules() if extended.has_short_forward(module))
        x = torch.zeros(2, layer.in_features, dtype=layer.weight.dtype)
        other = next(dtype for dtype in (torch.float16, torch.bfloat16) if dtype is not x.dtype)
        with counted():
            found["ready"] = {
                "plain": _runs(layer, x),
                "other dtype": _runs(layer, x.to(other)),
                "full precision": _runs(layer, x, _full_precision_mm=True),
                "forced cast": _runs(layer, x, comfy_force_cast_weights=True),
                "prefetched": _runs(layer, x, _prefetch={}),
                "patched": _runs(layer, x, weight_function=[lambda weight: weight]),
                "patched bias": _runs(layer, x, bias_function=[lambda bias: bias]),
                "another device": _runs(layer, x.to("meta")),
                "another layout": _runs(layer, x, layout_type=extended._FP8_LAYOUT),
                "gradient": _runs(layer, x.clone().requires_grad_()),
            }
        found["resident"] = _run_pages(layer)
        experts = comfy.ops.mixed_precision_ops().MoEExperts(2, 64, 64)
        experts.layout_type = layer.layout_type
        found["ready"]["experts"] = extended.has_short_forward(experts)
    return found


def _runs(layer, x, **attributes) -> bool:
    """Whether the short forward pass runs the layer with some of its attributes replaced."""
    with contextlib.ExitStack() as stack:
        for name, value in attributes.items():
            stack.enter_context(patch.dict(layer.__dict__, {name: value}))
        return extended._run_short(layer, x) is not None


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


def _run_pages(layer) -> dict:
    """Dynamic VRAM: the weight of the layer is elsewhere, and a copy is in pages that are in VRAM or not."""
    pages, x = Pages(), torch.randn(2, layer.in_features, dtype=layer.weight.dtype)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    elsewhere = {"weight": weight.to("meta"), "bias": bias}
    moved = {"_v": "pages", "_v_signature": 1, "_v_weight": weight, "_v_bias": bias}
    with (
        counted(),
        patch.dict(sys.modules, {"comfy_aimdo": SimpleNamespace(model_vbar=pages)}),
        patch.dict(layer.__dict__, moved),
    ):
        wanted = extended._run_short(layer, x)
        with patch.dict(layer._parameters, elsewhere):
            resident = extended._run_short(layer, x)
            pins = [pages.pins]
            failing = {layer.layout_type: _run_out_of_memory}
            with (
                patch.object(extended, "_short_forwards", lambda: failing),
                contextlib.suppress(torch.OutOfMemoryError),
            ):
                extended._run_short(layer, x)
            pins.append(pages.pins)
            for pages.signature in (2, None):
                assert extended._run_short(layer, x) is None
                pins.append(pages.pins)
    return {"equal": torch.equal(resident, wanted), "pins": pins}


def _run_out_of_memory(*arguments):
    raise torch.OutOfMemoryError


CHECKS = {"forward_short": short}
