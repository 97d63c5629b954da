"""Section ``minilm`` of the rounding benchmark: activations and errors as on each card."""

from types import SimpleNamespace

import pytest
import torch

from learned_rounding.benchmarks import rounding_encoder
from learned_rounding.benchmarks.harness import environment
from learned_rounding.benchmarks.minilm import SPLITS
from learned_rounding.benchmarks.rounding_encoder import CARDS, quantize_activations
from learned_rounding.benchmarks.rounding_methods import CASES, LibraryMethod
from learned_rounding.benchmarks.rounding_report import markdown
from learned_rounding.tests.benchmarks.text_encoder import make_text_encoder


def test_activations_are_quantized_as_on_the_card(subtests):
    x = torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(0))
    for case in CASES:
        codec = case.codec(256)
        for card, capability in CARDS.items():
            quantized = quantize_activations(case, x, capability)
            largest = 0.2 if codec.activation_elements(capability).bits == 4 else 0.06
            with subtests.test(str(case), card=card):
                assert quantized.shape == x.shape
                assert torch.equal(quantized.flatten(0, -2), codec.quantize_activations(x.flatten(0, -2), capability))
                assert (quantized - x).norm() / x.norm() < largest
                assert torch.equal(quantized, x) != codec.quantizes_activations(capability)


@pytest.fixture(scope="module")
def rows():
    """Of ConvRot W4A4 and NVFP4."""
    tensors = make_text_encoder(texts=2)
    for split in SPLITS:
        tensors |= {f"tokens.{split}": tensors["tokens.evaluation"], f"topics.{split}": torch.arange(2)}
    formats = ["convrot_w4a4", "nvfp4"]
    args = SimpleNamespace(tensors=tensors, formats=formats, texts=8, quick=False, sequential=False)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(rounding_encoder, "_check_embeddings", lambda *_: None)
        patch.setattr(rounding_encoder, "_noise_shaping_limit", lambda hessian: 1.0)
        return rounding_encoder.minilm(args, [LibraryMethod("nearest", "nearest")])


def test_the_limit_of_equal_channels_is_that_of_round_to_nearest():
    assert rounding_encoder._noise_shaping_limit(torch.eye(8)) == pytest.approx(1)


def test_the_limit_falls_with_the_spread_of_the_spectrum():
    limits = [rounding_encoder._noise_shaping_limit(torch.diag(torch.logspace(0, -end, 8))) for end in (0, 1, 2)]
    assert limits == sorted(limits, reverse=True)


@pytest.fixture
def measured(rows):
    """(format, granularity) → row of round to nearest."""
    return {(row["format"], row["per"]): row for row in rows[1::2]}


def test_exact_weights_come_before_each_method(rows):
    assert [row["method"] for row in rows] == ["exact weights", "nearest"] * 3


def test_int4_activations_have_a_larger_error_before_sm_9_0_with_the_same_weights(measured):
    int8, int4 = (measured["convrot_w4a4", f"row, {dtype} activations"] for dtype in ("int8", "int4"))
    assert int8["embedding"] == int4["embedding"]
    assert int8["SM 12.0"] == int4["SM 12.0"]
    assert int8["SM 8.9"] == int8["SM 12.0"]
    assert int8["embedding"] < int8["SM 8.9"] < int4["SM 8.9"]


def test_nvfp4_activations_have_an_error_from_sm_10_0(measured):
    nvfp4 = measured["nvfp4", "group"]
    assert nvfp4["SM 8.9"] == nvfp4["embedding"]
    assert nvfp4["SM 9.0"] == nvfp4["embedding"]
    assert nvfp4["embedding"] < nvfp4["SM 12.0"]


def test_exact_weights_have_the_error_of_the_activations_alone(rows, measured):
    exact = rows[[row["format"] for row in rows].index("convrot_w4a4")]
    assert exact["embedding"] == 0
    assert 0 < exact["SM 12.0"] < measured["convrot_w4a4", "row, int8 activations"]["SM 12.0"]


def test_layers_are_compared_with_the_first_method(measured):
    assert measured["convrot_w4a4", "row, int8 activations"]["median"] == 1


def test_the_report_has_a_column_for_each_card(rows):
    assert "SM 8.9" in markdown({**environment(), "rows": rows})
