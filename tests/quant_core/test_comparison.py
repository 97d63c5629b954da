"""Similarity metrics against their formulas and against values of scikit-image."""

import math
import sys
from types import ModuleType

import pytest
import torch

from learned_rounding.quant_core.comparison import Comparison, ModelCost, cosine, lpips, psnr, snr, ssim

# scikit-image 0.26.0: structural_similarity(a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5,
# use_sample_covariance=False, data_range=1.0) and peak_signal_noise_ratio(a, b, data_range=1.0) of waves(gain).
SCIKIT_IMAGE = {0.05: (0.9734094845193804, 29.507035158672963), 0.3: (0.5547154082084886, 14.80197082304624)}


def waves(gain: float) -> tuple[torch.Tensor, torch.Tensor]:
    """An image of waves (1, 48, 40, 3), and the same with finer waves added."""
    axes = (torch.arange(size, dtype=torch.float64) for size in (48, 40, 3))
    y, x, c = torch.meshgrid(*axes, indexing="ij")
    image = 0.5 + 0.5 * torch.sin(0.3 * x + 0.17 * y + c)
    return image[None], (image + gain * torch.sin(1.7 * x - 0.9 * y + 2 * c)).clamp(0, 1)[None]


@pytest.mark.parametrize("gain", SCIKIT_IMAGE)
def test_ssim_and_psnr_match_scikit_image(gain):
    a, b = waves(gain)
    expected_ssim, expected_psnr = SCIKIT_IMAGE[gain]
    assert ssim(a, b) == pytest.approx(expected_ssim, rel=1e-9)
    assert psnr(a, b) == pytest.approx(expected_psnr, rel=1e-9)


def test_ssim_and_psnr_are_symmetric():
    a, b = waves(0.3)
    assert ssim(b, a) == pytest.approx(ssim(a, b), rel=1e-9)
    assert psnr(b, a) == pytest.approx(psnr(a, b), rel=1e-9)


def test_ssim_is_the_mean_over_images_in_any_precision():
    a, b = waves(0.3)
    assert ssim(torch.cat([a, b]), torch.cat([b, a])) == pytest.approx(ssim(a, b))
    assert ssim(a.float(), b.float()) == pytest.approx(ssim(a, b), rel=1e-5)


def test_metrics_of_equal_images():
    a, _ = waves(0)
    assert ssim(a, a) == pytest.approx(1)
    assert psnr(a, a) == math.inf
    assert snr(a, a) == math.inf


def test_ssim_is_nan_for_images_smaller_than_the_window():
    assert math.isnan(ssim(torch.zeros(1, 10, 40, 3), torch.zeros(1, 10, 40, 3)))


def test_snr_and_cosine_match_their_formulas():
    a = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    assert snr(a, a * 1.1) == pytest.approx(20, rel=1e-5)
    assert snr(a, 2 * a) == pytest.approx(0)
    assert snr(torch.zeros(2), torch.ones(2)) == -math.inf
    assert cosine(a, 3 * a) == pytest.approx(1)
    assert cosine(a, torch.tensor([[3.0, 4.0], [5.0, 0.0]])) == pytest.approx(0.5)


def test_lpips_needs_its_weights_and_its_package(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    module = ModuleType("lpips")
    module.LPIPS = lambda net, verbose: lambda a, b: (a - b).abs().mean((1, 2, 3), keepdim=True)
    monkeypatch.setitem(sys.modules, "lpips", module)
    a, b = torch.zeros(2, 4, 6, 3), torch.full((2, 4, 6, 3), 0.25)
    assert lpips(a, b) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    assert lpips(a, b) == pytest.approx(0.5)  # images scaled to −1…1
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert lpips(a, b) is None


PROMPTS = Comparison(
    "a | b",
    [{"SNR (dB)": 20.0, "SSIM": 0.5}, {"SNR (dB)": 30.0, "SSIM": math.nan}],
    [[1.0, math.inf], [2.0, -math.inf]],
)


def test_means_are_those_of_the_prompts():
    assert PROMPTS.means["SNR (dB)"] == 25


def test_markdown_has_a_table_of_prompts():
    assert PROMPTS.markdown().splitlines()[:6] == [
        "## a | b",
        "",
        "| prompt | SNR (dB) | SSIM |",
        "| :-- | --: | --: |",
        "| 1 | 20.0 | 0.5 |",
        "| 2 | 30.0 | – |",
    ]


def test_markdown_has_a_table_of_steps():
    assert PROMPTS.markdown().splitlines()[-4:] == [
        "| step | prompt 1 (dB) | prompt 2 (dB) |",
        "| :-- | --: | --: |",
        "| 1 | 1.0 | 2.0 |",
        "| 2 | equal | -inf |",
    ]


def test_markdown_rounds_each_metric_to_its_precision():
    near = Comparison("one", [{"SNR (dB)": 20.04, "SSIM": 0.99871, "LPIPS": 0.012345}])
    assert "| 1 | 20.0 | 0.9987 | 0.0123 |" in near.markdown()


def test_markdown_of_one_prompt_has_no_mean():
    assert "mean" not in Comparison("one", [{"SNR (dB)": 20.0}]).markdown()


def test_markdown_has_the_costs_of_both_models_and_the_notes():
    costs = ModelCost(2_000_000, 0.25, 0, 0), ModelCost(1_000_000, 0.1234, 3, 4)
    lines = Comparison("one", [{"SNR (dB)": 20.0}], costs=costs, notes=["A note."]).markdown().splitlines()
    assert lines[6:] == [
        "| model | reference | compared |",
        "| :-- | --: | --: |",
        "| weight memory | 2 MB | 1 MB |",
        "| time per step (s) | 0.25 | 0.123 |",
        "| activations | not quantized | quantized in 3 of 4 quantized layers |",
        "",
        "A note.",
    ]
