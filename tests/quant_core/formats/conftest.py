"""Files with one layer in the format of another quantizer."""

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.tests.quant_core.formats.external_layers import INNER, LAYER, OUT


@pytest.fixture
def layer_file(tmp_path_factory):
    """layer_file(tensors, metadata=None) → path of a file with these tensors, a norm and a bias, in a folder of its own."""

    def save(tensors, metadata=None):
        path = tmp_path_factory.mktemp("layer") / "q.safetensors"
        save_file(
            tensors | {"norm.weight": torch.ones(INNER), f"{LAYER}.bias": torch.ones(OUT)}, path, metadata or None
        )
        return path

    return save
