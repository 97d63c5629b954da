"""Rounding kernels: Triton against plain torch, on a GPU or in Triton's interpreter."""

import pytest
import torch

from learned_rounding.kernels import reference
from learned_rounding.quant_core.formats import E2M1, E4M3, E5M2, INT4, INT8

ELEMENTS = {"e4m3": E4M3, "e5m2": E5M2, "e2m1": E2M1, "int8": INT8, "int4": INT4}


@pytest.fixture(params=ELEMENTS, scope="module")
def element(request):
    return ELEMENTS[request.param]


@pytest.fixture(scope="module")
def fast(device):
    from learned_rounding.kernels import triton

    return triton


def random(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def values_and_midpoints(element):
    """All values of an element format, midpoints of neighbours, and points next to both, of both signs."""
    encoded = torch.arange(0, 128, dtype=torch.uint8).view(element.dtype).float()
    values = encoded[torch.isfinite(encoded) & (encoded <= element.max)].unique()
    midpoints = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, midpoints])
    near = torch.cat([points * (1 + 2e-7), points * (1 - 2e-7)])
    return torch.cat([points, near, -points, -near, torch.tensor([1e-30, 1e-40, 1e30, 3e38, -3e38])])


def test_round_to_element_matches_torchs_cast(element):
    values = torch.cat([values_and_midpoints(element), random(4096) * element.max / 3])
    rounded = reference.round_to_element(values, element.arithmetic)
    assert torch.equal(rounded, element.encode(values).float())


def test_round_block_without_coupling_matches_torchs_cast(fast, device, element):
    values = values_and_midpoints(element).to(device)
    weight = values.expand(3, -1).contiguous()
    zero, ones = torch.zeros_like(weight), torch.ones(1, 1, device=device)
    got, errors = fast.round_block(
        weight, zero, None, torch.zeros(3, 3, device=device), ones, len(values), element.arithmetic
    )
    assert torch.equal(got.float(), element.encode(weight).float())
    assert torch.equal(errors, got.float() - weight)


@pytest.mark.parametrize("gptq", [True, False], ids=["gptq", "descent"])
@pytest.mark.parametrize("columns, rows, group_rows", [(5, 37, 37), (128, 20, 1), (16, 40, 8)])
def test_round_block_matches_plain_torch(fast, device, element, columns, rows, group_rows, gptq):
    weight, shift, before = (random(columns, rows, seed=seed, device=device) for seed in range(3))
    coupling = random(columns, columns, seed=3, device=device) * 0.2
    coupling = coupling.tril(-1) if gptq else coupling.fill_diagonal_(0)
    per_column = 1 if group_rows == rows else columns
    scale = 0.05 + random(per_column, -(-rows // group_rows), seed=4, device=device).abs() * 3 / element.max
    before = None if gptq else before * 0.01
    want = reference.round_block(weight, shift, before, coupling, scale, group_rows, element.arithmetic)
    got = fast.round_block(weight, shift, before, coupling, scale, group_rows, element.arithmetic)
    # A GPU may use fused multiply-add: a value near a midpoint then rounds the other way and the rest of its row differs.
    # Nearly all rows are equal, and every error belongs to its quantized value.
    same = (got[0] == want[0]).all(dim=0)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(got[1][:, same], want[1][:, same], rtol=1e-4, atol=1e-5)
    spread = scale.repeat_interleave(group_rows, dim=1)[:, :rows]
    torch.testing.assert_close(got[1], got[0].float() * spread - weight, rtol=1e-5, atol=1e-5)


CODES = {
    "codebook": torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16).abs() ** 1.2,
    "6 bits": torch.arange(-31.0, 32.0),
}


@pytest.mark.parametrize("codes", CODES)
def test_round_to_levels_chooses_the_nearest_and_of_two_the_lower(codes):
    codes, scale = CODES[codes], torch.tensor([0.0, 0.3, 4.0, 130.0])
    values = random(4, 999, seed=5) * 40
    levels = (codes * scale[:, None]).round().clamp(-127, 127)
    halves = (levels[:, 1:] + levels[:, :-1]) / 2
    values = torch.cat([values, levels, halves, values * 10], dim=1)
    distances = (values[:, :, None] - levels[:, None, :]).abs()
    want = levels.gather(1, distances.argmin(dim=2))
    assert torch.equal(reference.round_to_levels(values, codes, scale, 127.0), want)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("gptq", [True, False], ids=["gptq", "descent"])
def test_round_block_to_levels_matches_plain_torch(fast, device, codes, gptq):
    columns, rows = 32, 48
    codes = CODES[codes].to(device)
    weight, shift, before = (random(columns, rows, seed=seed, device=device) for seed in range(3))
    coupling = random(columns, columns, seed=3, device=device) * 0.1
    coupling = coupling.tril(-1) if gptq else coupling.fill_diagonal_(0)
    scale = (0.02 + random(1, rows, seed=4, device=device).abs() / 20).contiguous()
    level_scale = random(columns, rows, seed=6, device=device).abs() * 60 / codes[-1]
    level_scale[:, 0] = 0
    arguments = (
        weight,
        shift,
        None if gptq else before * 0.01,
        coupling,
        scale,
        1,
        INT8.arithmetic,
        codes,
        level_scale,
    )
    want, got = reference.round_block(*arguments), fast.round_block(*arguments)
    same = (got[0] == want[0]).all(dim=0)
    assert same.float().mean() > 0.8
    levels = (codes * level_scale[..., None]).round().clamp(-127, 127)
    assert (got[0][..., None] == levels).any(dim=-1).all()
    torch.testing.assert_close(got[1], got[0].float() * scale - weight, rtol=1e-5, atol=1e-5)


def test_round_block_without_coupling_equals_zero_coupling(element):
    weight, shift = random(5, 12), random(5, 12, seed=1)
    scale = 0.05 + random(5, 3, seed=2).abs()
    arguments = (scale, 4, element.arithmetic)
    apart = reference.round_block(weight, shift, None, None, *arguments)
    zero = reference.round_block(weight, shift, None, torch.zeros(5, 5), *arguments)
    assert torch.equal(apart[0], zero[0]) and torch.equal(apart[1], zero[1])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    "group_shape", [(1, 200), (24, 200), (8, 8), (16, 16)], ids=["row", "tensor", "block 8", "block 16"]
)
def test_scale_errors_match_plain_torch(fast, device, element, group_shape, weighted):
    weight = random(24, 200, device=device)
    scale = (
        0.01
        + random(-(-24 // group_shape[0]), -(-200 // group_shape[1]), seed=1, device=device).abs() * 2 / element.max
    )
    ratios = torch.tensor([1.0, 0.9, 1.3], device=device)
    column_weight = random(200, seed=2, device=device).square() if weighted else None
    sum_rows = group_shape[0] if group_shape[0] < 24 else 1
    arguments = (weight, scale, ratios, column_weight, *group_shape, sum_rows, element.arithmetic)
    torch.testing.assert_close(fast.scale_errors(*arguments), reference.scale_errors(*arguments), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scale_errors_accept_half_precision_weights(fast, device, dtype):
    weight = random(6, 50, device=device).to(dtype)
    scale, ratios = torch.full((6, 1), 0.02, device=device), torch.tensor([1.0, 0.8], device=device)
    arguments = (scale, ratios, None, 1, 50, 1, INT8.arithmetic)
    want = reference.scale_errors(weight.float(), *arguments)
    torch.testing.assert_close(fast.scale_errors(weight, *arguments), want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("columns, group", [(96, 16), (640, 64), (80, 4)])
def test_search_level_scales_matches_plain_torch(fast, device, columns, group, codes, weighted):
    values = random(5, columns, device=device) * 40
    codes = CODES[codes].to(device)
    largest = values.abs().unflatten(1, (-1, group)).amax(dim=2) / codes[-1]
    largest[0, 0] = 0.0
    bits = largest.clamp_max(448).to(torch.float8_e4m3fn).view(torch.uint8)
    column_weight = random(columns, seed=2, device=device).square() if weighted else None
    arguments = values, bits, codes, column_weight, 4, 127.0
    want, got = reference.search_level_scales(*arguments), fast.search_level_scales(*arguments)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
    assert (got[0] == want[0]).float().mean() > 0.9  # equal but for sums of squares in another order
    assert (want[1][1] <= want[1][0]).all() and (want[1][1] < want[1][0]).any()
    scale = want[0].view(torch.float8_e4m3fn).float()
    made = reference.round_to_levels(values.unflatten(1, (-1, group)), codes, scale, 127.0) - values.unflatten(
        1, (-1, group)
    )
    square = made.square() if column_weight is None else made.square() * column_weight.view(-1, group)
    torch.testing.assert_close(square.sum(dim=2), want[1][1])
