"""Forms of a Hessian: each expands to the same matrix, and refuses a layer with another number of channels."""

import pytest
import torch

from learned_rounding.quant_core.calibration import (
    LowRankHessian,
    PackedHessian,
    PairedHessian,
    TriangularHessian,
    dense_hessian,
    quantized_hessians,
)
from learned_rounding.quant_core.calibration.hessian import (
    channel_rms,
    hessian_rms,
    low_rank_factor,
    mean_vector,
    move_hessian,
    pack_triangle,
    unpack_triangle,
)
from learned_rounding.quant_core.calibration.panels import pack_symmetric, unpack_symmetric
from learned_rounding.quant_core.calibration.triangle import encode_triangle
from learned_rounding.quant_core.errors import CalibrationError

CPU = torch.device("cpu")
WIDTH, TOKENS = 24, 200


def activations(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) + 4 * torch.eye(WIDTH)
    return torch.randn(TOKENS, WIDTH, generator=generator) @ mixing


def exact(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    return x.t() @ (x if y is None else y) / len(x)


def pack(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Panels of the correlations, and the RMS of the channels."""
    rms = channel_rms(matrix.diagonal())
    return pack_symmetric(matrix / rms / rms[:, None], torch.float16), rms


X, X_HAT = activations(), activations().round()
PAIR = torch.cat([X, X_HAT], dim=1)
PACKED = PackedHessian(*pack(exact(X)))
FORMS = {
    "dense": (exact(X), 0.0),
    "packed": (PACKED, 1e-3),
    "triangular": (pack_triangle(PACKED, CPU), 6e-3),
    "low rank": (LowRankHessian(X.t() / TOKENS**0.5, torch.zeros(WIDTH)), 1e-5),
    "paired": (PairedHessian(*pack(exact(PAIR)), PAIR.mean(dim=0)), 1e-3),
}


def test_every_form_expands_to_the_hessian_of_the_activations(subtests):
    for label, (hessian, tolerance) in FORMS.items():
        with subtests.test(label):
            found = dense_hessian(hessian, WIDTH, CPU)
            assert found.dtype is torch.float32
            assert (found - exact(X)).norm() <= tolerance * exact(X).norm()


def test_every_form_has_the_rms_of_the_channels(subtests):
    for form, (hessian, _) in FORMS.items():
        with subtests.test(form):
            torch.testing.assert_close(hessian_rms(hessian, WIDTH, CPU), exact(X).diagonal().sqrt(), rtol=1e-4, atol=0)


def test_every_form_moves_to_a_device_as_a_whole(subtests):
    for form, (hessian, _) in FORMS.items():
        with subtests.test(form):
            moved = move_hessian(hessian, torch.device("meta"))
            assert type(moved) is type(hessian)
            parts = [moved] if isinstance(moved, torch.Tensor) else vars(moved).values()
            assert {part.device.type for part in parts} == {"meta"}


def test_every_form_refuses_a_layer_with_other_channels(subtests, sentences):
    for form, (hessian, _) in FORMS.items():
        with subtests.test(form):
            with sentences.raises(CalibrationError):
                dense_hessian(hessian, WIDTH + 1, CPU)
            with pytest.raises(CalibrationError):
                hessian_rms(hessian, WIDTH + 1, CPU)


def test_paired_hessian_has_the_products_with_quantized_activations():
    cross, quantized = quantized_hessians(FORMS["paired"][0], WIDTH, CPU)
    assert (cross - exact(X, X_HAT)).norm() < 1e-3 * cross.norm()
    assert (quantized - exact(X_HAT)).norm() < 1e-3 * quantized.norm()


def test_low_rank_hessian_has_its_diagonal_besides_the_factor():
    hessian = LowRankHessian(torch.ones(WIDTH, 1), torch.full((WIDTH,), 2.0))
    assert torch.equal(dense_hessian(hessian, WIDTH, CPU), torch.ones(WIDTH, WIDTH) + 2 * torch.eye(WIDTH))


def test_low_rank_factor_is_float32():
    hessian = LowRankHessian(torch.ones(WIDTH, 2).half(), torch.zeros(WIDTH))
    assert torch.equal(low_rank_factor(hessian, WIDTH, CPU), torch.ones(WIDTH, 2))


def test_low_rank_factor_that_is_not_finite_is_refused(sentences):
    hessian = LowRankHessian(torch.full((WIDTH, 2), torch.inf), torch.zeros(WIDTH))
    with sentences.raises(CalibrationError):
        low_rank_factor(hessian, WIDTH, CPU)


def test_values_that_no_hessian_has_are_refused(sentences, subtests):
    for value, place in ((torch.nan, (3, 3)), (torch.inf, (3, 3)), (torch.nan, (2, 5)), (-1.0, (3, 3))):
        with subtests.test(value=value, place=place), sentences.raises(CalibrationError):
            matrix = torch.eye(WIDTH)
            matrix[place] = value
            dense_hessian(matrix, WIDTH, CPU)


def test_rms_of_a_channel_that_is_always_zero_is_one():
    assert channel_rms(torch.tensor([4.0, 0.0, 0.25])).tolist() == [2.0, 1.0, 0.5]


def test_mean_is_float32_on_the_device():
    assert torch.equal(mean_vector(torch.ones(3).half(), 3, CPU), torch.ones(3))


def test_mean_that_does_not_fit_or_is_not_finite_is_refused(sentences, subtests):
    for mean in (torch.ones(4), torch.ones(3, 1), torch.tensor([1.0, torch.nan, 2.0])):
        with subtests.test(mean=mean), sentences.raises(CalibrationError):
            mean_vector(mean, 3, CPU)


def correlations(size, tokens, spread=2.0):
    """Correlations of activations with a decaying spectrum."""
    generator = torch.Generator().manual_seed(size)
    mixing = torch.randn(size, size, generator=generator) * torch.logspace(0, -spread, size)[:, None]
    x = torch.randn(tokens, size, generator=generator) @ mixing
    x = x / x.square().mean(dim=0).sqrt()
    return x.t() @ x / tokens


def test_16_bit_noise_of_a_singular_matrix_is_covered():
    matrix = correlations(300, 20)
    noisy = PackedHessian(pack_symmetric(matrix, torch.float16), torch.linspace(0.1, 50, 300))
    made = pack_triangle(noisy, CPU)
    expected, actual = (dense_hessian(hessian, 300, CPU) for hessian in (noisy, made))
    assert (actual - expected).norm() / expected.norm() < 0.02
    again = unpack_triangle(made, CPU)
    assert isinstance(again, PackedHessian)
    assert again.panels.dtype is torch.float16
    actual.diagonal().copy_(noisy.rms.square())
    assert (dense_hessian(again, 300, CPU) - actual).norm() / actual.norm() < 1e-3


def test_channels_that_are_always_zero_remain_zero():
    matrix = correlations(40, 500)
    matrix[3], matrix[:, 3] = 0, 0
    made = dense_hessian(
        pack_triangle(PackedHessian(pack_symmetric(matrix, torch.float16), torch.ones(40)), CPU), 40, CPU
    )
    assert not made[3].any()
    assert not made[:, 3].any()
    assert made.any()


def test_what_makes_the_factor_exist_is_not_in_16_bit_correlations():
    matrix = correlations(300, 20)
    matrix[3], matrix[:, 3] = 0, 0
    made = pack_triangle(PackedHessian(pack_symmetric(matrix, torch.float16), torch.full((300,), 5.0)), CPU)
    again = unpack_symmetric(unpack_triangle(made, CPU).panels, 300)
    assert torch.equal(again.diagonal(), (torch.arange(300) != 3).float())
    assert not again[3].any()
    assert (again - matrix).norm() / matrix.norm() < 0.02


def test_parts_that_do_not_fit_the_layer_are_refused(sentences):
    levels, scales, diagonal = encode_triangle(torch.eye(8))
    for hessian in (
        TriangularHessian(levels, scales, diagonal, torch.ones(9)),
        TriangularHessian(levels[1:], scales, diagonal, torch.ones(8)),
    ):
        with sentences.raises(CalibrationError):
            dense_hessian(hessian, 8, CPU)
