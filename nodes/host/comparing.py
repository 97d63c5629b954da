"""Run two MODELs or two CLIPs on the same inputs and compare their outputs."""

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import torch

import nodes

from ...quant_core.comparison import Comparison, cosine, lpips, psnr, snr, ssim
from ...quant_core.errors import QuantizationError
from .images import decode_images

__all__ = ["compare_clips", "compare_models"]

HOST_NODES: Any = nodes  # ComfyUI's nodes.py; a type checker finds the package of that name here

_CALLBACK = 2  # position of the callback among a sampler's arguments after the model


def _observe_steps(model, on_step: Callable[[torch.Tensor], None]):
    """Clone a MODEL and pass the denoised latent of each step, float32 on the CPU, to ``on_step``."""

    def sample(executor, model_wrap, *arguments):
        callback = arguments[_CALLBACK]

        def step(index, denoised, *others):
            on_step(denoised.detach().float().cpu())
            if callback is not None:
                callback(index, denoised, *others)

        return executor(model_wrap, *arguments[:_CALLBACK], step, *arguments[_CALLBACK + 1 :])

    clone = model.clone()
    clone.add_wrapper(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, sample)
    return clone


def compare_models(
    reference, compared, conditioning: list[tuple[list, list]], latents: list[dict], *, seed: int, vae=None, **sampling
) -> tuple[torch.Tensor, torch.Tensor, Comparison]:
    """Sample with both MODELs as KSampler does, from the same noise.

    Args:
        reference: MODEL in full precision.
        compared: quantized MODEL.
        conditioning: pairs of positive and negative, each sampled once, with consecutive seeds.
        latents: LATENTs, used in turn.
        vae: decodes the images; without it they are previews of the latents, and image metrics are left out.
        sampling: the other arguments of KSampler, by name.

    Returns:
        images (n, height, width, 3) of the reference and of the compared model, in the order of the prompts, and the
        metrics.

    Raises:
        QuantizationError: the models sample latents of different shapes.
    """

    def sample(model) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        denoised, runs = [], []
        observed = _observe_steps(model, denoised.append)
        for index, (positive, negative) in enumerate(conditioning):
            latent = latents[index % len(latents)]
            (sampled,) = HOST_NODES.common_ksampler(
                observed, seed + index, positive=positive, negative=negative, latent=latent, **sampling
            )
            runs.append((denoised[:], decode_images(model, [sampled], vae)))
            denoised.clear()
        return runs

    reference_runs, compared_runs = sample(reference), sample(compared)
    steps, scores = [], []
    for (expected, expected_images), (actual, images) in zip(reference_runs, compared_runs, strict=True):
        if [x.shape for x in expected] != [x.shape for x in actual] or expected_images.shape != images.shape:
            raise QuantizationError(
                "The two MODELs sample latents of different shapes; compare a model with one quantized from it."
            )
        steps.append([snr(*pair) for pair in zip(expected, actual, strict=True)])
        image_scores = _score_images(expected_images, images) if vae is not None else {}
        scores.append({"latent SNR (dB)": steps[-1][-1], **image_scores})
    title = f"{len(conditioning)} prompts, {len(steps[0])} steps, seed {seed}"
    return _join_images(reference_runs), _join_images(compared_runs), Comparison(title, scores, steps)


def _join_images(runs: list[tuple[list[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
    """Concatenate the images of all runs that have the size of the first."""
    size = runs[0][1].shape[1:]
    return torch.cat([images for _, images in runs if images.shape[1:] == size])


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
