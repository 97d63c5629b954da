"""Text encoders, inside the host's process: no stock node loads one that is small enough for a test."""

import pytest

from learned_rounding.tests.nodes.probing import in_process

# Relative error of the conditioning of a random model of width 64.
BOUNDS = {"float8_e4m3fn": 0.6, "int8_tensorwise": 0.3, "int8 convrot": 0.3, "int8_blockwise": 0.3}
# LayerStatistics are quantized too; conditionings that have nothing in common would be √2 apart.
OURS = {"int8_blockwise": 0.4, "float8_e4m3fn_blockwise": 0.9, "float8_e4m3fn_rowwise": 0.9}
# Sensitive layers take INT8 below 8 bits.
BELOW_8_BITS = {"asym_w4a8_int8": 0.7, "asym_w4a8_int8 6 bits": 0.4, "convrot_w4a4": 0.9, "nvfp4": 0.9, "mxfp8": 0.5}
CHECKS = [("text_encoder", BOUNDS), ("taught_text_encoder", OURS), ("small_text_encoder", BELOW_8_BITS)]


@pytest.fixture(autouse=True)
def _small_encoders(host):
    if host.version == "0.3.75":
        pytest.skip("ComfyUI 0.3.75 recognises only T5 encoders of full width, and loads no quantized ones")


@pytest.mark.parametrize("check, bounds", CHECKS)
def test_t5_in_the_graph_equals_its_file(host, tmp_path, check, bounds, sentences):
    found = in_process(host, tmp_path, check)
    assert found.keys() == bounds.keys()
    for format, bound in bounds.items():
        result = found[format]
        assert result["stock_layers"] is (check != "text_encoder" or format != "int8_blockwise")
        assert result["layers"] == result["loaded_layers"] == 24 * 7
        assert result["offloaded"]  # although the incoming CLIP was loaded
        assert 0 < result["error"] < bound
        assert result["same_as_file"] and result["same_file"]
        assert result["copied"] and result["leftovers"] == []
        sentences(result["verified"])
        assert result["incoming_unchanged"] and result["incoming_layers"] == 0
        assert result["saved"].startswith("clip/t5_t5xxl_")


def test_a_t5_is_calibrated_with_prompts(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "calibrated_text_encoder")
    assert found["layers"] == 24 * 7
    assert "168 linear layers, 96 distinct" in found["summary"]  # q, k, v share their input, and wi_0 with wi_1
    sentences(found["summary"], numbers=False)
    assert found["sensitive"] > 0.9 * found["layers"]
    steps = [("prompts", done, 48) for done in range(49)] + [
        ("probes", done, 2 * 24 * 7) for done in range(2 * 24 * 7 + 1)
    ]
    assert [tuple(event) for event in found["advanced"]] == steps
    assert found["finished"]["layers"] == 24 * 7 and found["finished"]["bytes"] > 0 and found["finished"]["seconds"] > 0
    assert found["unchanged"] and found["hooks"] == 0
    assert found["error"]["auto"] < 0.8 * found["error"]["nearest"]
