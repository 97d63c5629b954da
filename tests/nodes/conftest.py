"""Fixtures of the node tests."""

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.benchmarks.tiny_model.place import place


@pytest.fixture
def tiny_base(tmp_path, host):
    """A base directory with the tiny model for a separate server."""
    place(tmp_path, prompts=("red apple",))
    return tmp_path


@pytest.fixture(scope="session")
def slow_source(comfy):
    """A model file whose layers take long to quantize; its name in Load Model."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.randn(2048, 1024, generator=generator, dtype=torch.float32).to(torch.bfloat16)
    tensors = {f"blocks.{index}.mlp.weight": layer.roll(index, 0).contiguous() for index in range(24)}
    save_file(tensors, comfy.models_dir / "diffusion_models" / "slow.safetensors")
    return "diffusion_models/slow.safetensors"
