"""Similarity metrics of two outputs, and a report of them as Markdown tables."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .display import human_bytes, markdown_table, three_digits

__all__ = ["Comparison", "ModelCost", "cosine", "format_value", "lpips", "psnr", "snr", "ssim"]

# Gaussian window and constants of Wang et al., "Image Quality Assessment", 2004, section III.C, for a data range of 1.
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_LPIPS_WEIGHTS = "alexnet-*.pth"


def _to_decibels(ratio: float) -> float:
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def snr(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the signal-to-noise ratio ‖reference‖²/‖other − reference‖² in dB: ∞ if equal, −∞ if one contains NaN or Inf."""
    reference = reference.double()
    noise = float((other.to(reference) - reference).square().sum())
    return math.inf if noise == 0 else _to_decibels(float(reference.square().sum()) / noise)


def cosine(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean cosine similarity of the vectors along the last dimension."""
    return float(torch.nn.functional.cosine_similarity(reference.double(), other.to(reference).double(), dim=-1).mean())


def psnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of images in 0…1: ∞ if equal, −∞ if one contains NaN or Inf."""
    error = float((reference.double() - other.to(reference).double()).square().mean())
    return math.inf if error == 0 else _to_decibels(1 / error)


def ssim(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean structural similarity (SSIM) of images (n, height, width, channels) in 0…1.

    Wang et al. 2004: Gaussian window of 11×11 pixels, σ = 1.5, per channel, without padding. NaN for images smaller than
    the window.
    """
    a, b = (images.double().movedim(-1, 1).flatten(0, 1).unsqueeze(1) for images in (reference, other.to(reference)))
    if min(a.shape[-2:]) < _WINDOW:
        return math.nan
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=a.device) - _WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    window = window / window.sum()

    def mean(x: torch.Tensor) -> torch.Tensor:
        horizontal = torch.nn.functional.conv2d(x, window.view(1, 1, 1, -1))
        return torch.nn.functional.conv2d(horizontal, window.view(1, 1, -1, 1))

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a.square(), mean(b * b) - mean_b.square()
    covariance = mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a.square() + mean_b.square() + _C1)
    return float((luminance * (2 * covariance + _C2) / (variance_a + variance_b + _C2)).mean())


def lpips(reference: torch.Tensor, other: torch.Tensor) -> float | None:
    """Return the mean LPIPS (AlexNet) of images as for :func:`ssim`, 0 if equal; None without lpips or its weights.

    Nothing is downloaded: the weights of torchvision's AlexNet must already be in the folder of torch.hub.
    """
    if not any(Path(torch.hub.get_dir(), "checkpoints").glob(_LPIPS_WEIGHTS)):
        return None
    try:
        from lpips import LPIPS  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    a, b = (images.float().cpu().movedim(-1, 1) * 2 - 1 for images in (reference, other))  # LPIPS takes −1…1
    with torch.no_grad():
        return float(LPIPS(net="alex", verbose=False)(a, b).mean())


def format_value(value: float, name: str = "dB") -> str:
    """A score: dB with one decimal, a similarity near 1 with four, others with 3 significant digits."""
    if math.isinf(value):
        return "equal" if value > 0 else "-inf"
    if "dB" in name and not math.isnan(value):
        return f"{value:.1f}"
    return f"{value:.4f}" if 0.9 <= value <= 1 else three_digits(value)


def _format_scores(scores: Mapping[str, float]) -> list[str]:
    return [format_value(value, name) for name, value in scores.items()]


def _mean(values: Sequence[float]) -> float:
    """Average the values below ∞ (equal outputs): ∞ if there are none, and NaN or −∞ if one of them is."""
    different = [value for value in values if value != math.inf]
    undefined = [value for value in different if not math.isfinite(value)]
    return undefined[0] if undefined else statistics.fmean(different) if different else math.inf


@dataclass(frozen=True)
class ModelCost:
    """What a model costs on this device, and how it computes there.

    Attributes:
        weight_bytes: of the weights in memory.
        step_seconds: median time of a sampling step in s.
        quantized_activations: layers of quantized weights whose activations are quantized too.
        quantized_layers: layers of quantized weights.
    """

    weight_bytes: int
    step_seconds: float
    quantized_activations: int
    quantized_layers: int

    @property
    def activations(self) -> str:
        """How many layers quantize their activations, for users."""
        if not self.quantized_activations:
            return "not quantized"
        return f"quantized in {self.quantized_activations} of {self.quantized_layers} quantized layers"


@dataclass
class Comparison:
    """Metrics of two models, per prompt.

    Attributes:
        title: title of the report, one line.
        scores: metric → value, for each prompt.
        steps: SNR in dB of the denoised latent of each step, for each prompt; empty for text encoders.
        costs: of the reference and of the compared model; None for text encoders.
        notes: sentences for the reader.
    """

    title: str
    scores: list[Mapping[str, float]]
    steps: list[list[float]] = field(default_factory=list)
    costs: tuple[ModelCost, ModelCost] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def means(self) -> dict[str, float]:
        """Metric → mean over the prompts whose outputs differ."""
        return {name: _mean([score[name] for score in self.scores]) for name in self.scores[0]}

    @property
    def summary(self) -> str:
        """Means in one line."""
        return ", ".join(
            f"{name.partition(' (')[0]} {format_value(value, name)}{' dB' * ('dB' in name and math.isfinite(value))}"
            for name, value in self.means.items()
        )

    def markdown(self) -> str:
        """Return the title, tables of scores per prompt, of the costs of both models and of SNR per step, and the notes."""
        rows = [[f"{number}", *_format_scores(score)] for number, score in enumerate(self.scores, 1)]
        if len(rows) > 1:
            rows.append(["mean", *_format_scores(self.means)])
        tables = [markdown_table(["prompt", *self.scores[0]], rows)]
        if self.costs:
            tables.append(markdown_table(["model", "reference", "compared"], _cost_rows(*self.costs)))
        tables += self.notes
        if self.steps:
            prompts = [f"prompt {number} (dB)" for number in range(1, len(self.steps) + 1)]
            by_step = (
                [step, *map(format_value, values)] for step, values in enumerate(zip(*self.steps, strict=True), 1)
            )
            tables.append(
                "SNR of the denoised latent after each step:\n\n" + markdown_table(["step", *prompts], by_step)
            )
        return "\n\n".join([f"## {self.title}", *tables]) + "\n"


def _cost_rows(*costs: ModelCost) -> list[list[str]]:
    """Rows of a table with a column per model."""
    return [
        ["weight memory", *(human_bytes(cost.weight_bytes) for cost in costs)],
        ["time per step (s)", *(three_digits(cost.step_seconds) for cost in costs)],
        ["activations", *(cost.activations for cost in costs)],
    ]
