"""Dtype names of the safetensors format, against the library of the format."""

import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.sources.dtypes import DTYPE_NAMES, SOURCE_DTYPES, TORCH_DTYPES, UNREADABLE_DTYPES


def test_dtype_names_are_those_that_safetensors_writes(subtests, tmp_path):
    for dtype, name in DTYPE_NAMES.items():
        with subtests.test(name):
            save_file({"a": torch.zeros(2, dtype=dtype)}, tmp_path / "a.safetensors")
            assert f'"dtype":"{name}"'.encode() in (tmp_path / "a.safetensors").read_bytes()


def test_each_dtype_has_one_name():
    assert {DTYPE_NAMES[dtype]: dtype for dtype in DTYPE_NAMES} == TORCH_DTYPES


def test_dtypes_of_weights_are_those_that_files_can_have():
    assert set(SOURCE_DTYPES) <= DTYPE_NAMES.keys()


def test_no_dtype_is_readable_and_unreadable(subtests):
    for name in UNREADABLE_DTYPES:
        with subtests.test(name=name):
            assert name not in TORCH_DTYPES or name == "F8_E8M0"  # only where torch lacks it


def test_tensors_of_every_dtype_that_are_not_quantized_are_copied_byte_for_byte(subtests, model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tables = {}
    for dtype, name in DTYPE_NAMES.items():
        high = 2 if dtype is torch.bool else 256
        stored = torch.randint(0, high, (3, 8, dtype.itemsize), dtype=torch.uint8, generator=generator)
        tables[f"table.{name}"] = stored.view(dtype).squeeze(-1)
    save_file(model() | tables, tmp_path / "model.safetensors")
    quantize_file(tmp_path / "model.safetensors", tmp_path / "out.safetensors", Recipe(rounding="nearest"))
    made = load_file(tmp_path / "out.safetensors")
    for name, table in tables.items():
        with subtests.test(name):
            assert made[name].dtype is table.dtype
            assert torch.equal(made[name].view(torch.uint8), table.view(torch.uint8))
