"""Sequential rounding of the text encoder."""

import pytest
import torch

from learned_rounding.benchmarks import rounding_sequential
from learned_rounding.benchmarks.minilm import LAYERS, MiniLM
from learned_rounding.benchmarks.rounding_methods import Case
from learned_rounding.benchmarks.rounding_sequential import SequentialMethod
from learned_rounding.tests.benchmarks.text_encoder import make_text_encoder


def relative_errors(case: Case, texts: int, length: int = 64) -> dict[str, float]:
    """Of the weights that sequential rounding makes."""
    tensors = make_text_encoder(texts, length)
    model = MiniLM(tensors, torch.device("cpu"))
    tokens = model.tokens("evaluation")
    splits, statistics = {"calibration": tokens, "validation": tokens}, model.statistics(tokens)
    made = SequentialMethod("sequential", tensors, splits, statistics, (12, 0)).round_layers(case)
    return {
        name: float((layer.weight - model.weights[name]).norm() / model.weights[name].norm())
        for name, layer in made.items()
    }


def test_every_layer_of_a_block_is_rounded(monkeypatch):
    monkeypatch.setattr(rounding_sequential, "LAYERS", LAYERS[:6])
    errors = relative_errors(Case("float8_e4m3fn", "tensor"), texts=2, length=16)
    assert errors.keys() == set(LAYERS[:6])
    assert [name for name, error in errors.items() if not 0 < error < 1] == []


@pytest.mark.soak
def test_every_layer_is_rounded():
    errors = relative_errors(Case("asym_w4a8_int8", "group"), texts=8)
    assert errors.keys() == set(LAYERS)
    assert [name for name, error in errors.items() if not 0 < error < 1] == []
