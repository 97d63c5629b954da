"""Whole checkpoints, inside the host's process: text encoders are quantized if ComfyUI loads them quantized."""

from learned_rounding.quant_core import FORMATS
from learned_rounding.tests.nodes.probing import in_process

LAYERS = 24 * 7
# Relative error of the conditioning of a random model of width 64; unrelated conditionings have an error of √2.
BOUNDS = {"float8_e4m3fn": 1, "int8_tensorwise": 0.5, "int8_blockwise": 0.7}
PACKED = {"asym_w4a8_int8": 1.2, "nvfp4": 1.3}  # ComfyUI 0.3.75 cannot load them in the text encoder of a checkpoint
RUNNING = 0.2  # against the same weights dequantized beforehand


def test_t5_of_a_checkpoint_is_quantized_where_comfyui_supports_it(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "checkpoint_encoder")
    reads = (
        host.version != "0.3.75"
    )  # 0.3.75 loads no quantized layers there: the node leaves them unquantized, and inspect reports it
    bounds = BOUNDS | (PACKED if reads else {})
    assert found.keys() == bounds.keys()
    for format, result in found.items():
        assert result["in the file"] == LAYERS and result["of all"] and result["of the MODEL"]
        assert result["by the node"] is reads and bool(result["kept by the node"]) is not reads
        sentences(result["verified"], result["stock"])
        assert ("0.33" in result["stock"]) is bool(FORMATS[format].stock_since)
        assert result["in the CLIP"] == (LAYERS if reads else 0)
        assert (result["error"] < bounds[format] and result["error of running codes"] < RUNNING) is reads
