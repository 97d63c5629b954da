"""Fixtures of the library's tests: made-up models, real layer names, and what must not be left behind."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core.sources import TensorInfo
from learned_rounding.tests.architectures import read
from learned_rounding.tests.quant_core.ray_nodes import local_cluster


@pytest.fixture(scope="session")
def ray_nodes():
    """A Ray cluster of three nodes with a CPU each; see ray_nodes.py."""
    with local_cluster() as cluster:
        yield cluster


@pytest.fixture
def model():
    """model(seed=0) → a made-up transformer: two blocks of linears, and everything that must stay as it is."""

    def make(seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape, dtype=torch.bfloat16):
            return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)

        tensors = {"embed_tokens.weight": random(40, 32), "patch.weight": random(32, 4, 2, 2), "step": torch.tensor(7)}
        for block in range(2):
            tensors |= {
                f"blocks.{block}.attn.qkv.weight": random(96, 32),
                f"blocks.{block}.attn.qkv.bias": random(96),
                f"blocks.{block}.norm.weight": random(32, dtype=torch.float32),
                f"blocks.{block}.mlp.0.weight": random(80, 32, dtype=torch.float16),
                f"blocks.{block}.mlp.2.weight": random(32, 80, dtype=torch.float32),
            }
        return tensors

    return make


@pytest.fixture
def gpt_oss():
    """gpt_oss(blocks=1, seed=0) → a made-up GPT-OSS text encoder with banks of three experts, of odd sizes."""

    def make(blocks: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return (torch.randn(*shape, generator=generator) * 0.05).to(torch.bfloat16)

        tensors = {"embed_tokens.weight": random(40, 64), "norm.weight": random(64)}
        for block in range(blocks):
            layer = f"layers.{block}"
            tensors |= {
                f"{layer}.self_attn.q_proj.weight": random(64, 64),
                f"{layer}.self_attn.sinks": random(4),
                f"{layer}.mlp.router.weight": random(3, 64),
                f"{layer}.mlp.experts.gate_up_proj.weight": random(3, 2 * 72, 64),
                f"{layer}.mlp.experts.gate_up_proj.bias": random(3, 2 * 72),
                f"{layer}.mlp.experts.down_proj.weight": random(3, 64, 72),
                f"{layer}.mlp.experts.down_proj.bias": random(3, 64),
            }
        return tensors

    return make


@pytest.fixture
def model_file(model, tmp_path):
    """model_file(name="model.safetensors", tensors=None, **metadata) → path of a file written by safetensors itself."""

    def make(name: str = "model.safetensors", tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> Path:
        path = tmp_path / name
        save_file(model() if tensors is None else tensors, path, metadata or None)
        return path

    return make


@pytest.fixture
def listing(tmp_path):
    """listing() → names of all files below the test's folder, hidden ones too."""
    return lambda: sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())


@pytest.fixture
def header_source():
    """header_source({name: shape or TensorInfo}) → a source that knows names, dtypes and shapes, and holds no data."""

    def make(tensors: dict, name: str = "model.safetensors", dtype: torch.dtype = torch.bfloat16):
        infos = {
            key: value if isinstance(value, TensorInfo) else TensorInfo(dtype, tuple(value))
            for key, value in tensors.items()
        }
        return SimpleNamespace(name=name, tensors=infos, metadata={})

    return make


@pytest.fixture
def layer_names():
    """layer_names(architecture, prefix="") → {name: shape} of all its tensors, from ComfyUI's own model classes."""

    def names(architecture: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
        return {prefix + name: tensor.shape for name, tensor in read(architecture).items()}

    return names


@pytest.fixture
def weight_error():
    """weight_error(quantized, weight) → ‖Ŵ − W‖/‖W‖ in float64, from the quantized values and the scales alone."""

    def measure(quantized, weight: torch.Tensor) -> float:
        basis = quantized.codec.basis  # orthogonal where there is one, so that errors are the same
        exact = (basis.apply_weight(weight) if basis else weight).double()
        scale = quantized.scale.double()
        rows, columns = (-(-side // count) for side, count in zip(exact.shape, scale.shape, strict=True))
        if (
            size := quantized.codec.group_size
        ) and quantized.solution.levels is None:  # groups at the edges are smaller
            rows, columns = (size if quantized.granularity == "block" else 1), size
        scale = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: exact.shape[0], : exact.shape[1]]
        lost = quantized.qdata.double() * scale - exact
        norm = exact.norm().item()
        return lost.norm().item() / norm if norm else math.nan

    return measure
