"""Files that are read without reads at a position."""

import torch

from learned_rounding.quant_core.sources import SafetensorsFile


def test_tensors_are_read(windows, model, model_file):
    tensors = model()
    with SafetensorsFile(model_file()) as source:
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name), tensor)
