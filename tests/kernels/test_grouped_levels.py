"""Linear layers with W4A8 weights: the Triton kernels against plain torch, which is checked against float64."""

from types import SimpleNamespace

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import backends, prepared, reference
from learned_rounding.kernels.hadamard import rotate

CODEBOOK = torch.linspace(-0.98, 0.97, 16)
# Name → (out, in, group size, codebook, dtype of the group scales).
WEIGHTS = {
    "codebook": (50, 256, 16, CODEBOOK, torch.float8_e4m3fn),
    "uniform": (64, 192, 16, None, torch.float32),
    "long groups": (33, 512, 32, CODEBOOK, torch.float8_e4m3fn),
    "odd groups": (16, 96, 48, None, torch.float8_e4m3fn),
}
NAMES = pytest.mark.parametrize("name", WEIGHTS)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_weight(name, device="cpu"):
    """qdata, group scales, scales and codebook; among the group scales are zero, the smallest one and one that saturates."""
    out, inner, group, codebook, dtype = WEIGHTS[name]
    generator = torch.Generator().manual_seed(1)
    qdata = torch.randint(-128, 128, (out, inner // 2), generator=generator, dtype=torch.int8)
    scale = torch.rand(out, inner // group, generator=generator) * 128
    scale[:3, 0] = torch.tensor([0.0, 2.0**-9, 448.0])
    channel = torch.rand(out, generator=generator) * 0.01
    tensors = qdata, scale.to(dtype), channel, codebook
    return tuple(None if tensor is None else tensor.to(device) for tensor in tensors)


@pytest.fixture(scope="module")
def triton_levels(device):
    from learned_rounding.kernels.triton import grouped_levels

    return grouped_levels


@pytest.fixture
def processors(device, monkeypatch):
    """A number of multiprocessors for the interpreter."""
    if device.type == "cpu":
        found = SimpleNamespace(multi_processor_count=8, major=9, minor=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


@NAMES
def test_expanded_weight_is_the_rounded_product_of_level_and_scale(name):
    qdata, scale, _, codebook = make_weight(name)
    group = WEIGHTS[name][2]
    got = kernels.expand_w4a8_weight(qdata, scale, codebook)
    for row, column in ((0, 0), (1, 1), (2, 2), (2, 7), (7, 9), (15, group + 2)):
        byte = int(qdata[row, column // 2]) & 255
        index = byte >> 4 if column % 2 else byte & 15
        level = index - 8 if codebook is None else float(codebook[index])
        value = torch.tensor(level * float(scale[row, column // group]), dtype=torch.float64)
        assert int(got[row, column]) == int(value.round().clamp(-127, 127))


@NAMES
def test_expansion_in_triton_is_bit_identical(triton_levels, device, name):
    qdata, scale, _, codebook = make_weight(name, device)
    want = reference.expand_weight(qdata, scale, codebook)
    assert torch.equal(triton_levels.expand_weight(qdata, scale, codebook), want)


@pytest.mark.parametrize("rotate_by", [0, 16])
@NAMES
def test_layer_matches_float64(name, rotate_by):
    qdata, scale, channel, codebook = make_weight(name)
    weight = kernels.expand_w4a8_weight(qdata, scale, codebook).double() * channel[:, None].double()
    x, bias = random(3, 5, 2 * qdata.shape[1]), random(qdata.shape[0], seed=2)
    activations = rotate(x, rotate_by) if rotate_by else x
    want = activations.double() @ weight.t() + bias.double()
    got = kernels.w4a8_linear(x, qdata, scale, channel, codebook, bias, rotate_by=rotate_by)
    assert got.dtype is torch.float32
    assert got.shape == (3, 5, qdata.shape[0])
    assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("rotate_by", [0, 16])
@pytest.mark.parametrize("tokens", [1, 3, 5, 70])
@NAMES
def test_layer_in_triton_matches_plain_torch(triton_levels, processors, device, name, tokens, rotate_by):
    qdata, scale, channel, codebook = make_weight(name, device)
    x = random(tokens, 2 * qdata.shape[1]).to(device)
    for bias in (None, random(qdata.shape[0], seed=2).to(device)):
        arguments = x, qdata, scale, channel, codebook, bias
        options = rotate_by, torch.float32
        want = reference.prepare_w4a8_linear(*arguments, *options)(*arguments)
        got = triton_levels.prepare_w4a8_linear(*arguments, *options)(*arguments)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-3 * float(want.abs().max()) if rotate_by else 1e-4)


@pytest.mark.parametrize("most_splits", [1, 16])
def test_sums_of_parts_are_those_of_the_whole(triton_levels, processors, device, monkeypatch, most_splits):
    monkeypatch.setattr(triton_levels, "_MOST_SPLITS", most_splits)
    splits = triton_levels._count_splits(triton_levels.FEW_TOKENS[4], 20, 520, 8)
    assert (splits > 1) == (most_splits > 1)
    qdata = torch.randint(-128, 128, (20, 4160), generator=torch.Generator().manual_seed(3), dtype=torch.int8).to(
        device
    )
    scale, channel = torch.full((20, 520), 40.0, device=device), torch.full((20,), 0.01, device=device)
    arguments = random(3, 8320).to(device), qdata, scale, channel, CODEBOOK.to(device), None
    got = triton_levels.prepare_w4a8_linear(*arguments, 0, torch.float32)(*arguments)
    want = reference.prepare_w4a8_linear(*arguments, 0, torch.float32)(*arguments)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_token_with_nan_or_infinity_is_not_finite_and_others_are_unchanged(triton_levels, processors, device):
    qdata, scale, channel, codebook = make_weight("codebook", device)
    x = random(4, 256).to(device)
    arguments = [x, qdata, scale, channel, codebook, None]
    run = triton_levels.prepare_w4a8_linear(*arguments, 0, torch.float32)
    want = run(*arguments)
    arguments[0] = x.clone()
    arguments[0][1, 3], arguments[0][2, 4] = float("nan"), float("inf")
    got = run(*arguments)
    assert not got[1:3].isfinite().any()
    assert torch.equal(got[[0, 3]], want[[0, 3]])


def test_implementation_is_chosen_once_per_shape(monkeypatch):
    chosen, choose = [], backends.implementation
    prepared._kept.clear()
    monkeypatch.setattr(backends, "implementation", lambda name, *args: chosen.append(name) or choose(name, *args))
    qdata, scale, channel, codebook = make_weight("codebook")
    for seed in range(3):
        kernels.w4a8_linear(random(2, 256, seed=seed), qdata, scale, channel, codebook)
    assert chosen == ["w4a8_linear"]
    kernels.w4a8_linear(random(2, 256), qdata, scale, channel, None)
    kernels.w4a8_linear(random(3, 256), qdata, scale, channel, codebook)
    kernels.w4a8_linear(random(2, 256), qdata, scale.float(), channel, codebook)
    assert chosen == ["w4a8_linear"] * 4


def test_compiled_layer_is_one_operator_with_the_shape_of_the_result():
    qdata, scale, channel, codebook = make_weight("codebook")

    def run(x):
        return kernels.w4a8_linear(x, qdata, scale, channel, codebook, rotate_by=16) + 1

    x = random(2, 3, 256, dtype=torch.bfloat16)
    compiled = torch.compile(run, backend="eager", fullgraph=True)(x)
    assert torch.equal(compiled, run(x))


WRONG = {
    "activations": ({"x": torch.zeros(2, 128)}, "Activations with 128 channels do not match a W4A8 weight with 256."),
    "groups": (
        {"group_scale": torch.zeros(50, 15)},
        r"A W4A8 weight of shape \(50, 128\) has no groups .* \(50, 15\).",
    ),
    "dtype of groups": (
        {"group_scale": torch.zeros(50, 16).half()},
        "Group scales must be float8_e4m3fn or float32, not torch.float16.",
    ),
    "codebook": ({"codebook": torch.zeros(8)}, r"A codebook must have 16 float32 values, not torch.float32 \(8,\)."),
    "scale": (
        {"scale": torch.zeros(50, 1)},
        r"A W4A8 weight with 50 rows needs as many float32 scales, not torch.float32 \(50, 1\).",
    ),
    "bias": ({"bias": torch.zeros(51)}, r"The bias must have shape \(50,\) to match a W4A8 weight with 50 rows."),
    "rotation": ({"rotate_by": 32}, "The rotation group size must be 16, 64 or 256, not 32."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensor_is_named(case):
    change, sentence = WRONG[case]
    qdata, scale, channel, codebook = make_weight("codebook")
    usual = {"x": random(2, 256), "codes": qdata, "group_scale": scale, "scale": channel, "codebook": codebook}
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        kernels.w4a8_linear(**{**usual, **change})
