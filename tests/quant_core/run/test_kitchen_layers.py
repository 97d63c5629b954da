"""Layers of comfy-kitchen from the tensors of a file: the same as those of ComfyUI's loader."""

import sys
from importlib import metadata

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats import FormatConfig
from learned_rounding.quant_core.run import kitchen_layers
from learned_rounding.quant_core.run.kitchen_layers import kitchen_version, prepare_kitchen_layer

SHAPE = (48, 256)


def prepare(format: FormatConfig, *, native: bool):
    """(layer, quantized weight)."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) / 16
    made = quantize_weight(
        weight,
        format.name,
        granularity=format.granularity,
        convrot=format.convrot,
        linear_dtype=format.linear_dtype,
        rounding="nearest",
    )
    parts = made.codec.store(made.solution)
    return prepare_kitchen_layer(made.codec, parts, SHAPE, torch.float32, native=native), made


def test_dequantized_layers_have_the_weight_of_the_codec(subtests):
    for format in [
        FormatConfig("int8_tensorwise"),
        FormatConfig("int8_tensorwise", convrot=64),
        FormatConfig("nvfp4"),
        FormatConfig("mxfp8"),
        FormatConfig("convrot_w4a4"),
        FormatConfig("convrot_w4a4", linear_dtype="int4"),
        FormatConfig("asym_w4a8_int8"),
    ]:
        with subtests.test(format=format):
            pytest.importorskip("comfy_kitchen.tensor")
            layer, made = prepare(format, native=False)
            assert layer is not None
            torch.testing.assert_close(layer(torch.eye(SHAPE[1])).t(), made.dequantize(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "format", [FormatConfig("int8_tensorwise", convrot=64), FormatConfig("asym_w4a8_int8")], ids=str
)
def test_native_layers_quantize_activations(format):
    pytest.importorskip("comfy_kitchen.tensor")
    layer, made = prepare(format, native=True)
    x = torch.randn(20, SHAPE[1], generator=torch.Generator().manual_seed(1))
    assert layer is not None
    expected = made.codec.quantize_activations(x) @ made.dequantize().t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)


def test_formats_that_comfy_kitchen_has_no_layout_for_are_left_out():
    assert prepare(FormatConfig("int8_blockwise", "block"), native=True)[0] is None


def test_without_comfy_kitchen_there_are_no_layers(monkeypatch):
    def refuse(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(kitchen_layers, "version", refuse)
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    assert kitchen_version() is None
    assert prepare(FormatConfig("nvfp4"), native=False)[0] is None
