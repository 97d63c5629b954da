"""Models of the benchmark of sampling steps: their shapes, and files of random weights."""

import math

import pytest
import torch

from learned_rounding.benchmarks.sampling.model import MODELS, lora_specs, write_model


@pytest.mark.parametrize(("name", "parameters", "layers"), [("flux", 11.9e9, 304), ("wan14b", 14.3e9, 400)])
def test_full_models_have_the_published_size(name, parameters, layers):
    model = MODELS[name]
    specs = dict(model.specs(model.hidden, model.blocks))
    assert sum(math.prod(spec.shape) for spec in specs.values()) == pytest.approx(parameters, rel=0.005)
    assert len(dict(lora_specs(specs, 16))) == 2 * layers


def test_same_seed_gives_the_same_model(source, tmp_path):
    again = tmp_path / "again.safetensors"
    write_model(again, dict(MODELS["flux"].specs(256, (1, 1))), torch.device("cpu"))
    assert again.read_bytes() == source.read_bytes()
