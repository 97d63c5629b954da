"""Levels of groups: the few integers that a quantized value can be, and their indices."""

import torch

from learned_rounding.quant_core.formats import GroupLevels

CODES = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
# Two rows of two groups of two columns: levels (−10, −5, 0, 5, 10), (−4, −2, 0, 2, 4), all 0, and clamped to ±127.
LEVELS = GroupLevels(CODES, 2, torch.tensor([[10.0, 4.0], [0.0, 300.0]]))


def test_each_value_becomes_the_nearest_level_of_its_group():
    values = torch.tensor([[6.0, -9.0, 2.9, 4.0], [6.0, -9.0, 140.0, -100.0]])
    assert LEVELS.nearest(values).tolist() == [[5, -10, 2, 4], [0, 0, 127, -127]]


def test_of_two_levels_equally_near_the_lower_is_taken():
    values = torch.tensor([[7.5, -7.5, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    assert LEVELS.nearest(values).tolist()[0] == [5, -10, 0, -2]


def test_neighbours_enclose_a_value():
    low, high = LEVELS.neighbours(torch.tensor([[6.0, -9.0, 2.9, 1.0], [1.0, -1.0, 60.0, -60.0]]))
    assert low.tolist() == [[5, -10, 2, 0], [0, 0, 0, -127]]
    assert high.tolist() == [[10, -5, 4, 2], [0, 0, 127, 0]]


def test_beyond_the_last_level_both_neighbours_are_that_level():
    low, high = LEVELS.neighbours(torch.tensor([[11.0, 99.0, 5.0, 99.0], [0.0, 0.0, 200.0, 200.0]]))
    assert low.tolist()[0] == [10, 10, 4, 4]
    assert high.tolist()[0] == [10, 10, 4, 4]


def test_indices_are_those_of_the_codes():
    qdata = torch.tensor([[-10, 5, 0, 4], [0, 0, 127, -127]], dtype=torch.int8)
    assert LEVELS.indices(qdata).tolist() == [[0, 3, 2, 4], [0, 0, 3, 0]]


def test_the_index_of_equal_levels_is_the_lowest():
    qdata = torch.zeros(2, 4, dtype=torch.int8)
    assert LEVELS.indices(qdata)[1, :2].tolist() == [0, 0]


def test_rows_have_their_own_scales():
    assert LEVELS.rows(slice(1, 2)).scale.tolist() == [[0.0, 300.0]]
    assert LEVELS.rows(torch.tensor([1, 0])).scale.tolist() == [[0.0, 300.0], [10.0, 4.0]]


def test_codes_are_kept_unless_others_are_given():
    scale = torch.ones(1, 1)
    assert LEVELS.with_scale(scale).codes is CODES
    assert LEVELS.with_scale(scale, CODES * 2).codes.tolist() == [-2, -1, 0, 1, 2]


def test_levels_move_with_codes_and_scale():
    moved = LEVELS.to(torch.device("meta"))
    assert moved.codes.device.type == "meta"
    assert moved.scale.device.type == "meta"
