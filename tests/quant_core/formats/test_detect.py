"""Layers of a file: the codec that JSON, dtypes and shapes of their tensors describe."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS, quantize_weight
from learned_rounding.quant_core.convert import DecodedSource
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.formats import detect_layer, detect_layers, make_codec
from learned_rounding.quant_core.formats.detect import (
    check_companions,
    has_known_scale,
    is_scale,
    legacy_markers,
    orphan_problem,
    read_scale,
)
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo, TensorSource
from learned_rounding.tests.quant_core.formats.external_layers import (
    E4M3,
    INNER,
    OUT,
    PER_ROW,
    READ,
    REFUSED,
    below,
    zeros,
)

WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def made(format: str, **options):
    return quantize_weight(WEIGHT, format, rounding="nearest", **options)


def old_source(*, marker=None, **scales) -> TensorSource:
    """A layer of scaled FP8 as older tools wrote it, in a model below ``model.``."""
    marked = {} if marker is None else {"model.scaled_fp8": zeros(E4M3, marker)}
    scales = scales or {"scale_weight": torch.ones(())}
    return TensorSource(
        {"model.a.weight": zeros(E4M3, 8, 16)} | {f"model.a.{k}": t for k, t in scales.items()} | marked
    )


# detect_layer


def test_each_format_is_detected_from_its_json_and_tensors(subtests):
    for name in FORMATS:
        layer = made(name)
        with subtests.test(name):
            assert detect_layer("a", layer.config, layer.tensors("a")) == layer.codec


def test_layers_that_are_not_what_their_json_calls_them_are_refused(subtests):
    tensors = made("int8_tensorwise").tensors("a")
    without = {name: tensor for name, tensor in tensors.items() if name != "a.weight"}
    for config, given, reason in (
        ({}, tensors, "a: its JSON names no format; run lrq migrate, which adds it"),
        ({"format": "int9"}, tensors, "a: format 'int9' is not known to this version"),
        ({"format": "int8_tensorwise"}, without, "a: has a quantization entry and no weight"),
        ({"format": "float8_e4m3fn"}, tensors, "a: float8_e4m3fn needs weight torch.float8_e4m3fn"),
        ({"format": "int8_tensorwise"}, {**tensors, "a.weight_scale": torch.ones(3)}, "the file has weight torch.int8"),
        ({"format": "int8_blockwise", "group_size": 100}, tensors, "a: The block size must be a power of two"),
        ({"format": "nvfp4"}, {"a.weight": torch.ones(3)}, "only matrices are read as quantized"),
    ):
        with subtests.test(reason), pytest.raises(ValueError) as caught:
            detect_layer("a", config, given)
        with subtests.test(f"message: {reason}"):
            assert reason in str(caught.value)


def test_a_missing_tensor_is_reported_as_missing():
    with pytest.raises(ValueError, match="weight_scale missing"):
        detect_layer("a", {"format": "int8_tensorwise"}, {"a.weight": torch.zeros(4, 16, dtype=torch.int8)})


# detect_layers


def test_layers_without_json_have_the_format_of_dtypes_and_shapes(subtests):
    int8, fp8 = zeros(torch.int8, 64, 96), zeros(E4M3, 64, 96)
    for weight, scale, expected in (
        (int8, torch.ones(()), make_codec("int8_tensorwise", "tensor")),
        (int8, torch.ones(64), make_codec("int8_tensorwise", "row")),
        (int8, torch.ones(64, 1), make_codec("int8_tensorwise", "row")),
        (int8, torch.ones(2, 3), make_codec("int8_blockwise", block_size=32)),
        (fp8, torch.ones(1), make_codec("float8_e4m3fn")),
        (fp8, torch.ones(64, 1), make_codec("float8_e4m3fn_rowwise")),
        (fp8, torch.ones(4, 6), make_codec("float8_e4m3fn_blockwise", block_size=16)),
        (zeros(torch.float8_e5m2, 64, 96), torch.ones(()), make_codec("float8_e5m2")),
    ):
        with subtests.test(str(expected), scale=tuple(scale.shape)):
            (layer,) = detect_layers(TensorSource({"a.weight": weight, "a.weight_scale": scale}))
            assert layer.codec == expected
            assert layer.shape == (64, 96)
            assert layer.relabelled


def test_scales_that_fit_no_format_are_refused(subtests):
    for weight, scale, reason in (
        (zeros(torch.int8, 64, 96), torch.ones(5, 7), "match none of the formats"),
        (zeros(torch.float8_e5m2, 64, 96), torch.ones(64, 1), "match none of the formats"),
        (zeros(torch.int8, 4, 64, 96), torch.ones(()), "match none of the formats"),
    ):
        with subtests.test(weight=weight.shape, scale=scale.shape), pytest.raises(SourceError, match=reason):
            list(detect_layers(TensorSource({"a.weight": weight, "a.weight_scale": scale})))


def test_scales_of_integers_are_refused(layer_file, sentences):
    """Exponents of MXFP8 as bytes, which are no factors."""
    tensors = {"weight": zeros(E4M3, OUT, INNER), "weight_scale": torch.full((OUT, 1), 127, dtype=torch.uint8)}
    with SafetensorsFile(layer_file(below(tensors))) as opened, sentences.raises(SourceError):
        DecodedSource(opened)


def test_the_json_says_whether_integers_are_rotated():
    layer = made("int8_tensorwise", convrot=64)
    (found,) = detect_layers(TensorSource(layer.tensors("a")))
    assert found.codec == layer.codec


def test_rotated_integers_with_one_scale_are_refused():
    tensors = made("int8_tensorwise", granularity="tensor").tensors("a")
    source = TensorSource(
        tensors, {"_quantization_metadata": '{"layers":{"a":{"format":"int8_tensorwise","convrot":true}}}'}
    )
    with pytest.raises(SourceError, match=r"rotated values \(ConvRot\) with one scale per tensor"):
        list(detect_layers(source))


def test_older_names_of_scales_are_those_of_today():
    (layer,) = detect_layers(old_source(scale_weight=torch.ones(()), scale_input=torch.ones(())))
    assert layer.parts["weight_scale"] == "model.a.scale_weight"
    assert layer.parts["input_scale"] == "model.a.scale_input"


def test_two_names_of_one_scale_are_refused():
    with pytest.raises(SourceError, match="are two names of one tensor"):
        list(detect_layers(old_source(scale_weight=torch.ones(()), weight_scale=torch.ones(()))))


def test_a_marker_of_two_values_asks_for_full_precision_products(subtests):
    for size, full in ((2, True), (0, False)):
        source = old_source(marker=size)
        with subtests.test(size=size):
            assert legacy_markers(source) == ["model.scaled_fp8"]
            assert next(iter(detect_layers(source))).codec.full_precision_matmul is full


def test_layers_of_other_formats_are_found_where_their_json_declares_them():
    layer = made("nvfp4")
    (found,) = detect_layers(TensorSource(layer.tensors("a")))
    assert found.codec == layer.codec
    assert found.shape == (32, 64)
    assert found.parts.keys() == {"weight", "weight_scale", "weight_scale_2", "comfy_quant"}
    assert found.problem == ""
    assert not found.relabelled


def test_a_declared_layer_without_one_of_its_tensors_is_a_problem():
    tensors = made("nvfp4").tensors("a")
    del tensors["a.weight_scale_2"]
    (found,) = detect_layers(TensorSource(tensors, name="model"))
    assert found.codec is None
    assert found.problem == (
        "model: a is not a valid layer of format nvfp4: its weight_scale_2 is missing; download the file again."
    )


def test_readable_layers_of_other_quantizers_have_a_shape(subtests):
    for name, case in READ.items():
        (found,) = detect_layers(TensorSource(case.tensors, case.metadata))
        with subtests.test(name):
            assert found.shape == (OUT, INNER)
            assert found.problem == ""


def test_layers_of_other_quantizers_that_cannot_be_read_have_a_problem(subtests):
    for case in ("SDNQ", "nunchaku", "GPTQ", "MXFP4"):
        tensors, name = REFUSED[case]
        (found,) = (layer for layer in detect_layers(TensorSource(below(tensors))) if layer.external)
        with subtests.test(case):
            assert found.format_name == name
            assert found.shape == ()
            assert "cannot be dequantized" in found.problem


def test_the_kind_names_both_formats_of_a_renamed_layer():
    case = READ["Hugging Face"]
    (found,) = detect_layers(TensorSource(case.tensors))
    assert found.kind == "float8_e4m3fn_blockwise per block of 128 (Hugging Face FP8)"


def test_the_tensors_that_values_depend_on_are_named(subtests):
    for name, needed in (
        ("int8_tensorwise", {"weight_scale"}),
        ("nvfp4", {"weight_scale", "weight_scale_2", "pre_quant_scale", "input_scale"}),
    ):
        (found,) = detect_layers(TensorSource(made(name).tensors("a")))
        with subtests.test(name):
            assert found.needed == needed


# Scales and companions


def test_dtypes_and_shapes_of_scales_are_known(subtests):
    int8 = TensorInfo(torch.int8, (64, 96))
    for dtype, shape, expected in (
        (torch.float32, (), True),
        (torch.bfloat16, (64, 1), True),
        (torch.float32, (2, 3), True),
        (torch.float32, (5, 7), False),
        (torch.uint8, (64, 1), False),
    ):
        with subtests.test(str(dtype), shape=shape):
            assert has_known_scale(int8, TensorInfo(dtype, shape)) is expected


def test_only_the_name_of_today_is_a_scale():
    assert is_scale("weight_scale")
    assert not is_scale("scale_weight")


def test_scales_must_be_finite_and_positive(subtests):
    for values in ([float("nan")], [float("inf")], [-1.0], [0.0], [0.0, 0.0], [1 + 1j]):
        with subtests.test(values=values), pytest.raises(SourceError, match="not finite and positive"):
            read_scale(TensorSource({"s": torch.tensor(values)}), "s")


def test_some_scales_may_be_zero():
    assert read_scale(TensorSource({"s": torch.tensor([0.0, 2.0]).half()}), "s").tolist() == [0, 2]


def test_the_scale_of_an_unquantized_weight_is_a_problem_unless_it_is_one(subtests):
    for scale, problem in ((2.0, True), (1.0, False)):
        source = TensorSource({"a.weight": torch.ones(4, 4), "a.weight_scale": torch.tensor(scale)})
        (layer,) = detect_layers(source)
        with subtests.test(scale=scale):
            assert bool(orphan_problem(source, layer)) is problem


def test_a_scale_without_a_weight_is_no_problem():
    source = TensorSource({"a.weight_scale": torch.tensor(2.0)})
    (layer,) = detect_layers(source)
    assert orphan_problem(source, layer) is None


def test_companions_of_unknown_meaning_are_refused():
    source = TensorSource(below(PER_ROW | {"smooth_scale": torch.ones(INNER)}), name="model")
    with pytest.raises(SourceError, match=r"smooth_scale belongs to the quantized values of blocks\.0\.mlp\.weight"):
        check_companions(source, list(detect_layers(source)))
