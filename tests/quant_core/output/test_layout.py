"""The upper bound of the header size; positions of tensors."""

import json
from pathlib import Path

import torch

from learned_rounding.quant_core.output.layout import TensorLayout, header_bytes
from learned_rounding.quant_core.sources import TensorInfo


def test_header_bound_holds_for_files_of_many_terabytes():
    huge = {f"t{index}": TensorInfo(torch.float32, (2**20, 2**20)) for index in range(3)}
    header, end = {"__metadata__": {}}, 0
    for name, entry in huge.items():
        header[name] = {"dtype": "F32", "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    assert end > 10**13
    assert len(json.dumps(header, separators=(",", ":"))) <= header_bytes(huge.items(), {})


def test_deferred_tensors_follow_all_others_by_falling_item_size(tmp_path: Path):
    layout = TensorLayout(tmp_path)
    payloads = {"byte": b"123", "float": b"1234" * 3}
    layout.add("byte", TensorInfo(torch.uint8, (3,)), 0, payloads["byte"])
    layout.add("float", TensorInfo(torch.float32, (3,)), 0, payloads["float"])
    layout.add("aligned", TensorInfo(torch.float32, (4,)), 0)
    assert list(layout.place_deferred()) == [payloads["float"], payloads["byte"]]
    offsets = {name: entry["data_offsets"] for name, entry in layout.entries.items()}
    assert offsets == {"aligned": [0, 16], "float": [16, 28], "byte": [28, 31]}
    assert layout.end == 31


def test_duplicate_name_is_refused(tmp_path: Path, sentences):
    layout = TensorLayout(tmp_path)
    layout.add("a", TensorInfo(torch.uint8, (8,)), 0)
    with sentences.raises(ValueError):
        layout.add("a", TensorInfo(torch.uint8, (3,)), 0, b"123")
