"""Checks of in_process.py: smoothed NVFP4 layers in ComfyUI's own linear layer, and in that of a ComfyUI that cannot read them."""

import sys
from pathlib import Path
from unittest import mock

import comfy.model_patcher
import comfy.quant_ops
import torch
from layout_checks import distance
from pack.nodes import host
from pack.nodes.host.decoding import make_quantized_linear
from pack.quant_core import quantize_weight
from pack.quant_core.calibration import LowRankHessian
from pack.quant_core.formats.layer_json import QUANTIZATION_KEY, quantization_metadata
from safetensors.torch import save_file

CHANNELS = 64


def _activations(seed: int) -> torch.Tensor:
    x = torch.randn(1024, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[:, ::8] *= 30
    return x


def _smoothed():
    """A smoothed layer and the activations that it was validated on."""
    known, others = _activations(0), _activations(1)
    made = quantize_weight(
        torch.randn(48, CHANNELS, generator=torch.Generator().manual_seed(2)) * 0.05,
        "nvfp4",
        hessian=known.t() @ known / len(known),
        validation_hessian=LowRankHessian(others.t() / len(others) ** 0.5, torch.zeros(CHANNELS)),
        smoothing=True,
    )
    return made, others


def layers() -> dict:
    """{who computes the layer: {"decoded": by this pack, "error": of the output without quantized activations}}."""
    made, others = _smoothed()
    tensors, path = made.tensors("a"), Path(sys.argv[-1]) / "smoothed.safetensors"
    save_file(tensors, path, {QUANTIZATION_KEY: quantization_metadata({"a": made.config})})
    algorithm = comfy.quant_ops.QUANT_ALGOS["nvfp4"]
    older = {**algorithm, "parameters": algorithm["parameters"] - {"pre_quant_scale"}}
    found = {}
    for name, entry in (("this ComfyUI", algorithm), ("an older one", older)):
        with mock.patch.dict(comfy.quant_ops.QUANT_ALGOS, nvfp4=entry):
            parts = {key.removeprefix("a."): tensor.clone() for key, tensor in tensors.items()}
            output = make_quantized_linear("a", parts, made.config)(others)
            found[name] = {
                "decoded": bool(host.decoding.layers_to_decode(path)),
                "error": distance(output, others @ made.dequantize().t()),
            }
    return {"smoothed": "a.pre_quant_scale" in tensors, **found}


def patches() -> dict:
    """{way of applying a patch ΔW: relative error of the output against x·(W + ΔW)ᵀ}, and the same without our patches."""
    made, x = _smoothed()
    difference = torch.randn(48, CHANNELS, generator=torch.Generator().manual_seed(3)) * 0.05
    expected = x @ (made.dequantize() + difference).t()
    key = "a.weight"

    def parts():
        return {name.removeprefix("a."): tensor.clone() for name, tensor in made.tensors("a").items()}

    def errors() -> dict[str, float]:
        model = torch.nn.ModuleDict({"a": make_quantized_linear("a", parts(), made.config)})
        layer, cpu = model["a"], torch.device("cpu")
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        before = layer(x)
        patcher.add_patches({key: ("diff", (difference,))})
        found = {}
        for way, options in {"merged": {}, "little memory": {"lowvram_model_memory": 1}}.items():
            patcher.patch_model(device_to=cpu, **options)
            found[way] = distance(layer(x), expected)
            found[f"{way}: functions kept"] = len(layer.weight_function) == ("lowvram_model_memory" in options)
            patcher.unpatch_model(device_to=cpu)
            found[f"{way}: unpatched"] = torch.equal(layer(x), before)
        layer.weight_lowvram_function = comfy.model_patcher.LowVramPatch(key, patcher.patches)
        moved = layer.weight_lowvram_function(layer.weight.dequantize())
        layer.weight_lowvram_function = None
        found["dynamic VRAM"] = distance(x @ (moved * layer.pre_quant_scale).t(), expected)
        found["removed"] = layer.weight_lowvram_function is None
        saved = patcher.patch_weight_to_device(key, return_weight=True)
        found["saved"] = distance(x @ (saved.dequantize() * layer.pre_quant_scale).t(), expected)
        return found

    stock = errors()
    host.add_layouts()
    return {"stock": stock, "ours": errors()}


CHECKS = {"smoothing_layers": layers, "smoothing_patches": patches}
