"""Smoothed NVFP4 layers are computed as they are meant, by ComfyUI where it reads ``pre_quant_scale``, else by this pack."""

import pytest

from learned_rounding.tests.nodes.probing import in_process, stock_loads, takes_layouts


def test_smoothed_layers_run_in_comfyui_and_are_decoded_where_it_ignores_the_scale(host, tmp_path):
    if not stock_loads(host, "nvfp4"):
        pytest.skip("this ComfyUI has no NVFP4 layers")
    found = in_process(host, tmp_path, "smoothing_layers")
    assert found.pop("smoothed")
    assert {name: layer["decoded"] for name, layer in found.items()} == {"this ComfyUI": False, "an older one": True}
    assert all(layer["error"] < 1e-5 for layer in found.values())


def test_patches_of_smoothed_layers_apply_to_the_weight_before_smoothing(host, tmp_path):
    """ComfyUI alone adds a LoRA to the smoothed weight; a merged weight is quantized again, others are exact."""
    if not takes_layouts(host):
        pytest.skip(f"this pack decodes the smoothed layers of ComfyUI {host.version}, which get patches as they are")
    found = in_process(host, tmp_path, "smoothing_patches")
    ways = {"merged": 0.2, "saved": 0.2, "little memory": 1e-5, "dynamic VRAM": 1e-5}
    for kind, result in found.items():
        for way, bound in ways.items():
            assert (result.pop(way) < bound) is (kind == "ours"), (kind, way)
        assert all(result.values()), (kind, result)
