"""Checks of in_process.py: the short forward pass of ComfyUI's quantized linear layers, with the CPU in the place of a GPU."""

import contextlib
import sys
from unittest.mock import patch

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
        def call(layer, *arguments):
            taken.append(layout)
            return run(layer, *arguments)

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
            wanted = tiny.run(model), tiny.run(patched), tiny.run(patched, lowvram_model_memory=1)
            with counted() as taken:
                runs, counts = [], []
                for call in (
                    lambda: tiny.run(model),
                    lambda: tiny.run(patched),
                    lambda: tiny.run(patched, lowvram_model_memory=1),
                ):
                    taken.clear()
                    runs.append(call())
                    counts.append(len(taken))
            found[name] = {
                "layers": len(host.quantized_layers(model)),
                "taken": counts,
                "distances": [distance(got, want) for got, want in zip(runs, wanted, strict=True)],
            }
        layer = next(module for module in model.model.modules() if extended.has_short_forward(module))
        x = torch.zeros(2, layer.in_features, dtype=layer.weight.dtype)
        with counted():
            found["ready"] = {
                "plain": extended._is_ready(layer, x),
                "other dtype": extended._is_ready(layer, x.half()),
                "full precision": _with(layer, x, _full_precision_mm=True),
                "dynamic": _with(layer, x, _v=1),
                "forced cast": _with(layer, x, comfy_force_cast_weights=True),
                "patched": _with(layer, x, weight_function=[lambda weight: weight]),
                "patched bias": _with(layer, x, bias_function=[lambda bias: bias]),
                "another device": extended._is_ready(layer, x.to("meta")),
            }
    return found


def _with(layer, x, **attributes) -> bool:
    with contextlib.ExitStack() as stack:
        for name, value in attributes.items():
            stack.enter_context(patch.dict(layer.__dict__, {name: value}))
        return extended._is_ready(layer, x)


CHECKS = {"forward_short": short}
