"""Prepared layers: the implementation is chosen once for everything on which the choice depends."""

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import backends, prepared

WEIGHT = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(48, generator=torch.Generator().manual_seed(2))


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def choices(monkeypatch):
    """List of the operations for which an implementation is chosen."""
    prepared._kept.clear()
    chosen, choose = [], backends.implementation

    def implementation(operation, *arguments):
        chosen.append(operation)
        return choose(operation, *arguments)

    monkeypatch.setattr(backends, "implementation", implementation)
    yield chosen
    prepared._kept.clear()


def test_implementation_is_chosen_once_per_shape(choices):
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    want = [torch.nn.functional.linear(random(2, 5, 96, seed=seed), WEIGHT, BIAS) for seed in range(3)]
    for seed, expected in enumerate(want):
        got = kernels.int8_row_linear(random(2, 5, 96, seed=seed), qdata, scale, BIAS)
        assert (got - expected).norm() / expected.norm() < 0.02
    assert choices == ["scaled_linear"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"x": random(2, 6, 96)}, id="tokens"),
        pytest.param({"x": random(10, 96)}, id="dimensions"),
        pytest.param({"x": random(2, 5, 96, dtype=torch.bfloat16)}, id="dtype"),
        pytest.param({"bias": None}, id="bias"),
        pytest.param({"bias": BIAS.bfloat16()}, id="bias dtype"),
        pytest.param({"out_dtype": torch.float16}, id="output dtype"),
        pytest.param({"rotate_by": 16}, id="rotation"),
        pytest.param({"scale": torch.tensor(0.02)}, id="scale per tensor"),
        pytest.param({"x": torch.zeros(961)[1:].view(2, 5, 96)}, id="alignment"),
    ],
)
def test_other_arguments_are_chosen_again(choices, change):
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    usual = {"x": random(2, 5, 96), "codes": qdata, "scale": scale, "bias": BIAS, "out_dtype": None, "rotate_by": 0}
    kernels.scaled_linear(**usual)
    kernels.scaled_linear(**{**usual, **change})
    assert choices == ["scaled_linear"] * 2


def test_backend_is_part_of_the_choice(choices):
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    for _ in range(2):
        kernels.int8_row_linear(random(5, 96), qdata, scale)
        with kernels.using("reference"):
            kernels.int8_row_linear(random(5, 96), qdata, scale)
    assert len(choices) == 2


def test_strided_tensors_and_scales_of_other_dtypes_give_the_same_result(choices):
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    x = random(5, 96)
    want = kernels.int8_row_linear(x, qdata, scale)
    strided = torch.cat([x, x], 1)[:, :96], torch.cat([qdata, qdata], 1)[:, :96]
    assert torch.equal(kernels.int8_row_linear(*strided, scale), want)
    assert torch.equal(kernels.int8_row_linear(x, qdata, scale.double()), want)
    assert len(choices) == 1


def test_number_of_kept_shapes_is_limited(monkeypatch, choices):
    monkeypatch.setattr(prepared, "_MAX_KEPT", 3)
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    for tokens in range(1, 8):
        kernels.int8_row_linear(random(tokens, 96), qdata, scale)
        assert len(prepared._kept) <= 3


def test_kept_layers_keep_no_tensor(choices):
    import gc
    import weakref

    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    kernels.int8_row_linear(random(5, 96), qdata, scale)
    freed = weakref.ref(qdata)
    del qdata
    gc.collect()
    assert prepared._kept and freed() is None
