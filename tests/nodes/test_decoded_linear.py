"""Decoding layers for formats that a host cannot run, inside the host's process."""

from learned_rounding.quant_core import FORMATS
from learned_rounding.tests.nodes.probing import in_process, stock_loads

# Relative error of the tiny model's prediction for random inputs; round to nearest.
BOUND = 0.2


def test_decoding_layers_support_loras_and_low_vram(host, tmp_path):
    found = in_process(host, tmp_path, "decoding")
    assert {name for name in FORMATS if not stock_loads(host, name)} <= set(found) | {"int8_tensorwise"}
    assert "asym_w4a8_int8 6 bits" in found or host.version not in ("0.3.75", "0.33.0")
    for name, result in found.items():
        format = name.partition(" ")[0]
        assert result["codes"][format] and all(result["codes"].values()), (name, result)
        assert result["codes"].keys() <= {format, "int8_tensorwise"}
        assert "decoded as they run: " in result["decoded"] and format in result["decoded"]
        assert 0 < result["error"] < BOUND and result["error with the LoRA"] < BOUND, (name, result)
        assert result["error with the LoRA"] < result["the LoRA moves by"], (name, result)
        assert result["little memory differs by"] < 1e-5, (name, result)
        assert result["unpatched"] and result["kept in float32"], (name, result)


def test_rotation_below_params_is_read_as_in_comfyui(host, tmp_path):
    """By ComfyUI's own layer where it supports the format, else by a decoding layer."""
    assert in_process(host, tmp_path, "nested_rotation")["error"] < 0.05
