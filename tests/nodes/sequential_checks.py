"""Checks of in_process.py: sequential rounding of small models of ComfyUI."""

import contextlib
import threading

import torch
from pack.nodes import host
from pack.nodes.host.sources import model_weights
from pack.nodes.host.walking import open_replayed_model
from pack.quant_core import Recipe
from pack.quant_core.errors import QuantizationError
from pack.quant_core.events import BlockFinished
from pack.quant_core.formats import QuantizedWeight
from pack.quant_core.layer import Layer
from pack.quant_core.output import verify_file
from pack.quant_core.quantize_layer import quantize_layer
from pack.quant_core.rounding import RoundingConfig
from pack.quant_core.sequential import ModelWalk, PendingLayer
from pack.quant_core.sequential.calls import replaced_forward
from pack.quant_core.sequential.streams import Stream
from replay_checks import DEVICE, MODELS, SAMPLING, Hints, add_patches, make_conditioning, make_model, normal

import nodes

# Model → a layer that gets a patch as of a LoRA.
PATCHED = {
    "unet": "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q",
    "flux": "diffusion_model.double_blocks.0.img_attn.qkv",
    "flux2": "diffusion_model.double_blocks.0.img_attn.qkv",
    "wan": "diffusion_model.blocks.0.self_attn.q",
}
RECIPE = Recipe("asym_w4a8_int8", rounding="sequential", preset="none")


def calibrate(model, kind: str):
    """Calibration with recorded calls of a ControlNet or extra conditioning."""
    *_, shape = MODELS[kind]
    hints = {"unet": {"control": Hints((32, 16, 16), "output")}, "flux": {"control": Hints((24, 128), "input")}}
    extra = {"reference_latents": [normal(1, 128, 4, 4, seed=9).to(DEVICE)]} if kind == "flux2" else hints.get(kind, {})
    pairs = [(make_conditioning(kind, seed, **extra), make_conditioning(kind, 5, **extra)) for seed in (1, 2)]
    options = {"seed": 3, "samples": 2, "keep": "full", "tokens": 256, "on_event": lambda event: None, **SAMPLING}
    calibration, *_ = host.calibrate_model(model, pairs, [{"samples": torch.zeros(shape)}], replay_calls=8, **options)
    return calibration


def experts() -> dict:
    """Two models of which one samples the first steps and the other the last ones, as those of WAN 2.2."""
    high, low = make_model("wan"), make_model("wan")
    for parameter in low.model.diffusion_model.parameters():
        parameter.mul_(0.5)
    *_, shape = MODELS["wan"]
    pairs = [(make_conditioning("wan", seed), make_conditioning("wan", 5)) for seed in (1, 2)]
    options = {
        "seed": 3,
        "samples": 2,
        "keep": "full",
        "tokens": 64,
        "on_event": lambda event: None,
        "replay_calls": 16,
    }
    sampling = SAMPLING | {"steps": 4}
    first, latents, _ = host.calibrate_model(
        high, pairs, [{"samples": torch.zeros(shape)}], end_at_step=2, **options, **sampling
    )
    second, sampled, _summary = host.calibrate_model(low, pairs, latents, start_at_step=2, **options, **sampling)
    expected = []
    for run in range(4):
        positive, negative = pairs[run // 2]
        given = {"positive": positive, "negative": negative, **sampling, "force_full_denoise": False}
        empty = {"samples": torch.zeros(shape)}
        (noisy,) = nodes.common_ksampler(high, 3 + run, latent=empty, start_step=0, last_step=2, **given)
        steps = {"start_step": 2, "last_step": 4, "disable_noise": True}
        expected += nodes.common_ksampler(low, 3 + run, latent=noisy, **steps, **given)
    times = []
    for calibration in (first, second):
        replays = calibration.replays[""]
        calls = [replays.arguments(index, DEVICE, {})[0] for index in range(len(replays))]
        times.append({float(args[1][0]) for args in calls})
    made = [
        host.quantize(model, RECIPE, lambda event: None, calibration, general=True)
        for model, calibration in ((high, first), (low, second))
    ]
    try:
        host.calibrate_model(low, pairs, latents, start_at_step=4, **options, **sampling)
        refused = ""
    except QuantizationError as error:
        refused = str(error)
    return {
        "same latents": [torch.equal(a["samples"], b["samples"]) for a, b in zip(sampled, expected, strict=True)],
        "steps": [len(found) for found in times],
        "apart": min(times[0]) > max(times[1]),
        "blocks": [sum(each.report.sequential.blocks.values()) for each in made],
        "errors": [each.report.sequential.output_error for each in made],
        "refused": refused,
    }


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def outputs(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def walk(kind: str) -> dict:
    """Each stream against the model run whole, and what is left of the walk."""
    model = add_patches(make_model(kind), kind)
    calibration = calibrate(model, kind)
    before = state_of(model)
    blocks, results, linears = [], {}, {}
    with open_replayed_model(model, "", model_weights(model), calibration) as replayed:
        replayed = type(replayed)(**{**vars(replayed), "device_bytes": 0, "ram_bytes": 4 << 20})
        exact = {index: outputs(replayed.run(index)) for index in range(len(replayed.validation))}
        options = {"rounding": RECIPE.rounding, "capability": None, "weights_only": True, "seed": 0}
        with ModelWalk(replayed, list(replayed.layers), **options, emit=blocks.append, check=lambda: None) as followed:
            for block in followed.blocks:
                pending = {name: pend(replayed.layers[name], name) for name in block.layers}
                results = followed.round_block(pending)
                linears |= {name: pending[name].linear(made, None) for name, made in results.items()}
            streams, errors = followed._streams, followed.model_errors()
            carried = {stream: streams.results(stream) for stream in streams.carried}
        with contextlib.ExitStack() as replaced:
            for name, linear in linears.items():
                replaced.enter_context(replaced_forward(replayed.layers[name], linear))
            quantized = {index: outputs(replayed.run(index)) for index in streams.validation}
        with contextlib.ExitStack() as replaced:
            for name, linear in linears.items():
                replaced.enter_context(replaced_forward(replayed.layers[name], linear.without_activations()))
            weights_only = {index: outputs(replayed.run(index)) for index in streams.validation}
    whole = {Stream.ORIGINAL: exact, Stream.QUANTIZED: quantized, Stream.WEIGHTS_ONLY: weights_only}
    finished = [event for event in blocks if isinstance(event, BlockFinished)]
    after = state_of(model)
    return {
        "blocks": [event.name for event in finished],
        "better": all(event.error <= event.calibrated_error for event in finished),
        "sequential": sum(event.kept == "sequential" for event in finished),
        "equal": {
            stream.value: all(
                torch.equal(a, b)
                for index, found in carried[stream].items()
                for a, b in zip(found, whole[stream][index], strict=True)
            )
            for stream in whole
        },
        "error": errors.quantized,
        "unfollowed": followed.unfollowed,
        "unchanged": before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before),
        "forwards": sum("forward" in vars(module) for module in model.model.modules()),
        "threads": sum(thread.name == "learned-rounding-call" for thread in threading.enumerate()),
    }


def pend(module, name: str) -> PendingLayer:
    """A layer rounded to nearest, as the layer-wise result."""
    weight, bias = module.weight.detach(), module.bias
    layer = Layer(weight, None if bias is None else bias.detach())
    nearest = quantize_layer(layer, RECIPE.format.codecs(weight.shape[1]), RoundingConfig("nearest"))
    assert isinstance(nearest, QuantizedWeight)
    return PendingLayer(layer, nearest, RoundingConfig("calibrated"), 0)


def quantize(kind: str) -> dict:
    """Learned Round Quantize with sequential rounding, against calibrated."""
    model = add_patches(make_model(kind), kind)
    weight = model.model.get_submodule(PATCHED[kind]).weight
    difference = normal(*weight.shape, seed=77) * weight.std()  # rounding without it would leave an error of about 1
    model.add_patches({f"{PATCHED[kind]}.weight": ("diff", (difference,))})
    calibration = calibrate(model, kind)
    events, before = [], state_of(model)
    recipes = {name: Recipe("asym_w4a8_int8", rounding=name, preset="none") for name in ("calibrated", "sequential")}
    made = {
        name: host.quantize(model, recipe, events.append, calibration, general=True) for name, recipe in recipes.items()
    }
    again = host.quantize(make_copy(model), recipes["sequential"], events.append, calibration, general=True)
    after, report = state_of(model), made["sequential"].report
    return {
        "layers": len(report.layers),
        "same layers": sorted(layer.name for layer in report.layers)
        == sorted(layer.name for layer in made["calibrated"].report.layers),
        "summary": str(report.sequential),
        "blocks": report.sequential.blocks,
        "table": str(report.sequential) in report.table() and str(report.sequential) in report.markdown(),
        "verified": verify_file(made["sequential"].files[""]).model_run,
        "error": report.sequential.output_error,
        "patched layer": next(each.output_error for each in report.layers if PATCHED[kind].endswith(each.name[:-7])),
        "notes": sorted({layer.note.partition(";")[0] for layer in report.layers}),
        "same bytes": made["sequential"].files[""].read_bytes() == again.files[""].read_bytes(),
        "unchanged": all(torch.equal(before[name], after[name]) for name in before),
    }


def make_copy(model):
    """A clone that the node takes for another model."""
    clone = model.clone()
    clone.patches_uuid = object()
    return clone


def refuse() -> dict[str, str]:
    """Sentences of what cannot be followed."""
    model = make_model("unet")
    found = {}
    calibration = calibrate(model, "unet")
    bare = type(calibration)(calibration.path, calibration.fingerprint, temporary=False)
    cases = {"no calls": (model, bare), "compiled": (compiled(model), calibration)}
    for name, (source, given) in cases.items():
        try:
            host.quantize(source, RECIPE, lambda event: None, given, general=True)
        except QuantizationError as error:
            found[name] = str(error)
    return found


def compiled(model):
    clone = model.clone()
    clone.add_wrapper_with_key(
        "apply_model", "torch.compile", lambda executor, *args, **kwargs: executor(*args, **kwargs)
    )
    return clone


CHECKS = {
    **{f"sequential_walk_{kind}": lambda kind=kind: walk(kind) for kind in MODELS},
    **{f"sequential_quantize_{kind}": lambda kind=kind: quantize(kind) for kind in MODELS},
    "sequential_experts": experts,
    "sequential_refuse": refuse,
}
