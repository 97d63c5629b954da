"""Calls that Calibrate records, run again through small models of ComfyUI inside the host's process."""

import pytest

from learned_rounding.tests.nodes.probing import in_process

RUNS, STEPS = 4, 3  # two prompts, two images each
# Model → (prompts and images in one call, reason why a model without the patches is refused; a wrapper if none).
MODELS = {
    "unet": (2, "transformer_options → patches → attn1_patch → 0"),
    "flux": (4, "transformer_options → patches_replace → dit → ('double_block', 0)"),
    "flux2": (2, "transformer_options → patches_replace → dit → ('double_block', 0)"),
    "wan": (2, "transformer_options → wrappers → diffusion_model → None → 0"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_recorded_call_gives_the_same_output_bit_for_bit(host, tmp_path, kind, sentences):
    found = in_process(host, tmp_path, f"replay_{kind}")
    batch, refused = MODELS[kind]
    assert found["calls"] == [RUNS * STEPS, RUNS * STEPS, 5, 3, 0]  # probes of the sensitivity are not recorded
    assert found["equal"] == [True] * (2 * RUNS * STEPS)
    assert found["finite"] and found["varied"] == RUNS * STEPS and found["batch"] == [batch]
    assert found["validation"] == STEPS and found["positions"] == [0, 1 / 3, 2 / 3]
    assert found["continued"] and found["same calibration"] and found["hooks"] == 0
    assert refused in found["refused"]
    sentences(found["refused"], found["summary"], numbers=False)


def test_recorded_calls_of_a_text_encoder_give_the_same_output(host, tmp_path, sentences):
    if host.version == "0.3.75":
        pytest.skip("ComfyUI 0.3.75 recognises only T5 encoders of full width")
    found = in_process(host, tmp_path, "replay_encoder")
    assert found["part"] == "t5xxl" and found["equal"] == [True] * 6 and found["validation"] == 1
    sentences(found["summary"])


def test_files_of_recorded_calls_are_removed_with_the_calibration(host, tmp_path):
    found = in_process(host, tmp_path, "replay_released")
    assert found["during"] > 4 and found["after"] == 0
    assert "in files" in found["summary"] and "RAM" not in found["summary"]


def test_recorded_calls_are_saved_beside_a_calibration(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "replay_saved")
    names = ["[a]_00001_.calib.safetensors", "[a]_00002_.calib.safetensors"]
    assert found["files"] == sorted([*names, "[a]_00001_.calls.safetensors"]) and found["listed"] == names
    assert found["same"] and found["plain"] == 0 and found["reused name"] == [True, 0]
    assert found["existing calls"] is False and found["state"] and found["damaged"]
    sentences(found["text"], found["nothing to save"])
