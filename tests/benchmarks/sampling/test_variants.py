"""Variants of the benchmark of sampling steps: formats, and files in them."""

import argparse

import pytest
from safetensors import safe_open

from learned_rounding.benchmarks.sampling.variants import make_file, parse_variants


def test_calibrated_file_has_an_input_scale_above_the_activations(source, tmp_path):
    target = tmp_path / "fp8.safetensors"
    make_file(source, target, "fp8_calibrated")
    with safe_open(target, "pt") as file:
        scales = [file.get_tensor(name) for name in file.keys() if name.endswith(".input_scale")]
    assert len(scales) == 13
    assert all(16 < 448 * float(scale) < 32 for scale in scales)


def test_formats_with_a_choice_of_kernels_are_measured_with_each():
    assert list(map(str, parse_variants("int8_row,fp8,int8_convrot:ours,bf16"))) == [
        "bf16",
        "fp8",
        "int8_row:stock",
        "int8_row:ours",
        "int8_row:auto",
        "int8_convrot:ours",
    ]


def test_unknown_variants_are_refused(subtests):
    for text in ("fp9", "fp8:ours", "int8_row:theirs"):
        with subtests.test(text), pytest.raises(argparse.ArgumentTypeError, match="use "):
            parse_variants(text)
