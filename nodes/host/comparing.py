"""Run two MODELs or two CLIPs on the same inputs and compare their outputs."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import torch

import nodes

from ...quant_core.comparison import Comparison, ModelCost, cosine, lpips, psnr, snr, ssim
from ...quant_core.errors import QuantizationError
from ...quant_core.formats import READABLE
from .images import decode_images
from .model_facts import count_activations, device_capability, weight_bytes

__all__ = ["ModelComparison", "compare_clips", "compare_models"]

HOST_NODES: Any = nodes  # ComfyUI's nodes.py; a type checker finds the package of that name here

_CALLBACK = 2  # position of the callback among a sampler's arguments after the model


_DECODED = (
    "{formats}: decoded on this device, without quantized activations. It looks better here than on a card that multiplies it "
    "natively, also next to INT8, whose activations are quantized on every device."
)


class ModelComparison(NamedTuple):
    """Images (n, height, width, 3) of the reference and of the compared MODEL, in the order of the prompts, and the metrics."""

    reference: torch.Tensor
    compared: torch.Tensor
    comparison: Comparison


class _Run(NamedTuple):
    """One sampled prompt: the denoised latent and the time in s of each step, and the images."""

    denoised: list[torch.Tensor]
    seconds: list[float]
    images: torch.Tensor


def _observe_steps(model, on_step: Callable[[torch.Tensor, float], None]):
    """Clone a MODEL and pass the denoised latent of each step, float32 on the CPU, and the time in s of the step to ``on_step``."""

    def sample(executor, model_wrap, *arguments):
        callback, started = arguments[_CALLBACK], time.perf_counter()

        def step(index, denoised, *others):
            nonlocal started
            latent = denoised.detach().float().cpu()  # waits for the device
            on_step(latent, time.perf_counter() - started)
            if callback is not None:
                callback(index, denoised, *others)
            started = time.perf_counter()

        return executor(model_wrap, *arguments[:_CALLBACK], step, *arguments[_CALLBACK + 1 :])

    clone = model.clone()
    clone.add_wrapper(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, sample)
    return clone


def compare_models(
    reference, compared, conditioning: list[tuple[list, list]], latents: list[dict], *, seed: int, vae=None, **sampling
) -> ModelComparison:
    """Sample with both MODELs as KSampler does, from the same noise.

    Args:
        reference: MODEL in full precision.
        compared: quantized MODEL.
        conditioning: pairs of positive and negative, each sampled once, with consecutive seeds.
        latents: LATENTs, used in turn.
        vae: decodes the images; without it they are previews of the latents, and image metrics are left out.
        sampling: the other arguments of KSampler, by name.

    Raises:
        QuantizationError: the models sample latents of different shapes.
    """

    def sample(model) -> list[_Run]:
        steps, runs = [], []
        observed = _observe_steps(model, lambda *step: steps.append(step))
        for index, (positive, negative) in enumerate(conditioning):
            latent = latents[index % len(latents)]
            (sampled,) = HOST_NODES.common_ksampler(
                observed, seed + index, positive=positive, negative=negative, latent=latent, **sampling
            )
            denoised, seconds = map(list, zip(*steps, strict=True))
            runs.append(_Run(denoised, seconds, decode_images(model, [sampled], vae)))
            steps.clear()
        return runs

    reference_runs, compared_runs = sample(reference), sample(compared)
    steps, scores = [], []
    for expected, actual in zip(reference_runs, compared_runs, strict=True):
        latent_shapes = ([latent.shape for latent in run.denoised] for run in (expected, actual))
        if len({str(shapes) for shapes in latent_shapes}) > 1 or expected.images.shape != actual.images.shape:
            raise QuantizationError(
                "The two MODELs sample latents of different shapes; compare a model with one quantized from it."
            )
        steps.append([snr(*pair) for pair in zip(expected.denoised, actual.denoised, strict=True)])
        image_scores = _score_images(expected.images, actual.images) if vae is not None else {}
        scores.append({"latent SNR (dB)": steps[-1][-1], **image_scores})
    title = f"{len(conditioning)} prompts, {len(steps[0])} steps, seed {seed}"
    costs = _measure_cost(reference, reference_runs), _measure_cost(compared, compared_runs)
    comparison = Comparison(title, scores, steps, costs, _find_notes(compared))
    return ModelComparison(_join_images(reference_runs), _join_images(compared_runs), comparison)


def _join_images(runs: list[_Run]) -> torch.Tensor:
    """Concatenate the images of all runs that have the size of the first."""
    size = runs[0].images.shape[1:]
    return torch.cat([run.images for run in runs if run.images.shape[1:] == size])


def _measure_cost(model, runs: list[_Run]) -> ModelCost:
    """Costs of a MODEL on this device. The first step of a run also loads the model, so it counts only where it is the only one."""
    seconds = [time for run in runs for time in run.seconds[len(run.seconds) > 1 :]]
    counts = count_activations(model)
    quantized = sum(count for (_, quantized), count in counts.items() if quantized)
    return ModelCost(weight_bytes(model), statistics.median(seconds), quantized, counts.total())


def _find_notes(model) -> list[str]:
    """A note where this device decodes formats whose activations other cards quantize."""
    capability = device_capability()
    formats = {name for name, _ in count_activations(model) if name in READABLE}
    decoded = sorted(
        name for name in formats if READABLE[name].activations and capability < READABLE[name].native_since
    )
    return [_DECODED.format(formats=", ".join(decoded))] if decoded else []


def _score_images(reference: torch.Tensor, images: torch.Tensor) -> dict[str, float]:
    perceptual = lpips(reference, images)
    scores = {"PSNR (dB)": psnr(reference, images), "SSIM": ssim(reference, images)}
    return scores if perceptual is None else {**scores, "LPIPS": perceptual}


def compare_clips(reference, compared, prompts: list[str]) -> Comparison:
    """Encode ``prompts`` with both CLIPs and compare the conditioning.

    Raises:
        QuantizationError: the conditioning has different shapes.
    """
    bar, scores = comfy.utils.ProgressBar(len(prompts)), []
    for prompt in prompts:
        comfy.model_management.throw_exception_if_processing_interrupted()
        encoded = (HOST_NODES.CLIPTextEncode().encode(clip, prompt)[0] for clip in (reference, compared))
        expected, actual = (tensor.cpu() for ((tensor, _),) in encoded)
        if expected.shape != actual.shape:
            raise QuantizationError(
                "The two CLIPs encode conditioning of different shapes; compare a CLIP with one quantized from it."
            )
        scores.append({"SNR (dB)": snr(expected, actual), "cosine similarity": cosine(expected, actual)})
        bar.update(1)
    return Comparison(f"Conditioning of {len(prompts)} prompts", scores)
