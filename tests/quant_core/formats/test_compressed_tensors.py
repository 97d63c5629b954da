"""Packed weights of compressed-tensors: values of the specification, and tensors that contradict each other."""

import pytest
import torch

from learned_rounding.quant_core.convert import DecodedSource
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.formats.compressed_tensors import decode_nvfp4, decode_packed, read_nvfp4_shape
from learned_rounding.quant_core.sources import SafetensorsFile, TensorSource
from learned_rounding.tests.quant_core.formats.external_layers import (
    INNER,
    LAYER,
    OUT,
    below,
    packed,
    packed_fp4,
    zeros,
)

CONTRADICTIONS = {
    "huge": {"weight_shape": torch.tensor([OUT, 10**12])},
    "negative": {"weight_shape": torch.tensor([-1, INNER])},
    "no shape": {"weight_shape": torch.ones(3)},
    "bytes": {"weight_packed": zeros(torch.uint8, OUT, 96)},
    "groups": {"weight_scale": torch.ones(OUT, 7)},
    "flat": {"weight_scale": torch.ones(OUT)},
}


def test_integers_that_contradict_each_other_are_refused(subtests, layer_file, sentences):
    tensors = packed()[0]
    for name, change in CONTRADICTIONS.items():
        with (
            subtests.test(name),
            SafetensorsFile(layer_file(tensors | below(change))) as opened,
            sentences.raises(SourceError),
        ):
            DecodedSource(opened)


def test_fp4_that_contradicts_itself_is_refused(subtests):
    tensors = {name.removeprefix(f"{LAYER}."): tensor for name, tensor in packed_fp4()[0].items()}
    names = {"weight": "weight_packed", "weight_scale": "weight_scale", "weight_global_scale": "weight_global_scale"}
    for key, tensor, reason in (
        ("weight_packed", zeros(torch.int32, OUT, 24), "not those of packed FP4"),
        ("weight_global_scale", torch.ones(2), "not those of packed FP4"),
        ("weight_scale", torch.ones(OUT, 11), "groups of 16 imply"),
    ):
        with subtests.test(key), pytest.raises(ValueError, match=reason):
            read_nvfp4_shape(TensorSource(tensors | {key: tensor}), names)


def test_the_first_integer_of_a_word_is_in_its_lowest_bits(subtests):
    for bits, words in ((4, [0x76543210]), (8, [0x03020100, 0x07060504])):
        parts = {"weight": torch.tensor([words], dtype=torch.int32), "weight_scale": torch.tensor([[1.0, 10.0]])}
        with subtests.test(bits=bits):
            zero = 2 ** (bits - 1)
            expected = [value - zero for value in range(4)] + [10 * (value - zero) for value in range(4, 8)]
            assert decode_packed(parts, (1, 8)).tolist() == [expected]


def test_the_even_column_of_fp4_is_in_the_low_bits():
    values = torch.zeros(1, 8, dtype=torch.uint8)
    values[0, 0] = 0x97  # −0.5 and 6
    parts = {"weight": values, "weight_scale": torch.tensor([[4.0]]), "weight_global_scale": torch.tensor([2.0])}
    assert decode_nvfp4(parts, (1, 16)).tolist()[0][:3] == [12, -1, 0]
