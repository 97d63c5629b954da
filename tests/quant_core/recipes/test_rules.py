"""What can be quantized at all, and the size heuristics as users of other tools know them."""

import torch

from learned_rounding.quant_core.recipes.rules import check_eligibility, check_heuristic
from learned_rounding.quant_core.sources import TensorInfo


def test_matrices_of_floats_are_eligible(subtests):
    for dtype in [torch.float16, torch.bfloat16, torch.float32]:
        with subtests.test(dtype=dtype):
            assert check_eligibility("a.weight", TensorInfo(dtype, (4, 4))) is None


def test_what_is_not_eligible_and_why(subtests):
    for name, dtype, shape, reason in [
        ("a.bias", torch.bfloat16, (4, 4), "not a weight"),
        ("a.weights", torch.bfloat16, (4, 4), "not a weight"),
        ("weight", torch.bfloat16, (4, 4), "not a weight"),
        ("a.weight", torch.bfloat16, (4,), "not a matrix"),
        ("a.weight", torch.bfloat16, (), "not a matrix"),
        ("a.weight", torch.bfloat16, (4, 4, 3, 3), "not a matrix"),
        ("a.weight", torch.bfloat16, (0, 4), "empty"),
        ("a.weight", torch.bfloat16, (4, 0), "empty"),
        ("a.weight", torch.int8, (4, 4), "not stored as"),
        ("a.weight", torch.float64, (4, 4), "not stored as"),
        ("a.weight", torch.float8_e4m3fn, (4, 4), "not stored as"),
        ("a.weight", torch.bool, (4, 4), "not stored as"),
    ]:
        with subtests.test(name, dtype=dtype, shape=shape):
            assert reason in check_eligibility(name, TensorInfo(dtype, shape))


def test_shapes_that_the_heuristics_keep(subtests):
    for shape, reason in [
        ((127, 8192), "shorter than 128"),
        ((128, 8192), "aspect ratio above 4"),  # not shorter than a block any more
        ((8192, 130), "does not divide"),
        ((8191, 8192), "does not divide"),
        ((1024, 4224), "aspect ratio above 4"),
        ((4224, 1024), "aspect ratio above 4"),
        ((3072, 3072), "fewer than 15 million"),
        ((3840, 3840), "fewer than 15 million"),
        ((3968, 3968), "longer side below 4096"),  # 15.7 million
        ((1024, 3968), "longer side below 4096"),
    ]:
        with subtests.test(str(shape)):
            found = check_heuristic(TensorInfo(torch.bfloat16, shape), 128)
            assert found.startswith("heur: ")
            assert reason in found


def test_shapes_that_the_heuristics_quantize(subtests):
    for shape in [
        (1024, 4096),  # exactly 4 to 1
        (5120, 25600),  # 5 to 1, and long enough
        (4096, 4096),
        (9216, 3072),
        (3072, 12288),
    ]:
        with subtests.test(shape=shape):
            assert check_heuristic(TensorInfo(torch.bfloat16, shape), 128) is None
