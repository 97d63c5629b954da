"""8-bit formats with one level of scales: the quantized values as they are, and one scale tensor."""

import torch

from learned_rounding.quant_core import FORMATS, quantize_weight
from learned_rounding.quant_core.formats import TensorSpec, make_codec
from learned_rounding.quant_core.formats.scales import FLOAT32, CastFloat32

SCALES = [  # format, options, shape of the scale of a weight (6, 200)
    ("float8_e4m3fn", {}, ()),
    ("float8_e5m2", {}, ()),
    ("float8_e4m3fn_rowwise", {}, (6, 1)),
    ("float8_e4m3fn_blockwise", {}, (1, 2)),
    ("int8_blockwise", {"block_size": 8}, (1, 25)),
    ("int8_tensorwise", {}, (6, 1)),
    ("int8_tensorwise", {"granularity": "tensor"}, ()),
    ("int8_tensorwise", {"convrot": 16}, (6, 1)),
]


def test_specs_give_dtypes_and_shapes(subtests):
    for name, options, scale in SCALES:
        with subtests.test(name, **options):
            specs = make_codec(name, **options).specs((6, 200))
            assert specs.keys() == {"weight", "weight_scale"}
            assert specs["weight"] == TensorSpec(FORMATS[name].storage_dtype, (6, 200))
            assert specs["weight_scale"] == TensorSpec(torch.float32, scale)


def test_dequantize_is_scale_times_quantized_value(subtests):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    for name, granularity in (("float8_e4m3fn", "tensor"), ("int8_tensorwise", "row"), ("int8_tensorwise", "tensor")):
        made = quantize_weight(weight, name, granularity=granularity)
        tensors = made.tensors("a")
        parts = {"weight": tensors["a.weight"], "weight_scale": tensors["a.weight_scale"]}
        decoded = made.codec.dequantize(parts, (6, 32))
        scale = parts["weight_scale"].reshape(-1, 1)
        with subtests.test(name, granularity=granularity):
            assert torch.equal(decoded, parts["weight"].float() * scale)
            assert (decoded - weight).norm() < 0.1 * weight.norm()


def test_blocks_at_the_edges_may_be_smaller(subtests):
    weight = torch.randn(19, 45, generator=torch.Generator().manual_seed(1))
    weight[16:, 40:] *= 100  # the last block alone holds large weights
    for name in ("float8_e4m3fn_blockwise", "int8_blockwise"):
        quantized = quantize_weight(weight, name, block_size=8)
        decoded = quantized.dequantize()
        with subtests.test(name):
            assert quantized.scale.shape == (3, 6)
            assert quantized.scale[2, 5] > 10 * quantized.scale[:2].max()
        for top in range(0, 19, 8):
            for left in range(0, 45, 8):
                block = (slice(top, top + 8), slice(left, left + 8))
                with subtests.test(name, top=top, left=left):
                    scale = quantized.scale[top // 8, left // 8]
                    assert torch.equal(decoded[block], quantized.qdata[block].float() * scale)
                    assert (decoded[block] - weight[block]).norm() < 0.05 * weight[block].norm()


def test_comfyui_casts_scales_of_fp8_tensors_alone(subtests):
    for name, options, _ in SCALES:
        codec = make_codec(name, **options)
        cast = name in ("float8_e4m3fn", "float8_e5m2")
        with subtests.test(name, **options):
            assert codec.cast_scale == ("weight_scale" if cast else None)
            space = codec.solve_space((6, 16))
            assert space.scales == (CastFloat32(space.elements.smallest_normal) if cast else FLOAT32)
