"""The text encoder of the rounding benchmark."""

import pytest
import torch

from learned_rounding.benchmarks.minilm import LAYERS, MiniLM, MiniLMModule
from learned_rounding.tests.benchmarks.text_encoder import make_text_encoder


@pytest.fixture(scope="module")
def tensors():
    return make_text_encoder(texts=2, length=16)


@pytest.fixture(scope="module")
def model(tensors):
    return MiniLM(tensors, torch.device("cpu"))


def test_embeddings_have_the_length_one(model):
    torch.testing.assert_close(model.embed(model.tokens("evaluation")).norm(dim=-1), torch.ones(2))


def test_statistics_are_those_of_the_activations(subtests, model):
    activations = {}

    def linear(name, x):
        activations[name] = x.flatten(0, -2)
        return model.linear(name, x)

    tokens = model.tokens("evaluation")
    model.embed(tokens, linear)
    statistics = model.statistics(tokens)
    assert statistics.keys() == set(LAYERS)
    for name, x in activations.items():
        with subtests.test(name):
            torch.testing.assert_close(statistics[name].hessian, x.t() @ x / len(x), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(statistics[name].mean, x.mean(dim=0), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_module_has_the_layers_and_embeddings_of_the_functions(tensors, model):
    module = MiniLMModule(tensors)
    assert {name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)} == set(LAYERS)
    tokens = model.tokens("evaluation")
    assert torch.equal(module(tokens), model.embed(tokens))
