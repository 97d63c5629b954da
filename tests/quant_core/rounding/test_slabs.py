"""Slabs: whole rows, in order, all of them, and a chance to cancel before each."""

import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.rounding import slabs


def test_slabs_cover_the_weight_once(subtests, monkeypatch):
    for shape in ((1, 1), (10, 7), (3, 1000), (1000, 3)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        for limit in (1, 7, 20, 10**6):
            monkeypatch.setitem(slabs._SLAB, "cpu", limit)
            pieces = list(slabs.row_slabs(weight))
            with subtests.test(shape=shape, limit=limit):
                assert torch.equal(torch.cat([rows for _, _, rows in pieces]), weight.float())
                assert [start for start, _, _ in pieces] == [0, *(stop for _, stop, _ in pieces[:-1])]
                assert pieces[-1][1] == shape[0]


def test_slabs_are_float32_within_the_limit_but_for_single_rows(subtests, monkeypatch):
    for shape in ((10, 7), (3, 1000), (1000, 3)):
        for limit in (1, 20, 2500):
            monkeypatch.setitem(slabs._SLAB, "cpu", limit)
            pieces = [rows for _, _, rows in slabs.row_slabs(torch.zeros(shape, dtype=torch.bfloat16))]
            with subtests.test(shape=shape, limit=limit):
                assert {rows.dtype for rows in pieces} == {torch.float32}
                assert max(rows.numel() for rows in pieces) <= max(limit, shape[1])


def test_errors_are_those_of_the_rows(monkeypatch):
    monkeypatch.setitem(slabs._SLAB, "cpu", 20)
    weight = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    made = quantize_weight(weight, "int8_tensorwise")
    space = made.codec.solve_space((5, 10))
    pieces = list(slabs.error_slabs(weight, made.qdata, made.scale, space))
    assert len(pieces) > 1
    torch.testing.assert_close(torch.cat([error for _, _, error in pieces]), made.dequantize() - weight)


def test_the_check_runs_before_each_slab(monkeypatch):
    monkeypatch.setitem(slabs._SLAB, "cpu", 10)
    calls = []
    pieces = list(slabs.row_slabs(torch.zeros(6, 10), lambda: calls.append(1)))
    assert len(pieces) == 6
    assert len(calls) == 6
