"""Decode sampled latents to images."""

import torch

__all__ = ["decode_images"]


def decode_images(model, latents: list[dict], vae=None) -> torch.Tensor:
    """Decode LATENTs to an IMAGE (n, height, width, 3), with the VAE or else with the latent format's RGB factors.

    Images whose size differs from that of the first are left out.
    """
    batches = [_decode(model, latent["samples"], vae) for latent in latents]
    return torch.cat([batch for batch in batches if batch.shape[1:] == batches[0].shape[1:]])


def _decode(model, samples, vae) -> torch.Tensor:
    if vae is not None:
        return vae.decode(samples).flatten(0, -4)
    latent_format = model.model.latent_format
    factors = getattr(latent_format, "latent_rgb_factors", None)
    if not isinstance(samples, torch.Tensor) or samples.ndim not in (4, 5) or factors is None:
        return torch.zeros(1, 64, 64, 3)
    x = model.model.process_latent_in(samples).float().cpu()
    x = x.movedim(1, -1).flatten(0, -4)  # (n, height, width, channels)
    bias = getattr(latent_format, "latent_rgb_factors_bias", None)
    rgb = x @ torch.tensor(factors) + (0 if bias is None else torch.tensor(bias))
    return ((rgb + 1) / 2).clamp(0, 1).repeat_interleave(8, 1).repeat_interleave(8, 2)
