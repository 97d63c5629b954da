"""Banks of experts: the tensors of their matrices, stacked, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_rounding.quant_core import FORMATS, quantize_weight
from learned_rounding.quant_core.calibration import LayerStatistics
from learned_rounding.quant_core.formats import StoredLayer, detect_layer, detect_layers, make_codec
from learned_rounding.quant_core.formats.expert_bank import count_experts, expert_parts
from learned_rounding.quant_core.quantize_bank import quantize_bank
from learned_rounding.quant_core.rounding import RoundingConfig
from learned_rounding.quant_core.sources import TensorInfo, TensorSource
from learned_rounding.tests.quant_core.formats.weights import raw

CPU = torch.device("cpu")
CODECS = {
    "fp8": ("float8_e4m3fn", {}),
    "e5m2": ("float8_e5m2", {}),
    "int8 row": ("int8_tensorwise", {}),
    "int8 tensor": ("int8_tensorwise", {"granularity": "tensor"}),
    "mxfp8": ("mxfp8", {}),
    "nvfp4": ("nvfp4", {}),
    "w4a4": ("convrot_w4a4", {"convrot": 64}),
}


def codec_of(name: str):
    format, options = CODECS[name]
    return make_codec(format, **options)


def store(weights: torch.Tensor, codec) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of the bank ``a`` in a file, and its JSON."""
    made = quantize_bank(weights, None, LayerStatistics(), codec, RoundingConfig("nearest"), device=CPU)
    return made.tensors("a"), made.config


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_every_expert_is_read_back_as_the_layer_that_it_would_be_alone(name, data):
    """Shapes with padding; experts of zeros, of one large value, and 40 octaves apart."""
    experts, out = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 140))
    inner = data.draw(st.sampled_from([64, 192] if name == "w4a4" else [8, 33, 64, 100]))
    weights = random(experts, out, inner, seed=data.draw(st.integers(0, 9)))
    for weight in weights:
        weight.mul_(data.draw(st.sampled_from([0.0, 1.0, 2.0**-20, 2.0**20])))
        if data.draw(st.booleans()):
            weight[0, 0] = 1e4
    codec = codec_of(name)
    tensors, config = store(weights, codec)
    assert detect_layer("a", config, tensors) == codec
    (layer,) = detect_layers(TensorSource(tensors))
    parts = {suffix: tensors[key] for suffix, key in layer.parts.items()}
    read = layer.dequantize(parts.pop("weight"), parts)
    assert layer.shape == weights.shape
    assert read.shape == weights.shape
    format, options = CODECS[name]
    for index, weight in enumerate(weights):
        alone = quantize_weight(weight, format, rounding="nearest", **options)
        own = {key.removeprefix("a."): tensor for key, tensor in alone.tensors("a").items()}
        bank = expert_parts({key: tensor for key, tensor in parts.items() if key != "comfy_quant"}, index)
        assert [key for key, tensor in bank.items() if not torch.equal(raw(tensor), raw(own[key]))] == []
        assert torch.equal(raw(tensors["a.weight"][index]), raw(own["weight"]))
        assert torch.equal(read[index], alone.dequantize())


def test_the_tensors_are_those_of_the_header_before_the_values_are_known(subtests):
    shape = (3, 130, 64)
    for name in CODECS:
        tensors, config = store(random(*shape), codec_of(name))
        specs = codec_of(name).file_specs(shape, calibrated=True)
        with subtests.test(name):
            assert {f"a.{suffix}" for suffix in specs} == tensors.keys()
            assert [suffix for suffix, spec in specs.items() if not spec.matches(tensors[f"a.{suffix}"])] == []
            assert config["num_experts"] == 3
            assert codec_of(name).original_shape(tuple(tensors["a.weight"].shape), config) == shape


def test_one_scale_may_be_that_of_all_experts():
    """As ComfyUI reads it."""
    tensors, config = store(random(2, 16, 32), codec_of("fp8"))
    tensors["a.weight_scale"] = torch.tensor(0.5)
    assert detect_layer("a", config, tensors) == codec_of("fp8")
    (layer,) = detect_layers(TensorSource(tensors))
    read = layer.dequantize(tensors["a.weight"], {"weight_scale": tensors["a.weight_scale"]}, torch.bfloat16)
    assert torch.equal(read, (tensors["a.weight"].float() * 0.5).bfloat16())


def test_only_three_sides_and_their_number_in_the_json_make_a_bank(subtests):
    weights = {"a.weight": TensorInfo(torch.int8, (4, 16, 32)), "b.weight": TensorInfo(torch.int8, (4, 32))}
    for layer, config, count in (
        ("a", {"num_experts": 4}, 4),
        ("a", {"num_experts": 3}, None),
        ("a", {}, None),
        ("b", {"num_experts": 4}, None),
        ("c", {"num_experts": 4}, None),
    ):
        with subtests.test(layer, **config):
            assert count_experts(layer, config, weights) == count


def test_a_matrix_is_no_bank():
    assert not StoredLayer("b", {}, shape=(4, 32)).is_bank


def test_formats_that_comfyui_reads_in_banks(subtests, sentences):
    """``MoEExperts`` does not copy the other scales of asym_w4a8_int8, nor the flag of the rotation, to an expert."""
    for format, entry in FORMATS.items():
        rotation = 64 if entry.always_rotated or format == "asym_w4a8_int8" else None
        reason = make_codec(format, convrot=rotation).admits_bank()
        with subtests.test(format):
            assert (reason is None) is (format in {name for name, _ in CODECS.values()})
        if reason:
            sentences(reason)


def test_rotated_int8_banks_are_refused(sentences):
    sentences(make_codec("int8_tensorwise", convrot=64).admits_bank())
