"""What runs on nodes: objects on their way, and the check of a node."""

import pytest
import torch

from learned_rounding.quant_core.workers.messages import pack, unpack
from learned_rounding.quant_core.workers.ray_tasks import check_node


def test_packed_tensors_are_the_same():
    pytest.importorskip("numpy")
    value = {"a": torch.arange(6).reshape(2, 3), "b": torch.zeros(0, 4, dtype=torch.bfloat16)}
    unpacked = unpack(pack(value))
    assert all(torch.equal(unpacked[name], value[name]) for name in value)


def test_unpacked_tensors_are_copies():
    pytest.importorskip("numpy")
    tensor = torch.zeros(4)
    unpack(pack(tensor)).add_(1)
    assert tensor.sum() == 0


def test_a_node_that_shares_the_paths_has_no_problem(tmp_path):
    (tmp_path / "marker").touch()
    assert check_node([str(tmp_path)], [str(tmp_path / "marker")]).problem == ""


def test_a_source_that_is_missing_on_a_node(tmp_path):
    assert "does not see" in check_node([str(tmp_path / "model")], []).problem


def test_a_folder_of_another_disk_lacks_the_marker(tmp_path):
    assert "the same folder" in check_node([], [str(tmp_path / "marker")]).problem
