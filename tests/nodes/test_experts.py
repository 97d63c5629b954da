"""Banks of experts (GPT-OSS) in ComfyUI: what this pack writes is what ComfyUI's ``MoEExperts`` computes with."""

import pytest

from learned_rounding.tests.nodes.probing import in_process

# Format → largest relative error of the output of a bank with unquantized activations, of random weights.
WEIGHTS = {
    "float8_e4m3fn": 0.03,
    "float8_e5m2": 0.06,
    "int8_tensorwise": 0.015,
    "mxfp8": 0.03,
    "nvfp4": 0.1,
    "convrot_w4a4": 0.15,
}
# Recipe → format of the banks and largest relative error of the conditioning.
BANKS = {
    "float8_e4m3fn": ("float8_e4m3fn", 0.15),
    "float8_e5m2": ("float8_e5m2", 0.3),
    "int8_tensorwise": ("int8_tensorwise", 0.06),
    "int8_tensorwise per tensor": ("int8_tensorwise", 0.12),
    "int8_tensorwise rotated": ("int8_tensorwise", 0.06),
    "mxfp8": ("mxfp8", 0.2),
    "nvfp4": ("nvfp4", 0.6),
    "convrot_w4a4": ("convrot_w4a4", 0.8),
    "asym_w4a8_int8": ("int8_tensorwise", 0.4),
}


@pytest.fixture(autouse=True)
def _has_banks(host):
    if "class MoEExperts" not in (host.path / "comfy" / "ops.py").read_text():
        pytest.skip("this ComfyUI has no banks of experts")


def test_comfyui_computes_with_the_banks_that_are_in_the_file(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "experts_banks")
    assert found.keys() == BANKS.keys()
    for recipe, (format, bound) in BANKS.items():
        result = found[recipe]
        assert len(result["banks"]) == 4
        for layer, bank in result["banks"].items():
            # 80 input channels are not a multiple of 64
            fallback = format == "convrot_w4a4" and "down" in layer
            assert bank["format"] == ("int8_tensorwise" if fallback else format)
            assert bank["weights"] < 1e-6 and bank["output"] < WEIGHTS[bank["format"]]
        assert 0 < result["error"] < bound
        assert result["saved otherwise"] == []
        sentences([*result["notes"], result["verified"]])


def test_comfyui_loses_what_these_banks_need(host, tmp_path):
    """Why they are not written; a release that reads them fails here."""
    found = in_process(host, tmp_path, "experts_unread")
    assert found["rotated"] > 0.5 and "ValueError" in found["asym"]


def test_experts_are_calibrated_with_the_tokens_that_reach_them(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "experts_calibrated")
    shapes = {"gate_up_proj": [160, 64], "down_proj": [64, 80]}
    banks = {f"layers.{block}.mlp.experts.{name}": shape for block in range(2) for name, shape in shapes.items()}
    assert len(found["layers"]) == 12 and found["layers"].items() >= banks.items()
    assert len(found["sensitive"]) == 8 and not banks.keys() & set(found["sensitive"])
    assert found["unchanged"] and not found["hidden"]
    (nearest, _), (calibrated, notes) = found["nearest"], found["calibrated"]
    assert calibrated < 0.8 * nearest
    sentences(notes)
