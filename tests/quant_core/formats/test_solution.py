"""Solutions move between devices with all their tensors."""

import torch

from learned_rounding.quant_core.formats import GroupLevels, Solution

QDATA, SCALE = torch.zeros(2, 16, dtype=torch.int8), torch.ones(2, 1)


def test_all_tensors_are_moved():
    levels = GroupLevels(torch.arange(-8.0, 8), 16, torch.ones(2, 1))
    moved = Solution("gptq", QDATA, SCALE, torch.ones(()), 0.1, levels=levels).to(torch.device("meta"))
    tensors = {
        "qdata": moved.qdata,
        "scale": moved.scale,
        "parent": moved.parent,
        "codes": moved.levels.codes,
        "levels": moved.levels.scale,
    }
    assert {name for name, tensor in tensors.items() if tensor.device.type != "meta"} == set()


def test_absent_tensors_stay_absent():
    moved = Solution("nearest", QDATA, SCALE, None, 0.1).to(torch.device("meta"))
    assert moved.parent is None
    assert moved.levels is None


def test_errors_are_kept():
    moved = Solution("gptq", QDATA, SCALE, None, 0.1, gain=0.5, output_error=0.2, dampening=0.01).to(
        torch.device("meta")
    )
    assert moved.weight_error == 0.1
    assert moved.gain == 0.5
    assert moved.output_error == 0.2
    assert moved.dampening == 0.01
