"""A model with tensors of odd sizes, what becomes of it when nothing goes wrong, and what must hold when something does."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.output import verify_file

RECIPES = {
    "int8 per row": Recipe(format="int8_tensorwise", convrot=False),
    "fp8 stochastic": Recipe(rounding="stochastic"),
}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Eight layers, half of them with an odd number of codes, one large enough that a thread sums its bytes; biases, NaN, norms."""
    generator = torch.Generator().manual_seed(seed)
    made = {"step": torch.tensor(7), "patch.weight": torch.randn(16, 3, 3, 3, generator=generator)}
    for block in range(4):
        made[f"blocks.{block}.qkv.weight"] = torch.randn(96, 64, generator=generator).bfloat16()
        made[f"blocks.{block}.qkv.bias"] = torch.randn(96, generator=generator).bfloat16()
        made[f"blocks.{block}.mlp.weight"] = torch.randn(*((259, 257) if block == 3 else (63, 65)), generator=generator)
        made[f"blocks.{block}.norm.weight"] = torch.ones(65)
    made["blocks.2.qkv.weight"][3, 5] = float("nan")
    return made


@dataclass
class Case:
    """A source, a recipe, and the bytes of the file that the two make."""

    source: Path
    target: Path
    recipe: Recipe
    expected: bytes
    digest: str

    def check(self, complete: bool | None = None) -> None:
        """The whole file or none (``complete``: which), and the source as it was."""
        assert hashlib.sha256(self.source.read_bytes()).hexdigest() == self.digest
        assert complete is None or self.target.exists() is complete
        assert not self.target.exists() or self.target.read_bytes() == self.expected

    def again(self) -> None:
        """The next run ends with the same bytes and leaves nothing else."""
        quantize_file(self.source, self.target, self.recipe, device="cpu")
        self.check(complete=True)
        assert verify_file(self.target).problems == []
        assert {path.name for path in self.target.parent.iterdir()} <= {self.source.name, self.target.name}

    def clear(self) -> None:
        self.target.unlink(missing_ok=True)


@pytest.fixture(params=RECIPES.values(), ids=RECIPES)
def case(request, tmp_path):
    return make_case(tmp_path, request.param)


def make_case(
    folder: Path,
    recipe: Recipe = RECIPES["int8 per row"],
    name: str = "out.safetensors",
    model: dict[str, torch.Tensor] | None = None,
) -> Case:
    source, target = folder / "model.safetensors", folder / name
    save_file(model or tensors(), source, {"author": "me"})
    quantize_file(source, target, recipe, device="cpu")
    made = Case(source, target, recipe, target.read_bytes(), hashlib.sha256(source.read_bytes()).hexdigest())
    made.clear()
    return made


@pytest.fixture
def one_case(tmp_path):
    return make_case(tmp_path)
