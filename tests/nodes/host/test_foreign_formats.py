"""Layers that ComfyUI's own kernels quantized are dequantized as these kernels do."""

import pytest
import torch

from learned_rounding.quant_core.convert.dequantize import DecodedSource
from learned_rounding.quant_core.formats import READABLE, detect_layer
from learned_rounding.quant_core.formats.layer_json import config_tensor
from learned_rounding.quant_core.formats.padded import padded_config
from learned_rounding.quant_core.formats.scaled import ScaledCodec
from learned_rounding.quant_core.sources import TensorSource

# Format → layout of comfy-kitchen, options of its quantization, and the number that it pads sides to a multiple of.
LAYOUTS = {
    "nvfp4": ("TensorCoreNVFP4Layout", ({},), 16),
    "mxfp8": ("TensorCoreMXFP8Layout", ({},), 32),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", ({}, {"convrot_groupsize": 64}), 1),
    "asym_w4a8_int8": (
        "AsymW4A8Int8Layout",
        ({}, {"convrot_groupsize": 64, "group_size": 32}, {"codebook": False}),
        1,
    ),
}
SHAPES = ((256, 512), (160, 256), (40, 264))  # whole tiles of scales; parts of them; padded


def test_every_format_of_comfyui_with_a_codec_of_its_own_is_covered():
    assert set(LAYOUTS) == {name for name, entry in READABLE.items() if not issubclass(entry.codec, ScaledCodec)}


@pytest.mark.usefixtures("in_comfyui")
@pytest.mark.parametrize("format", LAYOUTS)
def test_codec_dequantizes_as_comfyui_does(host, format, subtests):
    if "comfy_kitchen" not in (host.path / "comfy" / "quant_ops.py").read_text(encoding="utf-8"):
        pytest.skip(f"ComfyUI {host.version} has none of these formats")
    import comfy_kitchen.tensor

    name, choices, multiple = LAYOUTS[format]
    layout = getattr(comfy_kitchen.tensor, name)
    for options in choices:
        for shape in SHAPES if multiple > 1 else SHAPES[:2]:  # others need whole rotation groups
            with subtests.test(f"{options} {shape}"):
                check_layer(format, layout, shape, options, multiple)


def check_layer(format: str, layout, shape: tuple[int, int], options: dict, multiple: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[0] = 0
    qdata, params = layout.quantize(weight, **options)
    expected = layout.dequantize(qdata, params)[: shape[0], : shape[1]]
    stored = layout.state_dict_tensors(qdata, params)
    tensors = {f"a.weight{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}
    described = {key: value for key, value in options.items() if key != "codebook"}
    config = {"format": format, **described, **padded_config(shape, multiple)}
    tensors |= {"a.weight": qdata, "a.comfy_quant": config_tensor(config)}

    codec = detect_layer("a", config, tensors)
    assert codec.format is READABLE[format]
    parts = {key.removeprefix("a."): tensor for key, tensor in tensors.items()}
    assert torch.equal(codec.dequantize(parts, shape), expected)
    decoded = DecodedSource(TensorSource(tensors))
    assert [*decoded.tensors] == ["a.weight"]
    assert decoded.tensors["a.weight"].shape == shape
    assert dict(decoded.layers) == {str(codec): 1}
    read = decoded.read("a.weight")
    assert torch.equal(read, expected.bfloat16())
    assert float((read.float() - weight).norm() / weight.norm()) < 0.15
