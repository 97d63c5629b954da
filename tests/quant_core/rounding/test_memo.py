"""Matrices that several formats share: computed once, the same bytes, and given up where memory is short."""

import torch

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.calibration import LayerStatistics, LowRankHessian
from learned_rounding.quant_core.rounding import MatrixMemo, memo, recall, solve
from learned_rounding.quant_core.rounding.gptq import Factorization
from learned_rounding.quant_core.run.layer_task import LayerOrder, LayerTask

CPU = torch.device("cpu")


def test_a_matrix_is_computed_once_for_an_owner_and_a_key():
    kept, owner, made = MatrixMemo(CPU), object(), []
    for key in (1, 1, 2):
        kept.find(owner, key, lambda: made.append(None) or torch.ones(2))
    assert len(made) == 2


def test_equal_owners_are_different():
    kept, made = MatrixMemo(CPU), []
    for _ in range(2):
        kept.find(torch.ones(2), 1, lambda: made.append(None) or torch.ones(2))
    assert len(made) == 2


def test_without_a_memo_or_an_owner_it_is_computed_again():
    made = []
    for kept, owner in ((None, object()), (MatrixMemo(CPU), None), (MatrixMemo(CPU), None)):
        recall(kept, owner, 1, lambda: made.append(None) or torch.ones(2))
    assert len(made) == 3


def test_what_does_not_fit_is_computed_again(monkeypatch):
    monkeypatch.setattr(memo, "_CPU_BYTES", 20)
    kept, owner, made = MatrixMemo(CPU), object(), []
    for key in ("first", "second", "first", "second"):  # 16 bytes each
        kept.find(owner, key, lambda: made.append(None) or torch.ones(4))
    assert len(made) == 3


def test_shared_parts_of_a_factorization_count_once(monkeypatch):
    monkeypatch.setattr(memo, "_CPU_BYTES", 100)
    same = torch.ones(4)
    parts = Factorization(same, same, same, same, 0.1, same)
    kept, owner = MatrixMemo(CPU), object()
    kept.find(owner, 1, lambda: parts)
    assert kept._left == 84


def test_nothing_is_kept_after_it_was_cleared():
    kept, owner, made = MatrixMemo(CPU), object(), []
    kept.find(owner, 1, lambda: torch.ones(2))
    kept.clear()
    for _ in range(2):
        kept.find(owner, 1, lambda: made.append(None) or torch.ones(2))
    assert len(made) == 2


# What formats of one layer share

WIDTH, ROWS = 64, 640  # so many rows that the dampening is chosen on a part of them
RECIPES = [
    Recipe(format="int8_tensorwise", convrot=False),
    Recipe(format="float8_e4m3fn_rowwise"),
    Recipe(format="asym_w4a8_int8"),
    Recipe(format="int8_tensorwise", convrot=64),
]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(recipes) -> list[dict[str, bytes]]:
    rows, others = random(200, WIDTH, seed=1), random(50, WIDTH, seed=2)
    validation = LowRankHessian(others.t() / 50**0.5, torch.zeros(WIDTH))
    statistics = LayerStatistics(rows.t() @ rows / 200, validation, rows.mean(dim=0))
    orders = [LayerOrder(recipe, True, False) for recipe in recipes]
    task = LayerTask("a", random(ROWS, WIDTH, seed=3), None, statistics, orders)
    found = task.run(CPU, lambda event: None, lambda: None, cpu_fallback=True)
    return [
        {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in result.tensors.items()}
        for result in found
    ]


def test_formats_that_share_have_the_bytes_of_each_by_itself():
    assert results(RECIPES) == [results([recipe])[0] for recipe in RECIPES]


def test_a_given_dampening_has_the_bytes_of_a_run_of_its_own():
    """A dampening that was tried after a smaller one has the column order of that one."""
    chosen = [Recipe(format="int8_tensorwise", convrot=False, damping=damping) for damping in (0.1, 1.0)]
    assert results([RECIPES[0], *chosen]) == [results([recipe])[0] for recipe in (RECIPES[0], *chosen)]


def test_each_hessian_is_factored_once_per_dampening(monkeypatch):
    factored = []

    def factorize(quadratic, *args, **options):
        factored.append((id(quadratic.hessian), quadratic.dampening))
        return original(quadratic, *args, **options)

    original = solve.factorize
    monkeypatch.setattr(solve, "factorize", factorize)
    results(RECIPES)
    assert len(factored) == len(set(factored))
