"""Run a MODEL or CLIP in full precision and collect statistics of the input activations of its linear layers."""

import contextlib
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import comfy.model_management
import comfy.ops
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

import nodes

from ...quant_core.calibration import SUFFIX, CalibrationFile, Collector, SensitivityAnalysis
from ...quant_core.display import human_bytes
from ...quant_core.errors import RecipeError
from ...quant_core.events import CalibrationAdvanced, CalibrationFinished, Listener
from ...quant_core.recipes import make_plan
from ...quant_core.recipes.presets import NONE
from .calibrations import Calibrated
from .folders import temporary_folder
from .recording import CallRecording, describe_calls, estimate_call
from .running import show_text
from .sources import PatchedWeights, encoder_parts, find_module, model_weights

__all__ = ["KEEP", "calibrate_clip", "calibrate_model", "linear_layers", "samplers", "schedulers"]

HOST_NODES: Any = nodes  # ComfyUI's nodes.py; a type checker finds the package of that name here

# Form of the Hessians → arguments of Collector; None: low rank, with a rank that limits the size of the file.
KEEP = {"full": {}, "compact": None, "with quantized inputs": {"quantized_activations": True}}
_COMPACT_BYTES, _COMPACT_RANKS = 640 << 20, (32, 64, 128, 256)  # without the validation activations
_RAM_BYTES = 2 << 30  # for Hessians where the model runs on the CPU
_ACTIVATION_BYTES = 8 << 30  # of device memory left for the activations of the model
_PROBES = (0.25, 0.75)  # positions in a run, as fractions of its calls, where sensitivity is measured
_VALIDATION_PERIOD = 4  # with at least four runs, every fourth one is for validation only
samplers, schedulers = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS


def _is_validation(run: int, runs: int) -> bool | None:
    """``validation`` of :meth:`Collector.watching` for one of ``runs`` runs; None splits the tokens of each run."""
    if runs < _VALIDATION_PERIOD:
        return None
    return run % _VALIDATION_PERIOD == _VALIDATION_PERIOD - 1


def linear_layers(
    patcher, parts: Mapping[str, PatchedWeights], module_path: Callable[[str, str], str]
) -> dict[str, torch.nn.Module]:
    """Name in the calibration → linear layer or bank of experts, for all layers that a recipe can quantize."""
    layers = {}
    for part, weights in parts.items():
        for name in make_plan(weights, preset=NONE).names("quantize"):
            layer = name.removesuffix(".weight")
            module = patcher.model.get_submodule(module_path(part, layer))
            if _takes_activations(module):
                layers[f"{part}.{layer}" if len(parts) > 1 else layer] = module
    return layers


def _takes_activations(module: torch.nn.Module) -> bool:
    """Whether it is a linear layer, or a bank of experts, of any of ComfyUI's operations; embeddings are not."""
    if isinstance(module, torch.nn.Linear):
        return True
    return isinstance(module, comfy.ops.CastWeightBiasOp) and hasattr(module, "in_features")


@contextlib.contextmanager
def _open_collector(
    patcher,
    layers: Mapping[str, torch.nn.Module],
    *,
    keep: str,
    tokens: int,
    seed: int,
    max_vram_gb: float,
    earlier: Calibrated | None,
    note: str,
) -> Iterator[Collector]:
    """Open a :class:`Collector` that uses the memory ComfyUI can spare; its files are removed at the end.

    ``note``: text that is shown after the description of that memory.
    """
    device = patcher.load_device
    folder = temporary_folder() / f"learned_rounding_hessians_{os.urandom(6).hex()}"
    folder.mkdir()
    device_bytes = int(max_vram_gb * 1e9) or _spare_bytes(patcher)
    options = {"device": device, "device_bytes": device_bytes, "tokens": tokens, "seed": seed}
    options |= {"rank": _compact_rank(layers)} if KEEP[keep] is None else KEEP[keep]
    try:
        with (
            earlier.open() if earlier else contextlib.nullcontext() as file,
            Collector(layers, folder, earlier=file, **options) as collector,
        ):
            show_text(f"Calibrating {len(layers)} layers, {_describe_memory(collector)}.{note}")
            yield collector
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _spare_bytes(patcher) -> int:
    """Memory for Hessians where no limit is given: half of what is free beside the model and its activations."""
    device = patcher.load_device
    total = comfy.model_management.get_total_memory(device)
    if device.type == "cpu":
        return min(total // 4, _RAM_BYTES)
    free = comfy.model_management.get_free_memory(device) + patcher.loaded_size()
    return max(min(total, free) - patcher.model_size() - _ACTIVATION_BYTES, 0) // 2


def _describe_memory(collector: Collector) -> str:
    """Where the Hessians are, and what they take at most."""
    sizes = {"of device memory": collector.device_bytes, "in ComfyUI's temp folder": collector.disk_bytes}
    return "up to " + " and ".join(f"{human_bytes(size)} {place}" for place, size in sizes.items() if size)


def _compact_rank(layers: Mapping[str, torch.nn.Module]) -> int:
    """Return the smallest divisor of :class:`Collector` whose 16-bit factors fit the limit if no layers share activations."""
    widths = [cast(torch.Tensor, layer.weight).shape[-1] for layer in layers.values()]
    fitting = (rank for rank in _COMPACT_RANKS if sum(2 * width * width // rank for width in widths) <= _COMPACT_BYTES)
    return next(fitting, _COMPACT_RANKS[-1])


def _save(
    collector: Collector,
    provenance: dict,
    recording: CallRecording,
    earlier: Calibrated | None,
    on_event: Listener,
    began: float,
) -> tuple[Calibrated, str]:
    """Save the statistics to a temporary file; returns it with the recorded calls, and a summary."""
    path = temporary_folder() / f"learned_rounding_{os.urandom(6).hex()}{SUFFIX}"
    replays = recording.results() or (earlier.replays if earlier else {})
    size = collector.save(path, provenance, comfy.model_management.throw_exception_if_processing_interrupted)
    with CalibrationFile(path) as file:
        calibration, layers = Calibrated(path, file.fingerprint, replays=replays), len(file.layers)
    lines = [
        f"{layers} linear layers, {collector.distinct_activations} distinct input activations, at least "
        f"{collector.tokens} tokens each",
        f"{human_bytes(size)}, keep: {provenance['keep']}",
        f"Hessians took {_describe_memory(collector)}",
    ]
    if sensitivities := collector.sensitivities:
        highest = sorted(sensitivities, key=lambda layer: sensitivities[layer], reverse=True)[:3]
        lines.append(f"most sensitive layers: {', '.join(highest)}")
    if replays:
        lines.append(describe_calls(replays, recording.limited))
    if collector.captured_energy < 1:
        lines.append(f"low rank: at least {100 * collector.captured_energy:.0f} % of the activations' energy captured")
    show_text("\n".join(lines))
    on_event(CalibrationFinished(layers, collector.tokens, size, time.perf_counter() - began))
    return calibration, "\n".join(lines)


def _hash_values(*values) -> str:
    """Hash prompts or conditioning, so that a calibration file identifies but does not contain them."""
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.float().cpu().numpy().tobytes()
        digest.update(value if isinstance(value, bytes) else str(value).encode())
    return digest.hexdigest()


def _sampling_range(start: int, end: int, steps: int) -> dict[str, object]:
    """Arguments of ``common_ksampler`` for some of the steps, as KSamplerAdvanced passes them; none for all steps."""
    if start == 0 and end == steps:
        return {}
    return {"disable_noise": start > 0, "start_step": start, "last_step": end, "force_full_denoise": False}


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
    max_vram_gb: float = 0.0,
    replay_calls: int = 0,
    start_at_step: int = 0,
    end_at_step: int = 10000,
    **sampling,
) -> tuple[Calibrated, list, str]:
    """Sample with a MODEL as KSampler does and collect statistics of the input activations of its linear layers.

    Args:
        conditioning: pairs of positive and negative; each is sampled ``samples`` times, with consecutive seeds.
        latents: LATENTs, used in turn.
        keep: key of :data:`KEEP`.
        tokens: number of tokens sampled per call of the model.
        on_event: receives the progress.
        sensitivity: also measure the sensitivity of each layer, in one additional run.
        earlier: calibration to continue.
        max_vram_gb: GB of device memory that complete Hessians may take, the others are in files; 0 for half of what is free.
        replay_calls: number of calls of the model to record; without it those of ``earlier`` are kept.
        start_at_step: first step, as for KSamplerAdvanced; the latents of the runs, in their order, then contain noise.
        end_at_step: step before which sampling stops, which leaves noise; after the last one by default.
        sampling: the other arguments of KSampler, by name.

    Returns:
        the calibration, the sampled LATENTs of the runs, and a summary.

    Raises:
        RecipeError: no step is left.
    """
    end_at_step = min(sampling["steps"], end_at_step)
    if start_at_step >= end_at_step:
        raise RecipeError(
            f"start_at_step {start_at_step} leaves no step before step {end_at_step}; choose a smaller one."
        )
    part = _sampling_range(start_at_step, end_at_step, sampling["steps"])
    weights = {"": model_weights(model)}
    layers = linear_layers(model, weights, lambda part, layer: f"diffusion_model.{layer}")
    pairs = [(index, *pair) for index, pair in enumerate(conditioning) for _ in range(samples)]
    runs = [
        (positive, negative, latents[(run if start_at_step else index) % len(latents)])
        for run, (index, positive, negative) in enumerate(pairs)
    ]
    sampled, began = [], time.perf_counter()
    progress = _Progress(on_event, len(layers), "steps", len(runs) * (end_at_step - start_at_step))
    diffusion_model = model.model.diffusion_model
    recording = CallRecording({"": diffusion_model}, replay_calls, seed)
    options = {"keep": keep, "tokens": tokens, "seed": seed, "max_vram_gb": max_vram_gb, "earlier": earlier}
    options["note"] = recording.describe_limit(estimate_call(conditioning, latents))
    with _open_collector(model, layers, **options) as collector:
        for index, (positive, negative, latent) in enumerate(runs):
            validation = _is_validation(index, len(runs))
            with collector.watching(diffusion_model, validation), recording.watching(validation):
                (result,) = HOST_NODES.common_ksampler(
                    _report_steps(model, progress, index, len(runs)),
                    seed + index,
                    positive=positive,
                    negative=negative,
                    latent=latent,
                    **sampling,
                    **part,
                )
            sampled.append(result)
        if sensitivity:
            progress = _Progress(on_event, len(layers), "probes", len(layers) * len(_PROBES))
            wrapper = _SensitivityWrapper(model, layers, weights, collector.calls // len(runs), progress)
            positive, negative, latent = runs[0]
            HOST_NODES.common_ksampler(
                wrapper.model, seed, positive=positive, negative=negative, latent=latent, **sampling, **part
            )
            collector.sensitivities = wrapper.analysis.sensitivities
            collector.step_sensitivities = wrapper.analysis.step_sensitivities
        provenance = {
            "kind": "diffusion model",
            "class": type(model.model).__name__,
            "prompts": [_hash_values(*(entry[0] for entry in positive)) for positive, _ in conditioning],
            "runs": len(runs),
            "seed": seed,
            "tokens per call": tokens,
            "keep": keep,
            **sampling,
            **({"first step": start_at_step, "steps used": end_at_step - start_at_step} if part else {}),
        }
        calibration, summary = _save(collector, provenance, recording, earlier, on_event, began)
        return calibration, sampled, summary


class _Progress:
    """Emit :class:`CalibrationAdvanced` events for one unit of work, the first one with 0 done."""

    def __init__(self, on_event: Listener, layers: int, unit: str, total: int):
        self._emit, self._layers, self._unit = on_event, layers, unit
        self._began = time.perf_counter()
        self.update(0, total)

    def update(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        elapsed = time.perf_counter() - self._began
        self._emit(CalibrationAdvanced(self._layers, self._unit, done, total, elapsed))

    def advance(self) -> None:
        self.update(self._done + 1, self._total)


def _report_steps(model, progress: _Progress, run: int, runs: int):
    """Clone a MODEL and report each step of its sampler; ``run`` of ``runs`` counts from 0."""

    def sample(executor, inner, sigmas, extra, callback, *others):
        def step(index, denoised, x, total):
            progress.update(run * total + index + 1, runs * total)
            if callback is not None:
                callback(index, denoised, x, total)

        return executor(inner, sigmas, extra, step, *others)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "learned_rounding", sample)
    return model


def _make_analysis(
    layers: Mapping[str, torch.nn.Module], weights: Mapping[str, PatchedWeights], device, progress: _Progress
) -> SensitivityAnalysis:
    """Make the analysis of the layers of :func:`linear_layers`; weights are read with the patches of the model."""
    bar = comfy.utils.ProgressBar(len(layers) * len(_PROBES))

    def read(name: str) -> torch.Tensor:
        part = next((part for part in weights if len(weights) > 1 and name.startswith(f"{part}.")), None)
        source = next(iter(weights.values())) if part is None else weights[part]
        bar.update(1)
        progress.advance()
        return source.read(f"{name if part is None else name.removeprefix(f'{part}.')}.weight", device)

    return SensitivityAnalysis(layers, read, comfy.model_management.throw_exception_if_processing_interrupted)


class _SensitivityWrapper:
    """Model function wrapper of a cloned MODEL that measures sensitivities in some of the ``calls`` of one run."""

    def __init__(self, model, layers, weights, calls: int, progress: _Progress):
        self.analysis = _make_analysis(layers, weights, model.load_device, progress)
        self.model = model.clone()
        self._wrapped = model.model_options.get("model_function_wrapper")
        self.model.set_model_unet_function_wrapper(self)
        self._probed_calls = {int(position * calls): position for position in _PROBES}
        self._calls = 0

    def __call__(self, apply_model, arguments: dict) -> torch.Tensor:
        def run() -> torch.Tensor:
            if self._wrapped is not None:
                return self._wrapped(apply_model, arguments)
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        if self._calls in self._probed_calls:
            self.analysis.probe(run, self._probed_calls[self._calls])
        self._calls += 1
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
    max_vram_gb: float = 0.0,
    replay_calls: int = 0,
) -> tuple[Calibrated, str]:
    """Encode ``prompts`` with a CLIP and collect statistics; returns the calibration and a summary.

    Args: as for :func:`calibrate_model`.
    """
    began = time.perf_counter()
    parts = encoder_parts(clip)
    model = clip.cond_stage_model
    layers = linear_layers(clip.patcher, parts, lambda part, layer: find_module(model, part, layer))
    recording = CallRecording({part: model.get_submodule(part) for part in parts}, replay_calls, seed)
    options = {"keep": keep, "tokens": tokens, "seed": seed, "max_vram_gb": max_vram_gb, "earlier": earlier}
    options["note"] = recording.describe_limit()
    with _open_collector(clip.patcher, layers, **options) as collector:
        bar = comfy.utils.ProgressBar(len(prompts))
        progress = _Progress(on_event, len(layers), "prompts", len(prompts))
        for index, prompt in enumerate(prompts):
            comfy.model_management.throw_exception_if_processing_interrupted()
            validation = _is_validation(index, len(prompts))
            with collector.watching(model.get_submodule(next(iter(parts))), validation), recording.watching(validation):
                HOST_NODES.CLIPTextEncode().encode(clip, prompt)
            bar.update(1)
            progress.advance()
        if sensitivity:
            probed = prompts[: len(_PROBES)]
            matrices = {name: layer for name, layer in layers.items() if layer.weight.ndim == 2}  # banks have no output
            progress = _Progress(on_event, len(matrices), "probes", len(matrices) * len(probed))
            analysis = _make_analysis(matrices, parts, clip.patcher.load_device, progress)
            for prompt in probed:
                analysis.probe(functools.partial(clip.encode_from_tokens, clip.tokenize(prompt)))
            collector.sensitivities = analysis.sensitivities
        provenance = {
            "kind": "text encoder",
            "class": type(model).__name__,
            "prompts": [_hash_values(prompt) for prompt in prompts],
            "seed": seed,
            "tokens per call": tokens,
            "keep": keep,
        }
        return _save(collector, provenance, recording, earlier, on_event, began)
