"""The upper bound of the header size; positions of tensors."""

import io
import json
from pathlib import Path

import pytest
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


TENSORS = {
    "aligned": torch.arange(8.0),
    "odd": torch.arange(5, dtype=torch.uint8),
    "half": torch.tensor([[1.5], [-2.0], [float("nan")]], dtype=torch.bfloat16),
    "scalar": torch.tensor(7.25),
    "empty": torch.zeros(0, 3),
    "fp8": torch.arange(16.0).reshape(4, 4).to(torch.float8_e4m3fn),
    "bools": torch.tensor([True, False, True]),
    "long": torch.tensor([-1, 2**40]),
}


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def written(tmp_path):
    """A layout of TENSORS with the file of those that have a position, which begins after ten other bytes."""
    layout, file = TensorLayout(tmp_path), io.BytesIO()
    file.write(bytes(10))
    for name, tensor in TENSORS.items():
        info = TensorInfo(tensor.dtype, tuple(tensor.shape))
        payload = to_bytes(tensor)
        layout.add(name, info, 0, payload if TensorLayout.defers(info) else b"")
        if not TensorLayout.defers(info):
            file.write(payload)
    return layout, file


def test_added_tensors_are_read_back(written, subtests):
    for name in TENSORS:
        with subtests.test(name):
            layout, file = written
            found = layout.read(name, file, 10)
            assert found.dtype == TENSORS[name].dtype
            assert found.shape == TENSORS[name].shape
            assert to_bytes(found) == to_bytes(TENSORS[name])
            assert found.is_contiguous()


def test_reading_leaves_the_positions_for_the_next_tensor(written):
    layout, file = written
    before = file.tell(), layout.spool.tell()
    for name in TENSORS:
        layout.read(name, file, 10)
    assert (file.tell(), layout.spool.tell()) == before
    layout.add("later", TensorInfo(torch.uint8, (3,)), 0, b"abc")
    assert bytes(layout.read("later", file, 10).tolist()) == b"abc"
    assert to_bytes(layout.read("odd", file, 10)) == to_bytes(TENSORS["odd"])


def test_reading_a_deferred_tensor_once_it_has_a_position(written):
    layout, file = written
    for payload in layout.place_deferred():
        file.write(payload)
    assert all(to_bytes(layout.read(name, file, 10)) == to_bytes(tensor) for name, tensor in TENSORS.items())


def test_tensor_that_ends_early_is_an_error(written):
    layout, file = written
    file.truncate(30)
    with pytest.raises(OSError, match="aligned"):
        layout.read("aligned", file, 10)
