"""Solve spaces: representable values of a weight under the scales of its groups."""

import torch

from learned_rounding.quant_core.formats import E2M1, INT8, GroupLevels, ScaleGroups, SolveSpace
from learned_rounding.quant_core.formats.scales import FLOAT32, TWO_LEVEL_E4M3

ROWS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
BY_ROW = SolveSpace(INT8, ScaleGroups(2, 4, 1, 4), FLOAT32)
BY_GROUP = SolveSpace(E2M1, ScaleGroups(2, 4, 1, 2), TWO_LEVEL_E4M3)


def test_values_are_divided_by_the_scale_of_their_group_and_rounded():
    scale = torch.tensor([[0.5], [20.0]])
    assert BY_ROW.encode(ROWS, scale).tolist() == [[2, 4, 6, 8], [0, 1, 2, 2]]  # ties to even


def test_decode_multiplies_by_the_scale():
    qdata = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]], dtype=torch.int8)
    assert torch.equal(BY_ROW.decode(qdata, torch.tensor([[1.0], [10.0]])), ROWS)


def test_some_rows_take_their_own_scales():
    scale = torch.tensor([[1.0], [10.0]])
    assert torch.equal(BY_ROW.encode(ROWS[1:], scale, 1, 2), BY_ROW.encode(ROWS, scale)[1:])
    qdata = BY_ROW.encode(ROWS, scale)
    assert torch.equal(BY_ROW.decode(qdata[1:], scale, 1, 2), ROWS[1:])


def test_a_group_of_scale_zero_becomes_zero():
    scale = torch.tensor([[0.0, 1.0], [1.0, 10.0]])
    assert not BY_GROUP.encode(ROWS, scale).float()[0, :2].any()
    assert BY_GROUP.encode(ROWS, scale).float()[0, 2:].tolist() == [3.0, 4.0]


def test_the_divisor_of_a_group_of_scale_zero_is_one():
    scale = torch.tensor([[0.0, 2.0], [4.0, 8.0]])
    assert BY_GROUP.divisor(scale).tolist() == [[1, 1, 2, 2], [4, 4, 8, 8]]


def test_levels_replace_the_elements():
    levels = GroupLevels(torch.tensor([-1.0, 0.0, 1.0]), 4, torch.tensor([[3.0], [5.0]]))
    space = BY_ROW.with_levels(levels)
    scale = torch.ones(2, 1)
    assert space.encode(ROWS, scale).tolist() == [[0, 3, 3, 3], [5, 5, 5, 5]]
    low, high = space.neighbours(ROWS)
    assert low.tolist() == [[0, 0, 0, 3], [5, 5, 5, 5]]
    assert high.tolist() == [[3, 3, 3, 3], [5, 5, 5, 5]]


def test_some_rows_take_their_own_levels():
    levels = GroupLevels(torch.tensor([-1.0, 0.0, 1.0]), 4, torch.tensor([[3.0], [5.0]]))
    space = BY_ROW.with_levels(levels).of_rows(slice(1, 2))
    assert space.levels.scale.tolist() == [[5.0]]


def test_a_space_without_levels_is_the_same_for_all_rows():
    assert BY_ROW.of_rows(slice(0, 1)) is BY_ROW


def test_round_nearest_takes_the_largest_magnitude_of_each_group():
    rounded = BY_ROW.round_nearest(ROWS)
    step = ROWS.abs().amax(1, keepdim=True) / 127
    assert ((rounded - ROWS).abs() <= step / 2 * (1 + 1e-5)).all()
    assert torch.equal(rounded[:, 3], ROWS[:, 3])
