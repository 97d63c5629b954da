"""How far two outputs are apart: measures, and what was measured as a table."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .display import markdown_table

__all__ = ["Comparison", "cosine", "lpips", "psnr", "snr", "ssim"]

_WINDOW, _SIGMA = 11, 1.5  # of the Gaussian of Wang et al., "Image Quality Assessment", 2004, section III.C
_C1, _C2 = 0.01**2, 0.03**2
_LPIPS_WEIGHTS = "alexnet-*.pth"


def _decibel(ratio: float) -> float:
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def snr(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Signal-to-noise ratio in dB, ‖reference‖² over ‖other − reference‖²; ∞ for equal tensors, −∞ where one holds NaN or Inf."""
    reference = reference.double()
    noise = float((other.to(reference) - reference).square().sum())
    return math.inf if noise == 0 else _decibel(float(reference.square().sum()) / noise)


def cosine(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean cosine similarity of the vectors along the last dimension."""
    return float(torch.nn.functional.cosine_similarity(reference.double(), other.to(reference).double(), dim=-1).mean())


def psnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in 0…1; ∞ for equal ones, −∞ where one holds NaN or Inf."""
    error = float((reference.double() - other.to(reference).double()).square().mean())
    return math.inf if error == 0 else _decibel(1 / error)


def ssim(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean structural similarity of pictures (pictures, height, width, channels) in 0…1, where the window fits as a whole.

    Wang et al. 2004: Gaussian window of 11 pixels, σ 1.5, of each channel by itself. NaN for pictures smaller than the window.
    """
    a, b = (
        pictures.double().movedim(-1, 1).flatten(0, 1).unsqueeze(1) for pictures in (reference, other.to(reference))
    )
    if min(a.shape[-2:]) < _WINDOW:
        return math.nan
    place = torch.arange(_WINDOW, dtype=torch.float64, device=a.device) - _WINDOW // 2
    window = torch.exp(-place.square() / (2 * _SIGMA**2))
    window = window / window.sum()

    def mean(x: torch.Tensor) -> torch.Tensor:
        across = torch.nn.functional.conv2d(x, window.view(1, 1, 1, -1))
        return torch.nn.functional.conv2d(across, window.view(1, 1, -1, 1))

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a.square(), mean(b * b) - mean_b.square()
    covariance = mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a.square() + mean_b.square() + _C1)
    return float((luminance * (2 * covariance + _C2) / (variance_a + variance_b + _C2)).mean())


def lpips(reference: torch.Tensor, other: torch.Tensor) -> float | None:
    """Mean LPIPS (AlexNet) of pictures as in :func:`ssim`, 0 for equal ones; None without the package lpips or its weights.

    Nothing is downloaded: torchvision's AlexNet has to be in torch's hub folder already.
    """
    if not any(Path(torch.hub.get_dir(), "checkpoints").glob(_LPIPS_WEIGHTS)):
        return None
    try:
        from lpips import LPIPS
    except ImportError:
        return None
    a, b = (pictures.float().cpu().movedim(-1, 1) * 2 - 1 for pictures in (reference, other))
    with torch.no_grad():
        return float(LPIPS(net="alex", verbose=False)(a, b).mean())


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else "equal" if value > 0 else "-inf"


def _mean(values: Sequence[float]) -> float:
    """Of those that are not equal (∞), if there are any; NaN or −∞ if one of them is."""
    different = [value for value in values if value != math.inf]
    unmeasured = [value for value in different if not math.isfinite(value)]
    return unmeasured[0] if unmeasured else statistics.fmean(different) if different else math.inf


@dataclass
class Comparison:
    """What was measured of two models, by prompt.

    Attributes:
        title: what was compared, in one line.
        scores: for each prompt {measure: value}.
        steps: for each prompt the SNR in dB of the prediction of each step; empty where nothing was sampled.
    """

    title: str
    scores: list[Mapping[str, float]]
    steps: list[list[float]] = field(default_factory=list)

    @property
    def means(self) -> dict[str, float]:
        """Each measure's mean over the prompts whose outputs differ."""
        return {name: _mean([score[name] for score in self.scores]) for name in self.scores[0]}

    @property
    def summary(self) -> str:
        """The means in one line."""
        return ", ".join(
            f"{name.partition(' (')[0]} {_number(value)}{' dB' * ('dB' in name and math.isfinite(value))}"
            for name, value in self.means.items()
        )

    def markdown(self) -> str:
        """The title, a table by prompt, and one by step."""
        rows = [[f"{number}", *map(_number, score.values())] for number, score in enumerate(self.scores, 1)]
        if len(rows) > 1:
            rows.append(["mean", *map(_number, self.means.values())])
        tables = [markdown_table(["prompt", *self.scores[0]], rows)]
        if self.steps:
            prompts = [f"prompt {number} (dB)" for number in range(1, len(self.steps) + 1)]
            by_step = ([step, *map(_number, values)] for step, values in enumerate(zip(*self.steps, strict=True), 1))
            tables.append("SNR of what each step predicts:\n\n" + markdown_table(["step", *prompts], by_step))
        return "\n\n".join([f"## {self.title}", *tables]) + "\n"
