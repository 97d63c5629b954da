"""Metrics of two text encoders on the same prompts."""

import math

import pytest

from learned_rounding.quant_core import Recipe
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    from learned_rounding.nodes import host as pack
    from learned_rounding.tests.nodes.host.tiny_t5 import encode, load_t5, save_t5

pytestmark = pytest.mark.usefixtures("in_comfyui", "host_with_small_encoders")


def test_metrics_of_text_encoders_match_their_conditioning(tmp_path):
    clip = load_t5(save_t5(tmp_path))
    recipe = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest")
    ours = pack.build_clip(clip, pack.quantize(clip, recipe, lambda event: None))
    first, _ = pack.compare_clips(clip, ours, ["a red apple on a table", "an owl"]).scores
    before, after = encode(clip).double(), encode(ours).double()
    ratio = float(before.square().sum() / (after - before).square().sum())
    assert first["SNR (dB)"] == pytest.approx(10 * math.log10(ratio), abs=1e-6)
    assert 0 < first["SNR (dB)"] < 60
    assert 0.5 < first["cosine similarity"] < 1


def test_a_text_encoder_compared_with_itself_is_equal(tmp_path):
    clip = load_t5(save_t5(tmp_path))
    report = pack.compare_clips(clip, clip, ["an owl"]).markdown()
    assert report.split("| ")[8].strip(" |") == "equal"
