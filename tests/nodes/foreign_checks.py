"""Checks of in_process.py: files in ComfyUI's own formats that this pack only reads, coded by ComfyUI's own kernels."""

import comfy_kitchen.tensor
import torch
from pack.quant_core.convert.dequantize import DecodedSource
from pack.quant_core.formats import FOREIGN
from pack.quant_core.formats.weight import config_tensor
from pack.quant_core.sources import TensorSource

SHAPES = ((256, 512), (160, 256), (40, 264))  # whole tiles of scales; parts of them; padded
LAYOUTS = {
    "nvfp4": ("TensorCoreNVFP4Layout", ({},)),
    "mxfp8": ("TensorCoreMXFP8Layout", ({},)),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", ({}, {"convrot_groupsize": 64})),
    "asym_w4a8_int8": ("AsymW4A8Int8Layout", ({}, {"convrot_groupsize": 64, "group_size": 32}, {"codebook": False})),
}


def decoding() -> dict:
    """{format: {case: what is true of it}}."""
    return {
        name: {
            f"{options} {shape}": _case(name, shape, options)
            for options in LAYOUTS[name][1]
            for shape in _fitting(name)
        }
        for name in FOREIGN
    }


def _fitting(name: str) -> tuple:
    return SHAPES if name in ("nvfp4", "mxfp8") else SHAPES[:2]  # groups of a rotation must divide


def _case(name: str, shape: tuple[int, int], options: dict) -> dict[str, bool]:
    layout = getattr(comfy_kitchen.tensor, LAYOUTS[name][0])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[0] = 0
    codes, params = layout.quantize(weight, **options)
    theirs = layout.dequantize(codes, params)
    parts = {
        suffix: tensor.contiguous() for suffix, tensor in layout.state_dict_tensors(codes, params).items() if suffix
    }
    config = {
        "format": name,
        **{key: value for key, value in options.items() if key != "codebook"},
        "orig_shape": shape,
    }
    file = {f"a.weight{suffix}": tensor for suffix, tensor in parts.items()} | {
        "a.weight": codes,
        "a.comfy_quant": config_tensor(config),
    }
    ours = FOREIGN[name].decode(codes, {f"weight{suffix}": tensor for suffix, tensor in parts.items()}, config)
    decoded = DecodedSource(TensorSource(file))
    read = decoded.read("a.weight")
    return {
        "every bit": torch.equal(ours, theirs),
        "read": torch.equal(read, theirs[: shape[0], : shape[1]].bfloat16())
        and decoded.tensors["a.weight"].shape == shape,
        "near the original": float((read.float() - weight).norm() / weight.norm()) < 0.15,
        "nothing else": [*decoded.tensors] == ["a.weight"] and dict(decoded.layers) == {name: 1},
    }


CHECKS = {"foreign_decoding": decoding}
