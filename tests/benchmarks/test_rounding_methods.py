"""Methods that the rounding benchmark compares."""

import pytest
import torch

from learned_rounding.benchmarks.rounding_methods import CASES, Case, ComfyKitchen, LibraryMethod, dequantize
from learned_rounding.quant_core import FORMATS, quantize_weight


def test_values_and_scale_of_another_tool_are_dequantized(subtests):
    """Also if the scale has another shape: flat instead of one column."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    for case in CASES:
        if FORMATS[case.format].storage is not None or case.granularity == "group":
            continue
        options = {"granularity": case.granularity, "convrot": case.rotated or None}
        quantized = quantize_weight(weight, case.format, rounding="nearest", **options)
        codec, tensors = case.codec(512), quantized.tensors("a")
        with subtests.test(str(case)):
            assert codec == quantized.codec
            for scale in (tensors["a.weight_scale"], quantized.scale.flatten()):
                torch.testing.assert_close(dequantize(codec, tensors["a.weight"], scale), quantized.dequantize())


@pytest.mark.parametrize("bits", [4, 6])
def test_comfy_kitchen_is_measured_where_it_has_the_format(bits):
    pytest.importorskip("comfy_kitchen.tensor")
    case, method = Case("asym_w4a8_int8", "group", bits=bits), ComfyKitchen()
    if not method.covers(case):
        pytest.skip("this comfy-kitchen has no 6 bits")
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    kitchen, ours = (
        float((made(weight, case).weight - weight).norm()) for made in (method, LibraryMethod("", "nearest"))
    )
    # Of 6 bits its default is a scale search.
    assert kitchen == pytest.approx(ours, rel=1e-3) if bits == 4 else kitchen < ours
