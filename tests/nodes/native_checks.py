"""Checks of in_process.py: ComfyUI's native INT8 layers on this pack's kernels."""

import sys
from pathlib import Path
from types import SimpleNamespace

import comfy.ops
import comfy.quant_ops
import folder_paths
import torch
from layout_checks import DEVICE, TinyModel, distance
from pack.nodes import host
from torch.nn.functional import linear


def native_int8() -> dict:
    """ComfyUI's native INT8 layers on this pack's kernels: only when enabled, and with the results of comfy-kitchen's own."""
    from comfy_kitchen.constraints import FunctionConstraints
    from comfy_kitchen.registry import registry

    settings = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    stored = []
    for text in ('{"LearnedRounding.NativeInt8": true}', "damaged", '{"LearnedRounding.NativeInt8": true}', "{}"):
        settings.write_text(text)
        host.add_native_int8_setting()
        stored.append(registry.is_available("learned_rounding"))
    module = sys.modules["pack.nodes.host.native_int8"]
    needs = registry.get_constraints("learned_rounding", "int8_linear")
    calls = []

    def counted(**arguments):
        calls.append(arguments["input_act"])
        return module.int8_linear(**arguments)

    for name in ("cuda", "triton"):  # as below CUDA 13, and without a GPU
        registry.disable(name)
    anywhere = {"int8_linear": FunctionConstraints()}
    registry.register("learned_rounding", SimpleNamespace(int8_linear=counted), anywhere)  # also on a CPU
    tiny = TinyModel()
    found = {
        "stored": stored,
        "needs": [sorted(needs.default_devices), list(needs.min_compute_capability)],
        "before": [name for name in registry._priority if name in ("learned_rounding", "eager")],
        "models": {},
    }
    recipes = {"row": {}, "tensor": {"granularity": "tensor"}, "convrot": {"convrot": True}}
    for name, options in recipes.items():
        file = tiny.file(format="int8_tensorwise", **options)
        plain, ours = host.build_model(tiny.original, file), host.build_model(tiny.original, file, True)
        expected, without = tiny.sampled(plain), len(calls)
        made = tiny.sampled(ours)
        found["models"][name] = {
            "calls without": without,
            "calls": len(calls) - without,
            "layers": len(host.quantized_layers(ours)),
            "distance": distance(made, expected),
            "off again": not registry.is_available("learned_rounding"),
        }
        calls.clear()
    module._set_enabled(True)
    tiny.sampled(plain)
    found["calls with the setting"] = len(calls)
    module._set_enabled(False)
    tiny.sampled(plain)
    found["calls after it"] = len(calls) - found["calls with the setting"]
    x, weight = torch.randn(3, 128, device=DEVICE), torch.randn(32, 128, device=DEVICE)
    coded = comfy.quant_ops.QuantizedTensor.from_float(weight, "TensorWiseINT8Layout")
    acted = {}
    for name, act in getattr(comfy.ops, "INPUT_ACT_EAGER", {}).items():
        inputs = torch.cat([x, x], 1) if name == "swiglu" else x
        product = module.int8_linear(inputs, coded._qdata, coded._params.scale, None, torch.float32, input_act=name)
        acted[name] = distance(product, linear(act(inputs), coded))
    found["activations"] = acted
    return found


CHECKS = {"native_int8": native_int8}
