"""Rounding kernels: Triton against plain torch, on a GPU or in Triton's interpreter."""

import pytest
import torch

from learned_rounding.kernels import reference
from learned_rounding.quant_core.formats import INT8
from learned_rounding.tests.kernels.element_formats import ELEMENTS


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


def test_round_to_element_matches_torchs_cast(subtests):
    for name, element in ELEMENTS.items():
        values = torch.cat([values_and_midpoints(element), random(4096) * element.max / 3])
        with subtests.test(name):
            assert torch.equal(reference.round_to_element(values, element.arithmetic), element.encode(values).float())


def test_round_block_without_coupling_matches_torchs_cast(subtests, fast, device):
    for name, element in ELEMENTS.items():
        values = values_and_midpoints(element).to(device)
        weight = torch.cat([values, values[: -len(values) % 3]]).view(3, -1)
        coupling, ones = torch.zeros(3, 3, device=device), torch.ones(1, 1, device=device)
        got, errors = fast.round_block(
            weight, torch.zeros_like(weight), None, coupling, ones, weight.shape[1], element.arithmetic
        )
        with subtests.test(name):
            assert torch.equal(got.float(), element.encode(weight.clone()).float())
            assert torch.equal(errors, got.float() - weight)


def assert_rounded_alike(got, want, weight, spread):
    """A GPU may use fused multiply-add: a value near a midpoint then rounds the other way and the rest of its row differs.

    Nearly all rows are equal, and every error belongs to its quantized value.
    """
    same = (got[0] == want[0]).all(dim=0)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(got[1][:, same], want[1][:, same], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], got[0].float() * spread - weight, rtol=1e-5, atol=1e-5)


def coupling_of(columns: int, gptq: bool, device, scale: float) -> torch.Tensor:
    coupling = random(columns, columns, seed=3, device=device) * scale
    return coupling.tril(-1) if gptq else coupling.fill_diagonal_(0)


# Columns, rows and rows of a group: one scale for all, one per row, and groups of rows with a smaller last one.
BLOCKS = [(5, 19, 19), (20, 18, 1), (16, 20, 8)]


@pytest.mark.parametrize("gptq", [True, False], ids=["gptq", "descent"])
def test_round_block_matches_plain_torch(subtests, fast, device, gptq):
    """Every element with two of the shapes, and INT8 with as many columns as the kernel has."""
    cases = [(name, BLOCKS[(index + gptq + more) % 3]) for index, name in enumerate(ELEMENTS) for more in (0, 1)]
    for name, (columns, rows, group_rows) in (*cases, ("int8", (128, 16, 1))):
        element = ELEMENTS[name]
        weight, shift, before = (random(columns, rows, seed=seed, device=device) for seed in range(3))
        coupling = coupling_of(columns, gptq, device, 0.2)
        per_column = 1 if group_rows == rows else columns
        scale = 0.05 + random(per_column, -(-rows // group_rows), seed=4, device=device).abs() * 3 / element.max
        arguments = weight, shift, None if gptq else before * 0.01, coupling, scale, group_rows, element.arithmetic
        got, want = fast.round_block(*arguments), reference.round_block(*arguments)
        with subtests.test(name, columns=columns, rows=rows, group_rows=group_rows):
            assert_rounded_alike(got, want, weight, scale.repeat_interleave(group_rows, dim=1)[:, :rows])


CODES = {
    "codebook": torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16).abs() ** 1.2,
    "6 bits": torch.arange(-31.0, 32.0),
}


def test_round_to_levels_chooses_the_nearest_and_of_two_the_lower(subtests):
    for name, codes in CODES.items():
        scale = torch.tensor([0.0, 0.3, 4.0, 130.0])
        values = random(4, 999, seed=5) * 40
        levels = (codes * scale[:, None]).round().clamp(-127, 127)
        halves = (levels[:, 1:] + levels[:, :-1]) / 2
        values = torch.cat([values, levels, halves, values * 10], dim=1)
        distances = (values[:, :, None] - levels[:, None, :]).abs()
        want = levels.gather(1, distances.argmin(dim=2))
        with subtests.test(name):
            assert torch.equal(reference.round_to_levels(values, codes, scale, 127.0), want)


def test_round_block_to_levels_matches_plain_torch(subtests, fast, device):
    columns, rows = 12, 18
    for name, gptq in (("codebook", True), ("codebook", False), ("6 bits", True)):
        codes = CODES[name].to(device)
        weight, shift, before = (random(columns, rows, seed=seed, device=device) for seed in range(3))
        coupling = coupling_of(columns, gptq, device, 0.1)
        scale = (0.02 + random(1, rows, seed=4, device=device).abs() / 20).contiguous()
        level_scale = random(columns, rows, seed=6, device=device).abs() * 60 / codes[-1]
        level_scale[:, 0] = 0
        arguments = weight, shift, None if gptq else before * 0.01, coupling, scale, 1, INT8.arithmetic
        got, want = (entry.round_block(*arguments, codes, level_scale) for entry in (fast, reference))
        levels = (codes * level_scale[..., None]).round().clamp(-127, 127)
        with subtests.test(name, gptq=gptq):
            assert_rounded_alike(got, want, weight, scale)
            assert (got[0][..., None] == levels).any(dim=-1).all()


def test_round_block_without_coupling_equals_zero_coupling(subtests):
    weight, shift = random(5, 12), random(5, 12, seed=1)
    scale = 0.05 + random(5, 3, seed=2).abs()
    for name, element in ELEMENTS.items():
        arguments = (scale, 4, element.arithmetic)
        apart = reference.round_block(weight, shift, None, None, *arguments)
        zero = reference.round_block(weight, shift, None, torch.zeros(5, 5), *arguments)
        with subtests.test(name):
            assert torch.equal(apart[0], zero[0])
            assert torch.equal(apart[1], zero[1])


GROUPS = {"row": (1, 20), "tensor": (9, 20), "block 8": (8, 8), "block 16": (16, 16)}


def test_scale_errors_match_plain_torch(subtests, fast, device):
    """Every element with two of the groups, with and without weights of columns."""
    weight, names = random(9, 20, device=device), list(GROUPS)
    cases = [
        (element, names[(index + 2 * weighted) % 4], bool(weighted))
        for index, element in enumerate(ELEMENTS)
        for weighted in (0, 1)
    ]
    for name, groups, weighted in cases:
        element, (rows, columns) = ELEMENTS[name], GROUPS[groups]
        counts = -(-9 // rows), -(-20 // columns)
        scale = 0.01 + random(*counts, seed=1, device=device).abs() * 2 / element.max
        ratios = torch.tensor([1.0, 0.9, 1.3], device=device)
        column_weight = random(20, seed=2, device=device).square() if weighted else None
        sum_rows = rows if rows < 9 else 1
        arguments = weight, scale, ratios, column_weight, rows, columns, sum_rows, element.arithmetic
        with subtests.test(name, groups=groups, weighted=weighted):
            got, want = fast.scale_errors(*arguments), reference.scale_errors(*arguments)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_scale_errors_accept_half_precision_weights(subtests, fast, device):
    for dtype in (torch.float16, torch.bfloat16):
        weight = random(6, 50, device=device).to(dtype)
        scale, ratios = torch.full((6, 1), 0.02, device=device), torch.tensor([1.0, 0.8], device=device)
        arguments = (scale, ratios, None, 1, 50, 1, INT8.arithmetic)
        want = reference.scale_errors(weight.float(), *arguments)
        with subtests.test(dtype=dtype):
            torch.testing.assert_close(fast.scale_errors(weight, *arguments), want, rtol=1e-4, atol=1e-7)


# Columns, length of a group, codes, whether columns have weights; the groups fill one program in part.
SEARCHES = [
    (96, 16, "codebook", True),
    (320, 64, "codebook", False),
    (80, 4, "6 bits", True),
    (96, 16, "6 bits", False),
]


@pytest.mark.parametrize("columns, group, codes, weighted", SEARCHES)
def test_search_level_scales_matches_plain_torch(fast, device, columns, group, codes, weighted):
    values, codes = random(2, columns, device=device) * 40, CODES[codes].to(device)
    grouped = values.unflatten(1, (-1, group))
    largest = grouped.abs().amax(dim=2) / codes[-1]
    largest[0, 0] = 0.0
    scales = largest.clamp_max(448).to(torch.float8_e4m3fn).view(torch.uint8)
    column_weight = random(columns, seed=2, device=device).square() if weighted else None
    arguments = values, scales, codes, column_weight, 2, 127.0
    want, got = reference.search_level_scales(*arguments), fast.search_level_scales(*arguments)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
    assert (got[0] == want[0]).float().mean() > 0.9  # equal but for sums of squares in another order


@pytest.mark.parametrize("columns, group, codes, weighted", SEARCHES)
def test_search_level_scales_lowers_the_error_of_each_group(columns, group, codes, weighted):
    values, codes = random(5, columns) * 40, CODES[codes]
    grouped = values.unflatten(1, (-1, group))
    scales = (grouped.abs().amax(dim=2) / codes[-1]).clamp_max(448).to(torch.float8_e4m3fn).view(torch.uint8)
    column_weight = random(columns, seed=2).square() if weighted else None
    best, errors = reference.search_level_scales(values, scales, codes, column_weight, 4, 127.0)
    assert (errors[1] <= errors[0]).all()
    assert (errors[1] < errors[0]).any()
    scale = best.view(torch.float8_e4m3fn).float()
    square = (reference.round_to_levels(grouped, codes, scale, 127.0) - grouped).square()
    weights = 1 if column_weight is None else column_weight.view(-1, group)
    torch.testing.assert_close((square * weights).sum(dim=2), errors[1])
