"""8-bit Cholesky factors: their error, size, and Hessians that have no exact factor."""

import pytest
import torch

from learned_rounding.quant_core.calibration.panels import packed_size
from learned_rounding.quant_core.calibration.triangle import SEGMENT, decode_triangle, encode_triangle, segment_count
from learned_rounding.quant_core.errors import CalibrationError

CPU = torch.device("cpu")


def correlations(size, tokens, spread=2.0):
    """Correlations of activations with a decaying spectrum."""
    generator = torch.Generator().manual_seed(size)
    mixing = torch.randn(size, size, generator=generator) * torch.logspace(0, -spread, size)[:, None]
    x = torch.randn(tokens, size, generator=generator) @ mixing
    x = x / x.square().mean(dim=0).sqrt()
    return x.t() @ x / tokens


def test_factor_reproduces_the_matrix_and_its_small_eigenvalues(subtests):
    for size, tokens in [(1, 4), (60, 500), (300, 2000), (600, 100)]:
        with subtests.test(size=size, tokens=tokens):
            matrix = correlations(size, tokens)
            made = decode_triangle(*encode_triangle(matrix))
            assert (made - matrix).norm() / matrix.norm() < 1e-2
            assert torch.equal(made, made.t())
            values, vectors = torch.linalg.eigh(matrix.double())
            small = vectors[:, values < 0.01]
            added = torch.einsum("ij,ik,kj->j", small, made.double(), small) - values[values < 0.01]
            assert (added.abs() < 2e-3).all()  # less than the least dampening, 0.01
            assert torch.linalg.eigvalsh(made.double()).min() > 0


def test_a_factor_has_half_of_the_bytes():
    levels, scales, diagonal = encode_triangle(torch.eye(700))
    assert levels.dtype is torch.int8
    assert len(levels) == packed_size(700, SEGMENT)
    assert len(scales) == 700 + 444 + 188
    assert segment_count(700) == 700 + 444 + 188
    assert len(diagonal) == 700
    for size in (3072, 12288, 15360):
        assert packed_size(size, SEGMENT) + 4 * segment_count(size) < 0.56 * size**2


def test_rows_of_tiny_elements_have_levels_of_their_sign(subtests):
    for small in [0.0, 3e-43, 1e-30]:
        with subtests.test(small=small):
            levels, scales, _ = encode_triangle(torch.tensor([[1, small], [small, 1]]))
            assert levels.min() >= 0
            assert scales.min() > 0
            assert levels[2] == (127 if small > 1e-37 else 0)


@pytest.mark.parametrize("damage", ["negative", "nan"])
def test_a_matrix_that_is_not_positive_semi_definite_is_refused(damage, sentences):
    matrix = torch.eye(8)
    matrix[2, 2] = -1 if damage == "negative" else float("nan")
    with sentences.raises(CalibrationError):
        encode_triangle(matrix)


@pytest.mark.gpu
def test_factors_of_singular_correlations_are_finite_on_a_gpu():
    """Rounding to 16 bits makes them indefinite by about as much as the first dampening adds."""
    for seed in range(200):
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(40 + seed, 256, generator=generator, device="cuda")
        x /= x.square().mean(dim=0).sqrt()
        matrix = (x.t() @ x / len(x)).half().float()
        assert all(torch.isfinite(part).all() for part in encode_triangle(matrix)[1:])
