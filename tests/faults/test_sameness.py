"""The same inputs give the same bytes: again, in other processes, with other numbers of threads, on a GPU but for ties."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics

pytestmark = pytest.mark.soak

RECIPES = {
    "fp8": Recipe(),
    "int8 per row": Recipe(format="int8_tensorwise", convrot=False),
    "int8 ConvRot": Recipe(format="int8_tensorwise", convrot="auto"),
    "int8 per block": Recipe(format="int8_blockwise"),
    "principal": Recipe(format="int8_tensorwise", convrot=False, rounding="principal"),
    "stochastic": Recipe(rounding="stochastic"),
    "steps": Recipe(format="int8_tensorwise", convrot=False, optimizer="adamw", num_iter=5),
}
INNER = 256
CHILD = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from learned_rounding.quant_core import Recipe, quantize_file
quantize_file(sys.argv[2], sys.argv[3], Recipe.from_json(sys.argv[4]), device="cpu")
"""


@pytest.fixture
def source(tmp_path):
    """Large enough that torch spreads its work over threads."""
    generator = torch.Generator().manual_seed(3)
    path = tmp_path / "model.safetensors"
    save_file({f"blocks.{index}.weight": torch.randn(384, INNER, generator=generator) for index in range(3)}, path)
    return path


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_same_bytes_in_every_process_with_any_number_of_threads(source, tmp_path, recipe, often, tried):
    quantize_file(source, tmp_path / "reference.safetensors", recipe, device="cpu")
    reference = (tmp_path / "reference.safetensors").read_bytes()
    threads = [2, *often((), (1, 3, 4, 8))]
    for count in threads:
        out = tmp_path / f"{count}.safetensors"
        environment = os.environ | {"OMP_NUM_THREADS": str(count), "PYTHONHASHSEED": str(count)}
        subprocess.run(
            [sys.executable, "-c", CHILD, str(count), source, out, recipe.to_json()], check=True, env=environment
        )
        assert out.read_bytes() == reference
    tried("other processes, other numbers of threads", len(threads), "the same bytes")


def _place(codes: torch.Tensor) -> torch.Tensor:
    """Which one of its grid each code is, counted from zero: neighbours are one apart."""
    if codes.dtype is torch.int8:
        return codes.int()
    bits = codes.view(torch.int8).int()  # of a float: a sign, and a magnitude that grows with the value
    return torch.where(bits < 0, -(bits & 127), bits)


@pytest.mark.gpu
@pytest.mark.parametrize("calibrated", [False, True], ids=["", "calibrated"])
@pytest.mark.parametrize(
    "recipe", [recipe for name, recipe in RECIPES.items() if name not in ("stochastic", "steps")], ids=str
)
def test_a_gpu_agrees_but_for_ties(source, tmp_path, recipe, calibrated, tried):
    """Codes that differ are few, and neighbours where each is rounded for itself: sums in another order move a value across the middle of two."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(4 * INNER, INNER, generator=generator)
    known = (
        {f"blocks.{index}": LayerStatistics(hessian=inputs.T @ inputs / len(inputs)) for index in range(3)}
        if calibrated
        else {}
    )
    if calibrated and recipe.rounding.rounding == "principal":
        pytest.skip("principal takes no calibration")
    made = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.safetensors"
        quantize_file(
            source, out, recipe, calibration=InMemoryCalibration(known) if calibrated else None, device=device
        )
        made[device] = load_file(out)
    assert made["cpu"].keys() == made["cuda"].keys()
    differing = codes = furthest = 0
    for name, on_cpu in made["cpu"].items():
        if name.endswith(".weight"):
            apart = (_place(on_cpu) - _place(made["cuda"][name])).abs()
            codes, differing, furthest = (
                codes + apart.numel(),
                differing + int((apart > 0).sum()),
                max(furthest, int(apart.max())),
            )
        elif name.endswith("_scale"):
            torch.testing.assert_close(on_cpu, made["cuda"][name], rtol=1e-5, atol=0)
    carried = calibrated or recipe.rounding.rounding == "principal"  # what one code takes, the next ones give back
    assert differing <= codes * (0.02 if carried else 0.001)
    assert furthest <= (3 if carried else 1)
    what = f"{recipe.format.name}, rounding {recipe.rounding.rounding}{', calibrated' if calibrated else ''}"
    tried(f"CPU and GPU, {what}", 1, f"{differing} of {codes:,} codes differ, by at most {furthest} steps")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bytes_again(source, tmp_path, often, tried):
    runs = often(3, 20)
    for recipe in RECIPES.values():
        first = None
        for index in range(runs):
            quantize_file(source, tmp_path / f"{index}.safetensors", recipe, device="cuda", overwrite=True)
            first = first or (tmp_path / "0.safetensors").read_bytes()
            assert (tmp_path / f"{index}.safetensors").read_bytes() == first
    tried("the same run on a GPU", runs * len(RECIPES), "the same bytes")
