"""Checks of in_process.py: layers that ComfyUI's own kernels quantized, read by the codecs of this pack."""

import comfy_kitchen.tensor
import torch
from pack.quant_core.convert.dequantize import DecodedSource
from pack.quant_core.formats import READABLE, detect_layer
from pack.quant_core.formats.layer_json import config_tensor
from pack.quant_core.formats.padded import padded_config
from pack.quant_core.sources import TensorSource

SHAPES = ((256, 512), (160, 256), (40, 264))  # whole tiles of scales; parts of them; padded
LAYOUTS = {
    "nvfp4": ("TensorCoreNVFP4Layout", ({},)),
    "mxfp8": ("TensorCoreMXFP8Layout", ({},)),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", ({}, {"convrot_groupsize": 64})),
    "asym_w4a8_int8": ("AsymW4A8Int8Layout", ({}, {"convrot_groupsize": 64, "group_size": 32}, {"codebook": False})),
}
PADDED = ("nvfp4", "mxfp8")  # others need whole rotation groups


def decode_layers() -> dict:
    """{format: {case: {what is checked: whether it holds}}}."""
    return {
        name: {
            f"{options} {shape}": _check_case(name, layout, shape, options)
            for options in choices
            for shape in (SHAPES if name in PADDED else SHAPES[:2])
        }
        for name, (layout, choices) in LAYOUTS.items()
    }


def _check_case(name: str, layout_name: str, shape: tuple[int, int], options: dict) -> dict[str, bool]:
    layout = getattr(comfy_kitchen.tensor, layout_name)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[0] = 0
    qdata, params = layout.quantize(weight, **options)
    expected = layout.dequantize(qdata, params)[: shape[0], : shape[1]]
    tensors = {
        f"a.weight{suffix}": tensor.contiguous() for suffix, tensor in layout.state_dict_tensors(qdata, params).items()
    }
    multiple = {"nvfp4": 16, "mxfp8": 32}.get(name, 1)
    config = {
        "format": name,
        **{key: value for key, value in options.items() if key != "codebook"},
        **padded_config(shape, multiple),
    }
    tensors |= {"a.weight": qdata, "a.comfy_quant": config_tensor(config)}
    codec = detect_layer("a", config, tensors)
    parts = {key.removeprefix("a."): tensor for key, tensor in tensors.items()}
    decoded = DecodedSource(TensorSource(tensors))
    read = decoded.read("a.weight")
    return {
        "every bit": torch.equal(codec.dequantize(parts, shape), expected),
        "format": codec.format is READABLE[name],
        "read": torch.equal(read, expected.bfloat16()) and decoded.tensors["a.weight"].shape == shape,
        "near the original": float((read.float() - weight).norm() / weight.norm()) < 0.15,
        "nothing else": [*decoded.tensors] == ["a.weight"] and dict(decoded.layers) == {str(codec): 1},
    }


CHECKS = {"foreign_decoding": decode_layers}
