"""Sequential rounding of small models of ComfyUI inside the host's process."""

import pytest

from learned_rounding.tests.nodes.probing import in_process

# Model → its blocks; with skip connections, shared modulation, a ControlNet, reference latents and video latents.
BLOCKS = {
    "unet": [
        *(f"input_blocks.{block}.{part}" for block in (1, 3) for part in (0, 1)),
        *(f"middle_block.{part}" for part in range(3)),
        *(f"output_blocks.{block}.{part}" for block in range(4) for part in (0, 1)),
    ],
    "flux": ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"],
    "flux2": ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"],
    "wan": ["blocks.0", "blocks.1"],
}  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKS)
def test_each_stream_equals_the_model_run_whole(host, tmp_path, kind):
    found = in_process(host, tmp_path, f"sequential_walk_{kind}")
    assert found["blocks"] == BLOCKS[kind] and found["unfollowed"] is None
    assert found["equal"] == {"original": True, "quantized": True, "weights only": True}
    assert found["better"] and found["sequential"] and 0 < found["error"] < 1
    assert found["unchanged"] and found["forwards"] == 0 and found["threads"] == 0


@pytest.mark.parametrize("kind", BLOCKS)
def test_quantize_rounds_the_blocks_sequentially_and_leaves_the_model_as_it_was(host, tmp_path, kind):
    found = in_process(host, tmp_path, f"sequential_quantize_{kind}")
    assert found["layers"] and found["same layers"] and 0 < found["error"] < 0.2
    assert found["patched layer"] < 0.2
    assert "sequential" in found["notes"] and found["same bytes"] and found["unchanged"]
    assert sum(found["blocks"].values()) == len(BLOCKS[kind]) and set(found["blocks"]) <= {"calibrated", "sequential"}
    assert found["table"] and found["verified"] and found["summary"].startswith(found["verified"])


def test_calibrations_without_calls_and_compiled_models_are_refused(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "sequential_refuse")
    sentences(found["no calls"], found["compiled"])


def test_two_experts_are_calibrated_on_their_own_steps(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "sequential_experts")
    assert found["same latents"] == [True] * 4
    assert found["steps"] == [2, 2] and found["apart"]
    assert found["blocks"] == [2, 2] and all(0 < error < 1 for error in found["errors"])
    sentences(found["refused"])
