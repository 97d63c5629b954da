"""Run two models, or two text encoders, on the same, and measure how far apart they are."""

from collections.abc import Callable

import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import torch

import nodes

from ...quant_core.comparison import Comparison, cosine, lpips, psnr, snr, ssim
from ...quant_core.errors import QuantizationError
from .calibrating import pictures

__all__ = ["compare_clips", "compare_models"]

_CALLBACK = 2  # among what a sampler is given after the model


def _following(model, on_step: Callable[[torch.Tensor], None]):
    """A clone of a MODEL whose samplers hand each step's prediction (the denoised latent) to ``on_step``."""

    def sample(executor, model_wrap, *given):
        callback = given[_CALLBACK]

        def step(index, denoised, *others):
            on_step(denoised.detach().float().cpu())
            if callback is not None:
                callback(index, denoised, *others)

        return executor(model_wrap, *given[:_CALLBACK], step, *given[_CALLBACK + 1 :])

    clone = model.clone()
    clone.add_wrapper(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, sample)
    return clone


def compare_models(
    reference, other, conditioning: list[tuple[list, list]], latents: list[dict], *, seed: int, vae=None, **sampling
) -> tuple[torch.Tensor, torch.Tensor, Comparison]:
    """Sample with both MODELs as KSampler does, from the same noise.

    Args:
        conditioning: pairs of positive and negative, each sampled once, with seeds counted up.
        latents: LATENTs, taken in turns.
        vae: for pictures; without it they have the latents' colours and are not measured.
        sampling: the other arguments of KSampler, by name.

    Returns:
        the pictures (pictures, height, width, 3) of either, those of one prompt after the other, and what was measured.
    """

    def runs(model) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        predictions, made = [], []
        following = _following(model, predictions.append)
        for index, (positive, negative) in enumerate(conditioning):
            latent = latents[index % len(latents)]
            (sampled,) = nodes.common_ksampler(
                following, seed + index, positive=positive, negative=negative, latent=latent, **sampling
            )
            made.append((predictions[:], pictures(model, [sampled], vae)))
            predictions.clear()
        return made

    full, ours = runs(reference), runs(other)
    steps, scores = [], []
    for (before, shown), (after, made) in zip(full, ours, strict=True):
        if [step.shape for step in before] != [step.shape for step in after] or shown.shape != made.shape:
            raise QuantizationError(
                "The two MODELs sample latents of different shapes; compare a model with one made from it."
            )
        steps.append([snr(*pair) for pair in zip(before, after, strict=True)])
        scores.append({"latent SNR (dB)": steps[-1][-1], **(_picture_scores(shown, made) if vae is not None else {})})
    title = f"{len(conditioning)} prompts, {len(steps[0])} steps, seed {seed}"
    return _joined(full), _joined(ours), Comparison(title, scores, steps)


def _joined(runs: list[tuple[list[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
    """The pictures of all runs that are as large as those of the first."""
    size = runs[0][1].shape[1:]
    return torch.cat([made for _, made in runs if made.shape[1:] == size])


def _picture_scores(shown: torch.Tensor, made: torch.Tensor) -> dict[str, float]:
    perceived = lpips(shown, made)
    measured = {"PSNR (dB)": psnr(shown, made), "SSIM": ssim(shown, made)}
    return measured if perceived is None else {**measured, "LPIPS": perceived}


def compare_clips(reference, other, prompts: list[str]) -> Comparison:
    """Encode ``prompts`` with both CLIPs and compare the conditioning."""
    bar, scores = comfy.utils.ProgressBar(len(prompts)), []
    for prompt in prompts:
        comfy.model_management.throw_exception_if_processing_interrupted()
        (full,), (ours,) = (nodes.CLIPTextEncode().encode(clip, prompt)[0] for clip in (reference, other))
        before, after = full[0].cpu(), ours[0].cpu()
        if before.shape != after.shape:
            raise QuantizationError(
                "The two CLIPs make conditioning of different shapes; compare a CLIP with one made from it."
            )
        scores.append({"SNR (dB)": snr(before, after), "cosine similarity": cosine(before, after)})
        bar.update(1)
    return Comparison(f"Conditioning of {len(prompts)} prompts", scores)
