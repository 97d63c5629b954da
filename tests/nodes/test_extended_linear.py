"""The short forward pass of ComfyUI's quantized linear layers: the same results, and only where nothing is to be prepared."""

import pytest

from learned_rounding.tests.nodes.probing import in_process, stock_loads


def test_short_forward_pass_gives_the_results_of_comfyui(host, tmp_path):
    if not stock_loads(host, "int8_tensorwise"):
        pytest.skip(f"ComfyUI {host.version} has no quantized layers of its own")
    found = in_process(host, tmp_path, "forward_short")
    assert found.pop("resident") == {"equal": True, "pins": [0, 0, 0, 0]}
    ready = found.pop("ready")
    assert ready.pop("plain") and not any(ready.values()), ready
    fp8 = found.pop("fp8")
    assert fp8["taken"][0] in (0, fp8["layers"]), fp8  # ComfyUI dequantizes FP8 on a GPU without FP8 tensor cores
    assert max(fp8["distances"]) < 0.02, fp8
    for name, result in found.items():
        alone, patched, little = result["taken"]
        assert alone == result["layers"] > 30, (name, result)
        assert patched == alone, (name, result)  # the LoRA is in the weights, which are quantized again
        assert little < alone, (name, result)
        assert max(result["distances"]) < 1e-3, (name, result)
