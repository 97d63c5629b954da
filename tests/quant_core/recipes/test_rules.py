"""What can be quantized at all, and the size heuristics as users of other tools know them."""

import pytest
import torch

from learned_rounding.quant_core.recipes.rules import check_eligibility, check_heuristic
from learned_rounding.quant_core.sources import TensorInfo


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_matrices_of_floats_are_eligible(dtype):
    assert check_eligibility("a.weight", TensorInfo(dtype, (4, 4))) is None


@pytest.mark.parametrize(
    "name, dtype, shape",
    [
        ("a.bias", torch.bfloat16, (4, 4)),
        ("a.weights", torch.bfloat16, (4, 4)),
        ("weight", torch.bfloat16, (4, 4)),
        ("a.weight", torch.bfloat16, (4,)),
        ("a.weight", torch.bfloat16, ()),
        ("a.weight", torch.bfloat16, (4, 4, 3, 3)),
        ("a.weight", torch.bfloat16, (0, 4)),
        ("a.weight", torch.bfloat16, (4, 0)),
        ("a.weight", torch.int8, (4, 4)),
        ("a.weight", torch.float64, (4, 4)),
        ("a.weight", torch.float8_e4m3fn, (4, 4)),
        ("a.weight", torch.bool, (4, 4)),
    ],
)
def test_what_is_not_eligible_and_why(name, dtype, shape, sentences):
    sentences(check_eligibility(name, TensorInfo(dtype, shape)))


@pytest.mark.parametrize(
    "shape, small",
    [
        ((127, 8192), True),
        ((128, 8192), True),  # not shorter than a block any more
        ((8192, 130), True),
        ((8191, 8192), True),
        ((1024, 4224), True),
        ((4224, 1024), True),
        ((3072, 3072), True),
        ((3840, 3840), True),
        ((3968, 3968), True),  # 15.7 million
        ((1024, 3968), True),
        ((1024, 4096), False),  # exactly 4 to 1
        ((5120, 25600), False),  # 5 to 1, and long enough
        ((4096, 4096), False),
        ((9216, 3072), False),
        ((3072, 12288), False),
    ],
)
def test_size_heuristics(shape, small, sentences):
    reason = check_heuristic(TensorInfo(torch.bfloat16, shape), 128)
    assert (reason is not None) is small
    if reason:
        sentences(reason)
