"""Run the original model as its user does, and learn what its linear layers are given."""

import contextlib
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Mapping

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

import nodes

from ...quant_core.calibration import SUFFIX, CalibrationFile, Collector, Sensitivity
from ...quant_core.display import human_bytes
from ...quant_core.events import CalibrationAdvanced, CalibrationFinished, Listener
from ...quant_core.recipes import make_plan
from ...quant_core.recipes.presets import NONE
from .calibrations import Calibrated
from .folders import temporary_folder
from .running import show
from .sources import PatchedWeights, encoder_parts, module_name, parts_of

__all__ = ["KEEP", "calibrate_clip", "calibrate_model", "pictures", "samplers", "schedulers"]


# How much of the Grams to keep, in the words of a Collector; None for in low rank, as far as its file stays small.
KEEP = {"full": {}, "compact": None, "with quantized inputs": {"quantized_inputs": True}}
_COMPACT_BYTES, _COMPACT_RANKS = 640 << 20, (32, 64, 128, 256)  # beside the held-out inputs
_RAM = 2 << 30  # for Grams where the model itself runs in main memory
_PROBES = (0.25, 0.75)  # where in a run sensitivities are measured
_RUNS_FOR_HOLDOUT = 4  # from so many on, every fourth is held out as a whole
samplers, schedulers = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS


def _linear_layers(patcher, parts: Mapping[str, PatchedWeights], path_of) -> dict[str, torch.nn.Module]:
    """Name in a calibration → linear layer, of all that some recipe could quantize."""
    layers = {}
    for part, weights in parts.items():
        for name in make_plan(weights, preset=NONE).names("quantize"):
            layer = name.removesuffix(".weight")
            module = patcher.model.get_submodule(path_of(part, layer))
            if isinstance(module, torch.nn.Linear):
                layers[f"{part}.{layer}" if len(parts) > 1 else layer] = module
    return layers


@contextlib.contextmanager
def _collecting(patcher, layers, keep: str, tokens: int, seed: int, earlier: Calibrated | None):
    """A :class:`Collector` with the memory that ComfyUI can spare; its files are gone afterwards."""
    device = patcher.load_device
    if device.type == "cpu":
        spare = min(comfy.model_management.get_total_memory(device) // 4, _RAM)
    else:  # half of what the model and its activations leave
        spare = (comfy.model_management.get_total_memory(device) - patcher.model_size() - (8 << 30)) // 2
    folder = temporary_folder() / f"learned_rounding_grams_{os.urandom(6).hex()}"
    folder.mkdir()
    options = {"device": device, "device_bytes": max(spare, 0), "tokens": tokens, "seed": seed}
    options |= {"rank": _compact_rank(layers)} if KEEP[keep] is None else KEEP[keep]
    try:
        with earlier.open() if earlier else contextlib.nullcontext() as known:
            with Collector(layers, folder, earlier=known, **options) as collector:
                places = {f"of {device}": collector.device_bytes, f"in {folder.parent}": collector.disk_bytes}
                needed = " and ".join(f"{human_bytes(size)} {place}" for place, size in places.items() if size)
                show(f"Calibrating {len(layers)} layers takes up to {needed}.")
                yield collector
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compact_rank(layers: Mapping[str, torch.nn.Module]) -> int:
    """The part of their directions that inputs can keep, in 16 bits, if no layers share one."""
    widths = [layer.weight.shape[1] for layer in layers.values()]
    fitting = (rank for rank in _COMPACT_RANKS if sum(2 * width * width // rank for width in widths) <= _COMPACT_BYTES)
    return next(fitting, _COMPACT_RANKS[-1])


def _finish(collector: Collector, provenance: dict, on_event: Listener, began: float) -> tuple[Calibrated, str]:
    path = temporary_folder() / f"learned_rounding_{os.urandom(6).hex()}{SUFFIX}"
    size = collector.save(path, provenance)
    with CalibrationFile(path) as made:
        calibrated, layers = Calibrated(path, made.mark), len(made.layers)
    lines = [
        f"{layers} linear layers, {collector.inputs} different inputs, {collector.tokens} tokens or more of each",
        f"{human_bytes(size)} in {provenance['keep']} form",
    ]
    if collector.sensitivity:
        most = sorted(collector.sensitivity, key=collector.sensitivity.get, reverse=True)[:3]
        lines.append(f"errors hurt most in {', '.join(most)}")
    if collector.kept < 1:
        lines.append(
            f"directions are known of at least {collector.kept:.0%} of each input's energy, of the rest the size only"
        )
    show("\n".join(lines))
    on_event(CalibrationFinished(layers, collector.tokens, size, time.perf_counter() - began))
    return calibrated, "\n".join(lines)


def _hash(*values) -> str:
    """A mark of prompts or conditioning, from which nobody can read them."""
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.float().cpu().numpy().tobytes()
        digest.update(value if isinstance(value, bytes) else str(value).encode())
    return digest.hexdigest()


def calibrate_model(
    model,
    conditioning: list[tuple[list, list]],
    latents: list[dict],
    *,
    seed: int,
    samples: int,
    keep: str,
    tokens: int,
    on_event: Listener,
    sensitivity: bool = False,
    earlier: Calibrated | None = None,
    **sampling,
) -> tuple[Calibrated, list, str]:
    """Sample with a MODEL as KSampler does and learn what its linear layers are given.

    Args:
        conditioning: pairs of positive and negative; each is sampled ``samples`` times, with seeds counted up.
        latents: LATENTs, taken in turns.
        keep: key of :data:`KEEP`.
        tokens: looked at in each call of the model.
        on_event: told of each step.
        sensitivity: also measure, in one more run, what errors of each layer do to the model's output.
        earlier: a calibration to continue.
        sampling: the other arguments of KSampler, by name.

    Returns:
        the calibration, the sampled LATENTs, and a summary.
    """
    weights = parts_of(model)[1]
    layers = _linear_layers(model, weights, lambda part, layer: f"diffusion_model.{layer}")
    runs = [(*pair, latents[index % len(latents)]) for index, pair in enumerate(conditioning) for _ in range(samples)]
    apart = len(runs) >= _RUNS_FOR_HOLDOUT
    sampled, began = [], time.perf_counter()
    steps = _Count(on_event, len(layers), "steps", len(runs) * sampling["steps"])
    with _collecting(model, layers, keep, tokens, seed, earlier) as collector:
        for index, (positive, negative, latent) in enumerate(runs):
            hold_out = index % _RUNS_FOR_HOLDOUT == _RUNS_FOR_HOLDOUT - 1 if apart else None
            with collector.watching(model.model.diffusion_model, hold_out):
                (result,) = nodes.common_ksampler(
                    _stepping(model, steps, index, len(runs)),
                    seed + index,
                    positive=positive,
                    negative=negative,
                    latent=latent,
                    **sampling,
                )
            sampled.append(result)
        if sensitivity:
            probes = _Count(on_event, len(layers), "probes", len(layers) * len(_PROBES))
            probing = _Probing(model, layers, weights, collector.calls // len(runs), probes)
            positive, negative, latent = runs[0]
            nodes.common_ksampler(probing.model, seed, positive=positive, negative=negative, latent=latent, **sampling)
            collector.sensitivity = probing.sensitivity.found
        provenance = {
            "kind": "diffusion model",
            "class": type(model.model).__name__,
            "prompts": [_hash(*(entry[0] for entry in positive)) for positive, _ in conditioning],
            "runs": len(runs),
            "seed": seed,
            "tokens per call": tokens,
            "keep": keep,
            **sampling,
        }
        calibrated, summary = _finish(collector, provenance, on_event, began)
        return calibrated, sampled, summary


class _Count:
    """Tells how far the work of one unit is, from its start on."""

    def __init__(self, on_event: Listener, layers: int, unit: str, total: int):
        self._emit, self._layers, self._unit = on_event, layers, unit
        self._began = time.perf_counter()
        self._done = 0
        self.reach(0, total)

    def reach(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        elapsed = time.perf_counter() - self._began
        self._emit(CalibrationAdvanced(self._layers, self._unit, done, total, elapsed))

    def advance(self) -> None:
        self.reach(self._done + 1, self._total)


def _stepping(model, steps: _Count, run: int, runs: int):
    """A clone of a MODEL whose sampler tells of each step; ``run`` of ``runs`` counts from 0."""

    def sample(executor, inner, sigmas, extra, callback, *others):
        def step(index, denoised, x, total):
            steps.reach(run * total + index + 1, runs * total)
            if callback is not None:
                callback(index, denoised, x, total)

        return executor(inner, sigmas, extra, step, *others)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "learned_rounding", sample)
    return model


def _sensitivity(
    layers: Mapping[str, torch.nn.Module], weights: Mapping[str, PatchedWeights], device, probes: _Count
) -> Sensitivity:
    """For the layers of :func:`_linear_layers`, whose weights are read as the model applies them."""
    bar = comfy.utils.ProgressBar(len(layers) * len(_PROBES))

    def read(name: str) -> torch.Tensor:
        part = next((part for part in weights if len(weights) > 1 and name.startswith(f"{part}.")), None)
        source = next(iter(weights.values())) if part is None else weights[part]
        bar.update(1)
        probes.advance()
        return source.read(f"{name if part is None else name.removeprefix(f'{part}.')}.weight", device)

    return Sensitivity(layers, read, comfy.model_management.throw_exception_if_processing_interrupted)


class _Probing:
    """A clone of a MODEL whose sampling measures sensitivities in some of the ``calls`` of a run."""

    def __init__(self, model, layers, weights, calls: int, probes: _Count):
        self.sensitivity = _sensitivity(layers, weights, model.load_device, probes)
        self.model = model.clone()
        self._inner = model.model_options.get("model_function_wrapper")
        self.model.set_model_unet_function_wrapper(self)
        self._places = {int(share * calls) for share in _PROBES}
        self._seen = 0

    def __call__(self, apply_model, given: dict) -> torch.Tensor:
        def run() -> torch.Tensor:
            if self._inner is not None:
                return self._inner(apply_model, given)
            return apply_model(given["input"], given["timestep"], **given["c"])

        if self._seen in self._places:
            self.sensitivity.probe(run)
        self._seen += 1
        return run()


def calibrate_clip(
    clip,
    prompts: list[str],
    *,
    keep: str,
    tokens: int,
    seed: int,
    on_event: Listener,
    sensitivity: bool = False,
    earlier: Calibrated | None = None,
) -> tuple[Calibrated, str]:
    """Encode ``prompts`` and learn what the linear layers of a CLIP are given; returns the calibration and a summary."""
    began = time.perf_counter()
    parts = encoder_parts(clip)
    model = clip.cond_stage_model
    layers = _linear_layers(clip.patcher, parts, lambda part, layer: module_name(model, part, layer))
    with _collecting(clip.patcher, layers, keep, tokens, seed, earlier) as collector:
        bar = comfy.utils.ProgressBar(len(prompts))
        encoded = _Count(on_event, len(layers), "prompts", len(prompts))
        apart = len(prompts) >= _RUNS_FOR_HOLDOUT
        for index, prompt in enumerate(prompts):
            comfy.model_management.throw_exception_if_processing_interrupted()
            hold_out = index % _RUNS_FOR_HOLDOUT == _RUNS_FOR_HOLDOUT - 1 if apart else None
            with collector.watching(model.get_submodule(next(iter(parts))), hold_out):
                nodes.CLIPTextEncode().encode(clip, prompt)
            bar.update(1)
            encoded.advance()
        if sensitivity:
            probed = prompts[: len(_PROBES)]
            probes = _Count(on_event, len(layers), "probes", len(layers) * len(probed))
            probing = _sensitivity(layers, parts, clip.patcher.load_device, probes)
            for prompt in probed:
                probing.probe(functools.partial(clip.encode_from_tokens, clip.tokenize(prompt)))
            collector.sensitivity = probing.found
        provenance = {
            "kind": "text encoder",
            "class": type(model).__name__,
            "prompts": [_hash(prompt) for prompt in prompts],
            "seed": seed,
            "tokens per call": tokens,
            "keep": keep,
        }
        return _finish(collector, provenance, on_event, began)


def pictures(model, latents: list[dict], vae=None) -> torch.Tensor:
    """What was sampled as an IMAGE (pictures, height, width, 3): decoded, or in the latents' own colours without a VAE."""
    frames = [_frames(model, latent["samples"], vae) for latent in latents]
    same = [frame for frame in frames if frame.shape[1:] == frames[0].shape[1:]]
    return torch.cat(same)


def _frames(model, samples, vae) -> torch.Tensor:
    if vae is not None:
        return vae.decode(samples).flatten(0, -4)
    factors = getattr(model.model.latent_format, "latent_rgb_factors", None)
    if not isinstance(samples, torch.Tensor) or samples.ndim not in (4, 5) or factors is None:
        return torch.zeros(1, 64, 64, 3)
    x = model.model.process_latent_in(samples).float().cpu()
    x = x.movedim(1, -1).flatten(0, -4)  # (pictures, height, width, channels)
    bias = getattr(model.model.latent_format, "latent_rgb_factors_bias", None)
    colours = x @ torch.tensor(factors) + (0 if bias is None else torch.tensor(bias))
    small = ((colours + 1) / 2).clamp(0, 1)
    return small.repeat_interleave(8, 1).repeat_interleave(8, 2)
