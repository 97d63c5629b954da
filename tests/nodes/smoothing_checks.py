"""Checks of in_process.py: smoothed NVFP4 layers in ComfyUI's own linear layer, and in that of a ComfyUI that cannot read them."""

import sys
from pathlib import Path
from unittest import mock

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


def layers() -> dict:
    """{who computes the layer: {"decoded": by this pack, "error": of the output without quantized activations}}."""
    known, others = _activations(0), _activations(1)
    weight = torch.randn(48, CHANNELS, generator=torch.Generator().manual_seed(2)) * 0.05
    made = quantize_weight(
        weight,
        "nvfp4",
        hessian=known.t() @ known / len(known),
        validation_hessian=LowRankHessian(others.t() / len(others) ** 0.5, torch.zeros(CHANNELS)),
        smoothing=True,
    )
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


CHECKS = {"smoothing_layers": layers}
