"""Smoothed NVFP4 layers are computed as they are meant, by ComfyUI where it reads ``pre_quant_scale``, else by this pack."""

import pytest

from learned_rounding.tests.nodes.probing import in_process, stock_loads


def test_smoothed_layers_run_in_comfyui_and_are_decoded_where_it_ignores_the_scale(host, tmp_path):
    if not stock_loads(host, "nvfp4"):
        pytest.skip("this ComfyUI has no NVFP4 layers")
    found = in_process(host, tmp_path, "smoothing_layers")
    assert found.pop("smoothed")
    assert {name: layer["decoded"] for name, layer in found.items()} == {"this ComfyUI": False, "an older one": True}
    assert all(layer["error"] < 1e-5 for layer in found.values())
