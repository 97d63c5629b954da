"""Codes against an oracle that knows nothing of rounding: all values of the grid, and the nearest of them."""

import pytest
import torch

from learned_rounding.quant_core.formats import E4M3, E5M2, INT8


def finite_values(grid) -> tuple[torch.Tensor, torch.Tensor]:
    """All codes that may be written, as raw bytes, and what they mean, by rising value; −0 is left out."""
    raw = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values = raw.view(grid.dtype).double()
    wanted = torch.isfinite(values) & (values.abs() <= grid.max) & ~((values == 0) & (raw == 128))
    order = values[wanted].argsort()
    return raw[wanted][order], values[wanted][order]


def nearest_even(grid, numbers: torch.Tensor) -> torch.Tensor:
    """Value of the nearest code; of two equally near ones, that with an even last bit."""
    raw, values = finite_values(grid)
    distance = (numbers.double()[:, None] - values).abs()
    even = (raw % 2 == 0).double()
    # A tie is exact in float64, so a bonus far below any real difference of distances decides it and nothing else.
    return values[(distance - even * 1e-12 * distance.clamp_min(1e-30)).argmin(dim=1)]


@pytest.mark.parametrize("grid", [E4M3, E5M2, INT8], ids=["e4m3", "e5m2", "int8"])
def test_codes_are_the_nearest_ties_to_even(grid):
    _, values = finite_values(grid)
    ties = (values[1:] + values[:-1]) / 2
    step = values.diff()
    anywhere = torch.linspace(-1.1 * grid.max, 1.1 * grid.max, 997, dtype=torch.float64)
    numbers = torch.cat([values, ties, ties + step / 16, ties - step / 16, anywhere]).float()
    assert torch.equal(grid.encode(numbers.clone()).double(), nearest_even(grid, numbers))


@pytest.mark.parametrize("grid, end", [(E4M3, 448.0), (E5M2, 57344.0), (INT8, 127.0)], ids=["e4m3", "e5m2", "int8"])
def test_values_beyond_the_end_clamp(grid, end):
    """Never NaN (which a plain cast to e4m3fn gives), never −128, never a wrapped int8."""
    far = torch.tensor([end * 1.01, end * 1.5, 1e9, 3e38, float("inf")])
    assert grid.encode(far.clone()).float().tolist() == [end] * 5
    assert grid.encode(-far).float().tolist() == [-end] * 5


def test_e4m3_codes_are_those_of_torch():
    numbers = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 60
    expected = numbers.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(E4M3.encode(numbers.clone()).view(torch.uint8), expected.view(torch.uint8))


def test_int8_codes_are_those_of_torch():
    numbers = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 60
    assert torch.equal(INT8.encode(numbers.clone()), torch.round(numbers).clamp(-127, 127).to(torch.int8))


def test_only_float_grids_are_floating():
    assert E4M3.floating and E5M2.floating and not INT8.floating


@pytest.mark.parametrize("grid", [E4M3, E5M2, INT8], ids=["e4m3", "e5m2", "int8"])
def test_neighbours_enclose_a_value(grid):
    _, values = finite_values(grid)
    between = torch.cat([(values[1:] + values[:-1]) / 2, values[:-1] + values.diff() * 0.9]).float()
    low, high = grid.neighbours(between)
    place = torch.searchsorted(values, between.double()) - 1
    assert torch.equal(low.double(), values[place]) and torch.equal(high.double(), values[place + 1])
    low, high = grid.neighbours(values.float())
    assert ((low.double() == values) | (high.double() == values)).all()
    for end in (grid.max, -grid.max):
        low, high = grid.neighbours(torch.tensor([end * 1.5, end * 1e3]))
        assert low.tolist() == high.tolist() == [end] * 2
