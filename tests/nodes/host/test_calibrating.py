"""Calibration of text encoders."""

import pytest
import torch

from learned_rounding.quant_core import Recipe
from learned_rounding.tests.in_comfyui import IN_COMFYUI, ON_CPU

if IN_COMFYUI:
    from learned_rounding.nodes import host as pack
    from learned_rounding.tests.nodes.host.tiny_model import distance
    from learned_rounding.tests.nodes.host.tiny_t5 import LAYERS, PROMPTS, encode, load_t5, save_t5

pytestmark = pytest.mark.usefixtures("in_comfyui", "host_with_small_encoders")


def test_a_t5_is_calibrated_with_prompts(tmp_path, sentences):
    """Its quantizations with and without the calibration are compared on another prompt."""
    clip, events = load_t5(save_t5(tmp_path)), []
    before = encode(clip)
    options = {"keep": "compact", "tokens": 512, "seed": 0, "sensitivity": True, "on_event": events.append}
    calibration, summary = pack.calibrate_clip(clip, PROMPTS, **options)
    assert "168 linear layers, 96 distinct" in summary  # q, k, v share their input, and wi_0 with wi_1
    sentences(summary, numbers=False)
    with calibration.open() as known:
        assert len(known.layers) == LAYERS
        assert sum(value > 0 for value in known.sensitivities.values()) > 0.9 * LAYERS
    *advanced, finished = events
    prompts, probes = len(PROMPTS), 2 * LAYERS
    assert [(event.unit, event.done, event.total) for event in advanced] == [
        *(("prompts", done, prompts) for done in range(prompts + 1)),
        *(("probes", done, probes) for done in range(probes + 1)),
    ]
    assert finished.layers == LAYERS
    assert finished.bytes > 0
    assert finished.seconds > 0
    assert torch.equal(encode(clip), before)
    assert sum(len(module._forward_pre_hooks) for module in clip.cond_stage_model.modules()) == 0

    def error(rounding, calibration=None) -> float:
        keep = (r"\.wo\.",)  # 10,240 inputs take minutes
        recipe = Recipe(format="int8_tensorwise", convrot=False, rounding=rounding, keep=keep)
        quantized = pack.quantize(clip, recipe, lambda event: None, calibration)
        return distance(encode(pack.build_clip(clip, quantized)), before)

    # A card quantizes the activations too, which weighs more than the rounding where a T5 is not rotated.
    assert error("auto", calibration) < (0.8 if ON_CPU else 1.1) * error("nearest")
