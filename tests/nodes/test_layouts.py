"""Files in this pack's formats through ComfyUI's own loaders, inside the host's process."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS
from learned_rounding.tests.nodes.probing import in_process, stock_loads, takes_layouts

OURS = [name for name, entry in FORMATS.items() if entry.stock_since is None]
STOCK = [
    "asym_w4a8_int8",
    "asym_w4a8_int8 6 bits",
    "convrot_w4a4",
    "convrot_w4a4 int4",
    "nvfp4",
    "mxfp8",
]
# Relative error of the tiny model's prediction for random inputs; round to nearest, quantized activations.
BOUND = 0.25


@pytest.fixture
def taught(host):
    if not takes_layouts(host):
        pytest.skip(
            f"ComfyUI {host.version} has no way to add formats; models quantized in the graph run through our own layers"
        )


@pytest.mark.usefixtures("taught")
def test_every_operation_of_every_layout(host, tmp_path):
    found = in_process(host, tmp_path, "operation_layouts")
    assert set(found) == set(OURS)
    wrong = [
        (name, dtype, what)
        for name, dtypes in found.items()
        for dtype, holds in dtypes.items()
        for what, held in holds.items()
        if not held
    ]
    assert wrong == []


def check_loaded(name, result, format, expanded=False):
    """The values that hold for files of every format through ComfyUI's own functions."""
    assert result["layers"] == result["baked layers"] > 30, (name, result)
    stored = str(torch.int8 if expanded else FORMATS[format].storage_dtype).removeprefix("torch.")
    assert {stored} <= set(result["codes"]) <= {stored, "int8"}, (name, result)
    errors = {what: value for what, value in result.items() if what.startswith("error")}
    assert len(errors) == 5 and all(0 < value < BOUND for value in errors.values()), (name, result)
    assert result["error with the LoRA"] < result["the LoRA moves by"], (name, result)
    for what in (
        "little memory alone",
        "unpatched",
        "as in the graph",
        "same weights saved by stock",
        "saved by us",
        "loaded from stock's file",
        "baked codecs",
        "baked is as patched",
    ):
        assert result[what], (name, what, result)
    assert result["saved by stock"] is not expanded, (name, result)
    assert result["problems"] == [], (name, result)


@pytest.mark.usefixtures("taught")
def test_stock_functions_load_run_patch_and_save_own_formats(host, tmp_path):
    found = in_process(host, tmp_path, "layout_loading")
    assert set(found) == set(OURS)
    for name, result in found.items():
        assert result["before"] == f"KeyError('{name}')", (name, result)
        assert result["runs"] == f"{name}, run by ComfyUI itself"
        check_loaded(name, result, name)


@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize("name", STOCK)
def test_stock_functions_load_run_patch_and_save_formats_below_8_bits(host, tmp_path, name, sentences):
    """The layers that comfy-kitchen 0.2.31 cannot decode run as INT8 layers of the same values, and fail without this pack."""
    format = name.partition(" ")[0]
    if not stock_loads(host, format):
        pytest.skip(f"ComfyUI {host.version} cannot load {format} files")
    result = in_process(host, tmp_path, f"layout_stock {name}")[name]
    expanded = "INT8 layers" in result["runs"]
    assert expanded is result["before"].startswith("ValueError"), result
    assert expanded or result["before"] == ""
    if host.version == "0.33.0":
        assert expanded is name.endswith("6 bits")
    check_loaded(name, result, format, expanded)
    # A merged LoRA is rounded again; beside the layer, or before its quantization, it adds no error.
    for way in ("beside", "before"):
        assert result[f"error with the LoRA {way}"] < min(1.1 * result["error"], result["error with the LoRA"])
    sentences(result["runs"], result["verified"])


@pytest.mark.usefixtures("taught")
def test_models_in_own_formats_compile_as_native_ones(host, tmp_path):
    found = in_process(host, tmp_path, "layout_compiled")
    native = found.pop("int8_tensorwise")
    assert found.keys() == set(OURS)
    assert all(result == {"same": True, "breaks": native["breaks"]} for result in found.values()), (found, native)


@pytest.mark.usefixtures("taught")
def test_native_formats_do_not_run_own_code(host, tmp_path):
    found = in_process(host, tmp_path, "layout_native")
    assert found["entries kept"] and found["twice"]
    assert "_load_layer" in found["files"].pop("int8_blockwise")["ran"]
    assert {name: result["ran"] for name, result in found["files"].items()} == {
        name: ["load_quantized_module"] for name in found["files"]
    }
    assert all(result["same"] for result in found["files"].values())


@pytest.mark.usefixtures("taught")
def test_damaged_layers_are_rejected_by_name(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "layout_damaged")
    assert found.pop("valid") == ""
    for case, said in found.items():
        assert said.startswith("ValueError") and "a: " in said, (case, said)
        sentences(said)


def test_decoding_layers_run_where_formats_cannot_be_registered(host, tmp_path, sentences):
    for case, result in in_process(host, tmp_path, "layout_changed").items():
        assert len(result["said"]) == 1, (case, result)
        sentences(result["said"])
        assert result["untouched"] and result["layers"] > 30 and 0 < result["error"] < BOUND, (case, result)
