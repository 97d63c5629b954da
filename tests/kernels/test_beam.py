"""Beam search over the roundings of a block: Triton against plain torch, and both against all roundings in float64."""

from itertools import product

import pytest
import torch

from learned_rounding.kernels import reference
from learned_rounding.quant_core.formats import INT8
from learned_rounding.tests.kernels.element_formats import ELEMENTS

CODES = {
    "codebook": torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16).abs() ** 1.2,
    "6 bits": torch.arange(-31.0, 32.0),
}


@pytest.fixture(scope="module")
def fast(device):
    from learned_rounding.kernels import triton

    return triton


def random(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def block(element, columns, rows, group_rows, device="cpu"):
    """Arguments of round_block_beam up to the beam width."""
    coupling = (random(columns, columns, seed=3, device=device) * 0.3).tril(-1)
    per_column = 1 if group_rows == rows else columns
    scale = 0.05 + random(per_column, -(-rows // group_rows), seed=4, device=device).abs() * 3 / element.max
    weight, shift = (random(columns, rows, seed=seed, device=device) for seed in (0, 1))
    cost = 0.1 + random(columns, seed=5, device=device).square()
    return weight, shift, coupling, cost, scale, group_rows, element.arithmetic


def block_of_levels(codes, columns, rows, device="cpu"):
    """The same for groups of levels, and the two arguments after the beam width."""
    scale = (0.02 + random(1, rows, seed=4, device=device).abs() / 20).contiguous()
    arguments = (*block(INT8, columns, rows, rows, device)[:4], scale, 1, INT8.arithmetic)
    level_scale = random(columns, rows, seed=6, device=device).abs() * 60 / codes[-1]
    level_scale[:, 0] = 0  # a group with one level
    return arguments, (codes.to(device), level_scale)


def cost_of(arguments, errors):
    """Σ (L_jj·(E·L)_j)² of each row in float64, with what other columns feed to the block."""
    _, shift, coupling, column_cost = (tensor.double() for tensor in arguments[:4])
    unit = coupling + torch.eye(len(coupling), dtype=torch.float64)
    return ((unit.t() @ errors.double() + shift).square() * column_cost[:, None]).sum(dim=0)


def assert_identical(got, want):
    assert torch.equal(got[0].view(torch.int16), want[0].view(torch.int16))  # negative zeros differ
    assert torch.equal(got[1], want[1])


# Columns, rows and rows of a group: one scale for all, one per row, and groups of two rows.
SHAPES = [(5, 9, 9), (12, 3, 1), (9, 4, 2)]


def test_triton_and_plain_torch_are_identical(subtests, fast, device):
    """Every element, INT8 with a narrow and a wide beam, in shapes in turn."""
    for index, (name, element) in enumerate(ELEMENTS.items()):
        for width in (3, 8) if name == "int8" else ((3, 8)[index % 2],):
            columns, rows, group_rows = SHAPES[(index + width) % 3]
            arguments = (*block(element, columns, rows, group_rows, device), width)
            with subtests.test(name, width=width, columns=columns, rows=rows):
                assert_identical(fast.round_block_beam(*arguments), reference.round_block_beam(*arguments))


def test_triton_and_plain_torch_are_identical_for_levels(subtests, fast, device):
    for name, width, columns in (("codebook", 6, 6), ("codebook", 1, 9), ("6 bits", 3, 4)):
        arguments, levels = block_of_levels(CODES[name], columns, 3, device)
        with subtests.test(name, width=width):
            assert_identical(
                fast.round_block_beam(*arguments, width, *levels),
                reference.round_block_beam(*arguments, width, *levels),
            )


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3072, 301])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_blocks_of_real_size_are_identical(subtests, fast, device, rows, width):
    for name, element in ELEMENTS.items():
        arguments = (*block(element, 128, rows, 1, device), width)
        with subtests.test(name):
            assert_identical(fast.round_block_beam(*arguments), reference.round_block_beam(*arguments))
    for name, codes in CODES.items():
        arguments, levels = block_of_levels(codes, 128, rows, device)
        with subtests.test(name):
            assert_identical(
                fast.round_block_beam(*arguments, width, *levels),
                reference.round_block_beam(*arguments, width, *levels),
            )


def test_the_width_1_is_round_block(subtests):
    for name, element in ELEMENTS.items():
        weight, shift, coupling, cost, *rest = block(element, 40, 24, 8)
        got = reference.round_block_beam(weight, shift, coupling, cost, *rest, 1)
        want = reference.round_block(weight, shift, None, coupling, *rest)
        same = (got[0] == want[0]).all(dim=0)  # but for ties, where torch.addr may fuse multiplication and addition
        with subtests.test(name):
            assert same.float().mean() > 0.8
            torch.testing.assert_close(got[1][:, same], want[1][:, same])


def test_no_row_costs_more_than_by_round_block(subtests):
    for name, element in ELEMENTS.items():
        arguments = block(element, 48, 200, 1)
        greedy, *beams = (
            cost_of(arguments, reference.round_block_beam(*arguments, width)[1]) for width in (1, 2, 4, 8)
        )
        sums = [float(cost.sum()) for cost in (greedy, *beams)]
        with subtests.test(name):
            assert all((beam <= greedy * (1 + 1e-5)).all() for beam in beams)
            assert sums == sorted(sums, reverse=True)
            assert sums[-1] < 0.98 * sums[0]


def test_no_row_of_levels_costs_more_than_by_round_block(subtests):
    for name, codes in CODES.items():
        arguments, levels = block_of_levels(codes, 48, 200)
        greedy, beam = (
            cost_of(arguments, reference.round_block_beam(*arguments, width, *levels)[1]) for width in (1, 8)
        )
        with subtests.test(name):
            assert (beam <= greedy * (1 + 1e-5)).all()
            assert beam.sum() < 0.98 * greedy.sum()


def nearest_two(target, values):
    """The two of the sorted ``values`` that enclose a number."""
    above = int((values < target).sum())
    return {float(values[min(max(index, 0), len(values) - 1)]) for index in (above - 1, above)}


@pytest.mark.parametrize("columns", [3, 5])
def test_a_beam_that_drops_nothing_finds_the_least_cost_in_float64(columns):
    """All 2ⁿ roundings to one of the two nearest levels, each number from those before it."""
    arguments, levels = block_of_levels(CODES["codebook"], columns, 30)
    weight, shift, coupling, column_cost, scale = (tensor.double() for tensor in arguments[:5])
    _, errors = reference.round_block_beam(*arguments, 2**columns, *levels)
    tables = (levels[0] * levels[1][..., None]).round().clamp(-127, 127).double()
    for row in range(1, weight.shape[1]):
        best = float("inf")
        for choice in product((0, 1), repeat=columns):
            error, cost = torch.zeros(columns, dtype=torch.float64), 0.0
            for i in reversed(range(columns)):
                target = weight[i, row] - shift[i, row] - coupling[:, i] @ error
                pair = sorted(nearest_two(target / scale[0, row], tables[i, row]))
                value = pair[min(choice[i], len(pair) - 1)] * scale[0, row]
                error[i], cost = value - weight[i, row], cost + (value - target) ** 2 * column_cost[i]
            best = min(best, float(cost))
        assert float(cost_of(arguments, errors)[row]) == pytest.approx(best, rel=1e-4)
