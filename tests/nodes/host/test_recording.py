"""Calls that a calibration records, run again through small models of ComfyUI."""

import gc
from pathlib import Path
from unittest import mock

import pytest
import torch

from learned_rounding.quant_core.errors import CalibrationError, OutputError, SourceError
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    import comfy.model_management
    import folder_paths

    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.host import recording
    from learned_rounding.tests.nodes.host.small_models import (
        MODELS,
        SAMPLING,
        add_patches,
        make_conditioning,
        make_extra_conditioning,
        make_model,
    )
    from learned_rounding.tests.nodes.host.tiny_model import DEVICE
    from learned_rounding.tests.nodes.host.tiny_t5 import PROMPTS, load_t5, save_t5

pytestmark = pytest.mark.usefixtures("in_comfyui")

RUNS, STEPS = 4, 3  # two prompts, two images each
CALLS = RUNS * STEPS
# Model → (prompts and images in one call, reason why a model without the patches is refused; a wrapper if none).
KINDS = {
    "unet": (2, "transformer_options → patches → attn1_patch → 0"),
    "flux": (4, "transformer_options → patches_replace → dit → ('double_block', 0)"),
    "flux2": (2, "transformer_options → patches_replace → dit → ('double_block', 0)"),
    "wan": (2, "transformer_options → wrappers → diffusion_model → None → 0"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_call_gives_the_same_output_bit_for_bit(kind, sentences):
    """With a ControlNet or extra conditioning, and with patches."""
    plain = make_model(kind)
    model = add_patches(plain, kind)
    extra = make_extra_conditioning(kind)
    pairs = [(make_conditioning(kind, seed, **extra), make_conditioning(kind, 5, **extra)) for seed in (1, 2)]
    latents = [{"samples": torch.zeros(MODELS[kind][2])}]
    options = {"seed": 3, "samples": 2, "keep": "compact", "tokens": 64, "on_event": lambda event: None, **SAMPLING}
    diffusion_model, outputs = model.model.diffusion_model, []
    handle = diffusion_model.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    calibration, *_, summary = pack.calibrate_model(model, pairs, latents, replay_calls=100, **options)
    handle.remove()
    assert len(outputs) == CALLS
    assert len({float(output.double().sum()) for output in outputs}) == CALLS
    assert all(bool(output.isfinite().all()) for output in outputs)

    replays, live = calibration.replays[""], recording.live_arguments(model)
    assert len(replays) == CALLS
    comfy.model_management.load_models_gpu([model])
    for _ in range(2):  # a call changes nothing
        for index, output in enumerate(outputs):
            args, kwargs = replays.arguments(index, DEVICE, live)
            assert torch.equal(diffusion_model(*args, **kwargs), output), f"call {index}"
    batch, reason = KINDS[kind]
    assert {len(replays.arguments(index, DEVICE, live)[0][0]) for index in range(CALLS)} == {batch}
    assert sum(replays.validation) == STEPS
    assert sorted(set(replays.positions)) == [0, 1 / 3, 2 / 3]
    with pytest.raises(CalibrationError) as refused:
        replays.arguments(0, DEVICE, recording.live_arguments(plain))
    assert reason in str(refused.value)
    sentences(refused, summary.splitlines()[-2], numbers=False)

    def calibrate(**more):
        return pack.calibrate_model(model, pairs[:1], latents, **options, **more)[0]

    assert len(calibrate(replay_calls=5, sensitivity=True).replays[""]) == 5  # its probes are not recorded
    assert calibrate(earlier=calibration).replays is calibration.replays
    assert len(calibrate(earlier=calibration, replay_calls=3).replays[""]) == 3
    without = calibrate()
    assert len(without.replays) == 0
    assert without.fingerprint == calibrate(replay_calls=4).fingerprint
    assert sum(len(module._forward_pre_hooks) for module in model.model.modules()) == 0


def test_recorded_calls_of_a_text_encoder_give_the_same_output(host_with_small_encoders, tmp_path, sentences):
    clip, outputs = load_t5(save_t5(tmp_path)), []
    part = clip.cond_stage_model.t5xxl
    handle = part.register_forward_hook(lambda module, args, output: outputs.append(output[0].clone()))
    options = {"keep": "compact", "tokens": 64, "seed": 0, "on_event": lambda event: None}
    calibration, summary = pack.calibrate_clip(clip, PROMPTS[:6], replay_calls=10, **options)
    handle.remove()
    comfy.model_management.load_models_gpu([clip.patcher])
    ((name, replays),) = calibration.replays.items()
    assert name == "t5xxl"
    assert len(replays) == len(outputs) == 6
    for index, output in enumerate(outputs):
        args, kwargs = replays.arguments(index, DEVICE)
        assert torch.equal(part(*args, **kwargs)[0], output), f"call {index}"
    assert sum(replays.validation) == 1
    sentences(summary.splitlines()[-2])


def calibrate_unet(model, replay_calls: int = 0, seed: int = 3):
    """The calibration of one image, and its summary."""
    pairs = [(make_conditioning("unet", 1), make_conditioning("unet", 2))]
    options = {"samples": 1, "keep": "compact", "tokens": 64, "on_event": lambda event: None, **SAMPLING}
    latents = [{"samples": torch.zeros(1, 4, 16, 16)}]
    calibration, _, summary = pack.calibrate_model(
        model, pairs, latents, replay_calls=replay_calls, seed=seed, **options
    )
    return calibration, summary


def test_files_of_recorded_calls_are_removed_with_the_calibration():
    """Calls that memory has no room for."""
    with mock.patch.object(recording, "_RAM_BYTES", 0):
        calibration, summary = calibrate_unet(add_patches(make_model("unet"), "unet"), replay_calls=2)
    temp = Path(folder_paths.get_temp_directory())
    assert len(list(temp.glob("learned_rounding_calls*"))) > 4
    assert "in files" in summary.splitlines()[-2]
    assert "RAM" not in summary.splitlines()[-2]
    del calibration
    gc.collect()
    assert list(temp.iterdir()) == []


@pytest.fixture
def saved():
    """A calibration, its file saved with the recorded calls, and one saved without."""
    calibration, _ = calibrate_unet(make_model("unet"), replay_calls=2)
    path = pack.save_calibration(calibration, "[a]", save_calls=True)
    return calibration, path, pack.save_calibration(calibration, "[a]")


def test_recorded_calls_are_saved_beside_a_calibration(saved, sentences):
    calibration, path, plain = saved
    names = ["[a]_00001_.calib.safetensors", "[a]_00002_.calib.safetensors"]
    assert [path.name, plain.name] == names
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([*names, "[a]_00001_.calls.safetensors"])
    assert pack.calibration_files() == names
    loaded, text = pack.load_calibration(path.name)
    assert loaded.replays[""].fingerprint == calibration.replays[""].fingerprint
    assert len(pack.load_calibration(plain.name)[0].replays) == 0
    without, _ = calibrate_unet(make_model("unet"), seed=4)
    with pytest.raises(CalibrationError) as refused:
        pack.save_calibration(without, "none", save_calls=True)
    sentences(text.splitlines()[-1], refused)


def test_calls_of_a_removed_calibration_are_not_those_of_a_new_one_of_the_same_name(saved):
    calibration, path, plain = saved
    path.unlink()
    without, _ = calibrate_unet(make_model("unet"), seed=4)
    assert pack.save_calibration(without, "[a]") == path
    assert len(pack.load_calibration(path.name)[0].replays) == 0
    path.unlink()
    other = type(calibration)(plain, "other", False, calibration.replays)
    with pytest.raises(OutputError):
        pack.save_calibration(other, "[a]", save_calls=True)  # the file of the calls exists
    assert not path.exists()


def test_changed_calls_change_the_state_and_damaged_ones_are_refused_by_name(saved):
    _, path, plain = saved
    calls, state = path.with_name("[a]_00001_.calls.safetensors"), pack.calibration_state(path.name)
    path.write_bytes(plain.read_bytes())
    assert pack.calibration_state(path.name) != state
    calls.write_bytes(calls.read_bytes()[:-5])
    with pytest.raises(SourceError, match=r"\[a\]_00001_\.calls\.safetensors"):
        pack.load_calibration(path.name)
