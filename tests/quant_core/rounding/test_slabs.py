"""Slabs: whole rows, in order, all of them, and a chance to cancel before each."""

import itertools

import pytest
import torch

from learned_rounding.quant_core.rounding import slabs


@pytest.mark.parametrize("shape", [(1, 1), (10, 7), (3, 1000), (1000, 3)])
@pytest.mark.parametrize("limit", [1, 7, 20, 10**6])
def test_slabs_cover_the_weight_once(monkeypatch, shape, limit):
    monkeypatch.setitem(slabs._SLAB, "cpu", limit)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    pieces = list(slabs.row_slabs(weight))
    assert torch.equal(torch.cat([rows for _, _, rows in pieces]), weight.float())
    assert pieces[0][0] == 0 and pieces[-1][1] == shape[0]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(pieces))
    assert all(rows.dtype == torch.float32 and rows.numel() <= max(limit, shape[1]) for _, _, rows in pieces)


def test_the_check_runs_before_each_slab(monkeypatch):
    monkeypatch.setitem(slabs._SLAB, "cpu", 10)
    calls = []
    assert len(list(slabs.row_slabs(torch.zeros(6, 10), lambda: calls.append(1)))) == 6
    assert len(calls) == 6
