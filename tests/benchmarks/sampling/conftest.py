"""A tiny model of the benchmark of sampling steps."""

import pytest
import torch

from learned_rounding.benchmarks.sampling.model import MODELS, write_model


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    write_model(path, dict(MODELS["flux"].specs(256, (1, 1))), torch.device("cpu"))
    return path
