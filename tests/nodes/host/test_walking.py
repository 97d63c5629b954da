"""Sequential rounding of small models of ComfyUI."""

import contextlib
import threading

import pytest
import torch

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.errors import QuantizationError
from learned_rounding.quant_core.events import BlockFinished
from learned_rounding.quant_core.formats import QuantizedWeight
from learned_rounding.quant_core.layer import Layer
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.rounding import RoundingConfig
from learned_rounding.quant_core.sequential import ModelWalk, PendingLayer
from learned_rounding.quant_core.sequential.calls import replaced_forward
from learned_rounding.quant_core.sequential.streams import Stream
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    import nodes  # ComfyUI's
    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.host.sources import model_weights
    from learned_rounding.nodes.host.walking import open_replayed_model
    from learned_rounding.tests.nodes.host.small_models import (
        MODELS,
        SAMPLING,
        add_patches,
        make_conditioning,
        make_extra_conditioning,
        make_model,
        normal,
    )

pytestmark = pytest.mark.usefixtures("in_comfyui")

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
# Model → a layer that gets a patch as of a LoRA.
PATCHED = {
    "unet": "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q",
    "flux": "diffusion_model.double_blocks.0.img_attn.qkv",
    "flux2": "diffusion_model.double_blocks.0.img_attn.qkv",
    "wan": "diffusion_model.blocks.0.self_attn.q",
}


def make_recipe(rounding: str = "sequential") -> Recipe:
    return Recipe("asym_w4a8_int8", rounding=rounding, preset="none")


def calibrate(model, kind: str):
    """Calibration with recorded calls of a ControlNet or extra conditioning."""
    extra = make_extra_conditioning(kind)
    pairs = [(make_conditioning(kind, seed, **extra), make_conditioning(kind, 5, **extra)) for seed in (1, 2)]
    options = {"seed": 3, "samples": 2, "keep": "full", "tokens": 256, "on_event": lambda event: None, **SAMPLING}
    latents = [{"samples": torch.zeros(MODELS[kind][2])}]
    return pack.calibrate_model(model, pairs, latents, replay_calls=8, **options)[0]


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def changed_tensors(before: dict, after: dict) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def outputs(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def pend(module) -> PendingLayer:
    """A layer rounded to nearest, as the layer-wise result."""
    weight, bias = module.weight.detach(), module.bias
    layer = Layer(weight, None if bias is None else bias.detach())
    nearest = quantize_layer(layer, make_recipe().format.codecs(weight.shape[1]), RoundingConfig("nearest"))
    assert isinstance(nearest, QuantizedWeight)
    return PendingLayer(layer, nearest, RoundingConfig("calibrated"), 0)


def run_with(replayed, linears: dict, indices) -> dict[int, list[torch.Tensor]]:
    """Outputs of recorded calls of the whole model with some layers replaced."""
    with contextlib.ExitStack() as replaced:
        for name, linear in linears.items():
            replaced.enter_context(replaced_forward(replayed.layers[name], linear))
        return {index: outputs(replayed.run(index)) for index in indices}


@pytest.mark.parametrize("kind", BLOCKS)
def test_each_stream_equals_the_model_run_whole(kind):
    model = add_patches(make_model(kind), kind)
    calibration = calibrate(model, kind)
    before, events, linears = state_of(model), [], {}
    with open_replayed_model(model, "", model_weights(model), calibration) as replayed:
        replayed = type(replayed)(**{**vars(replayed), "device_bytes": 0, "ram_bytes": 4 << 20})
        whole = {Stream.ORIGINAL: run_with(replayed, {}, range(len(replayed.validation)))}
        options = {"rounding": make_recipe().rounding, "capability": None, "weights_only": True, "seed": 0}
        with ModelWalk(replayed, list(replayed.layers), **options, emit=events.append, check=lambda: None) as walk:
            for block in walk.blocks:
                pending = {name: pend(replayed.layers[name]) for name in block.layers}
                rounded = walk.round_block(pending)
                linears |= {name: pending[name].linear(made, None) for name, made in rounded.items()}
            errors = walk.model_errors()
            carried = {stream: walk._streams.results(stream) for stream in walk._streams.carried}
            validation = walk._streams.validation
        whole[Stream.QUANTIZED] = run_with(replayed, linears, validation)
        weights_only = {name: linear.without_activations() for name, linear in linears.items()}
        whole[Stream.WEIGHTS_ONLY] = run_with(replayed, weights_only, validation)
    for stream, expected in whole.items():
        for index, found in carried[stream].items():
            for a, b in zip(found, expected[index], strict=True):
                assert torch.equal(a, b), (stream, index)
    finished = [event for event in events if isinstance(event, BlockFinished)]
    assert [event.name for event in finished] == BLOCKS[kind]
    assert [event.name for event in finished if event.error > event.calibrated_error] == []
    assert sum(event.kept == "sequential" for event in finished) > 0
    assert 0 < errors.quantized < 1
    assert walk.unfollowed is None
    assert changed_tensors(before, state_of(model)) == []
    assert sum("forward" in vars(module) for module in model.model.modules()) == 0
    assert sum(thread.name == "learned-rounding-call" for thread in threading.enumerate()) == 0


@pytest.mark.parametrize("kind", BLOCKS)
def test_quantize_rounds_the_blocks_sequentially_and_leaves_the_model_as_it_was(kind):
    """With a patch of one layer, against calibrated rounding."""
    model = add_patches(make_model(kind), kind)
    weight = model.model.get_submodule(PATCHED[kind]).weight
    difference = normal(*weight.shape, seed=77) * weight.std()  # rounding without it would leave an error of about 1
    model.add_patches({f"{PATCHED[kind]}.weight": ("diff", (difference,))})
    calibration, before = calibrate(model, kind), state_of(model)

    def quantize(model, rounding: str):
        return pack.quantize(model, make_recipe(rounding), lambda event: None, calibration, general=True)

    calibrated, made = quantize(model, "calibrated"), quantize(model, "sequential")
    report, summary = made.report, str(made.report.sequential)
    assert sorted(layer.name for layer in report.layers) == sorted(layer.name for layer in calibrated.report.layers)
    assert "sequential" in {layer.note.partition(";")[0] for layer in report.layers}
    assert 0 < report.sequential.output_error < 0.2
    (patched,) = (layer for layer in report.layers if PATCHED[kind].endswith(layer.name.removesuffix(".weight")))
    assert patched.output_error < 0.2
    assert sum(report.sequential.blocks.values()) == len(BLOCKS[kind])
    assert set(report.sequential.blocks) <= {"calibrated", "sequential"}
    assert summary in report.table()
    assert summary in report.markdown()
    verified = verify_file(made.files[""]).model_run
    assert verified
    assert summary.startswith(verified)

    clone = model.clone()
    clone.patches_uuid = object()  # the node takes it for another model
    assert quantize(clone, "sequential").files[""].read_bytes() == made.files[""].read_bytes()
    assert changed_tensors(before, state_of(model)) == []


def test_calibration_without_calls_and_compiled_models_are_refused(sentences):
    model = make_model("unet")
    calibration = calibrate(model, "unet")
    without_calls = type(calibration)(calibration.path, calibration.fingerprint, temporary=False)
    compiled = model.clone()
    compiled.add_wrapper_with_key(
        "apply_model", "torch.compile", lambda executor, *args, **kwargs: executor(*args, **kwargs)
    )
    for source, given in ((model, without_calls), (compiled, calibration)):
        with sentences.raises(QuantizationError):
            pack.quantize(source, make_recipe(), lambda event: None, given, general=True)


def test_two_experts_are_calibrated_on_their_own_steps(sentences):
    """Two models of which one samples the first steps and the other the last ones, as those of WAN 2.2."""
    high, low = make_model("wan"), make_model("wan")
    for parameter in low.model.diffusion_model.parameters():
        parameter.mul_(0.5)
    shape = MODELS["wan"][2]
    pairs = [(make_conditioning("wan", seed), make_conditioning("wan", 5)) for seed in (1, 2)]
    options = {"seed": 3, "samples": 2, "keep": "full", "tokens": 64, "on_event": lambda event: None}
    options |= {"replay_calls": 16}
    sampling = SAMPLING | {"steps": 4}
    empty = {"samples": torch.zeros(shape)}
    first, latents, _ = pack.calibrate_model(high, pairs, [empty], end_at_step=2, **options, **sampling)
    second, sampled, _ = pack.calibrate_model(low, pairs, latents, start_at_step=2, **options, **sampling)
    for run, found in enumerate(sampled):
        positive, negative = pairs[run // 2]
        given = {"positive": positive, "negative": negative, **sampling, "force_full_denoise": False}
        (noisy,) = nodes.common_ksampler(high, 3 + run, latent=empty, start_step=0, last_step=2, **given)
        steps = {"start_step": 2, "last_step": 4, "disable_noise": True}
        (expected,) = nodes.common_ksampler(low, 3 + run, latent=noisy, **steps, **given)
        assert torch.equal(found["samples"], expected["samples"]), f"image {run}"
    assert len(sampled) == 4
    times = []
    for calibration in (first, second):
        replays = calibration.replays[""]
        calls = [replays.arguments(index, torch.device("cpu"), {})[0] for index in range(len(replays))]
        times.append({float(args[1][0]) for args in calls})
    assert [len(found) for found in times] == [2, 2]
    assert min(times[0]) > max(times[1])
    for model, calibration in ((high, first), (low, second)):
        report = pack.quantize(model, make_recipe(), lambda event: None, calibration, general=True).report
        assert sum(report.sequential.blocks.values()) == 2
        assert 0 < report.sequential.output_error < 1
    with sentences.raises(QuantizationError):
        pack.calibrate_model(low, pairs, latents, start_at_step=4, **options, **sampling)
