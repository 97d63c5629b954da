"""Files of recorded calls and of Hessians where the system removes no mapped file."""

import gc

import torch

from learned_rounding.quant_core.calibration import Collector
from learned_rounding.quant_core.calibration.recorder import _HeldTensor


def test_file_of_a_recorded_tensor_is_removed_with_it(windows, tmp_path):
    held = _HeldTensor(torch.arange(1000.0), "", tmp_path / "a")
    assert torch.equal(held.read(), torch.arange(1000.0))
    del held
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_file_of_a_tensor_that_is_still_used_stays(windows, tmp_path):
    held = _HeldTensor(torch.arange(1000.0), "", tmp_path / "a")
    tensor = held.read()
    del held
    gc.collect()
    assert torch.equal(tensor, torch.arange(1000.0))


def test_collector_is_closed_while_a_hessian_is_mapped(windows, tmp_path):
    collector = Collector({}, tmp_path, device=torch.device("cpu"), device_bytes=0)
    mapped = collector._map_file(4096)
    collector.close()
    assert len(list(tmp_path.iterdir())) == 1
    assert not mapped.any()
