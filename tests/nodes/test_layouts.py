"""Files in this pack's formats through ComfyUI's own loaders, inside the host's process."""

import pytest

from learned_rounding.quant_core import FORMATS
from learned_rounding.tests.nodes.probing import in_process, takes_layouts

OURS = [name for name, entry in FORMATS.items() if entry.stock_since is None]
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


@pytest.mark.usefixtures("taught")
def test_stock_functions_load_run_patch_and_save_own_formats(host, tmp_path):
    found = in_process(host, tmp_path, "layout_loading")
    assert set(found) == set(OURS)
    for name, result in found.items():
        assert result["before"] == f"KeyError('{name}')" and result["knows"], (name, result)
        assert result["layers"] == result["baked layers"] > 30, (name, result)
        assert result["codes"] == [str(FORMATS[name].storage_dtype).removeprefix("torch.")], (name, result)
        for error in ("error", "error with the LoRA", "error with the LoRA and little memory"):
            assert 0 < result[error] < BOUND, (name, error, result)
        assert result["error with the LoRA"] < result["the LoRA moves by"], (name, result)
        for what in (
            "little memory alone",
            "unpatched",
            "as in the graph",
            "saved by stock",
            "saved by us",
            "loaded from stock's file",
            "baked is as patched",
        ):
            assert result[what], (name, what, result)
        assert result["baked"] == [], (name, result)
        assert result["baked formats"] == 1, (name, result)


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
