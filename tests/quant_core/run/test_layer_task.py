"""Layers as tasks: the results of each order, statistics, and too little memory."""

import pickle

import pytest
import torch

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.calibration import LayerStatistics, LowRankHessian
from learned_rounding.quant_core.errors import CalibrationError, NonFiniteWeightError, OutOfMemoryError
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.run import layer_task
from learned_rounding.quant_core.run.layer_task import LayerOrder, LayerTask, move_statistics

CPU = torch.device("cpu")
WIDTH = 32
FP8, INT8 = Recipe(), Recipe(format="int8_tensorwise", convrot=False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics() -> LayerStatistics:
    rows, others = random(200, WIDTH, seed=1), random(50, WIDTH, seed=2)
    return LayerStatistics(
        rows.t() @ rows / 200, LowRankHessian(others.t() / 50**0.5, torch.zeros(WIDTH)), rows.mean(0)
    )


def task(*orders: LayerOrder, weight=None, known=None) -> LayerTask:
    return LayerTask("a", random(48, WIDTH) if weight is None else weight, random(48, seed=3), known, orders)


def run(made: LayerTask, *, cpu_fallback: bool = True):
    return made.run(CPU, lambda event: None, lambda: None, cpu_fallback=cpu_fallback)


def test_each_order_has_a_result_in_its_format():
    results = run(task(LayerOrder(FP8, False, False), LayerOrder(INT8, False, False)))
    assert [result.format for result in results] == ["float8_e4m3fn", "int8_tensorwise"]


def test_tensors_have_the_names_of_a_file():
    (result,) = run(task(LayerOrder(FP8, False, False)))
    assert result.tensors.keys() == {"a.weight", "a.weight_scale", "a.comfy_quant"}


def test_only_orders_with_a_calibration_use_the_statistics():
    plain, calibrated = run(task(LayerOrder(INT8, False, False), LayerOrder(INT8, True, False), known=statistics()))
    assert plain.output_error is None
    assert calibrated.output_error is not None


def test_a_layer_without_statistics_is_rounded_as_without_a_calibration():
    plain, calibrated = (run(task(LayerOrder(INT8, used, False)))[0] for used in (False, True))
    assert torch.equal(plain.tensors["a.weight"], calibrated.tensors["a.weight"])


def test_a_bias_is_corrected_where_that_is_ordered():
    orders = LayerOrder(INT8, True, False), LayerOrder(INT8, True, True)
    without, corrected = run(task(*orders, known=statistics()))
    assert not without.bias_corrected
    assert corrected.bias_corrected
    assert "a.bias" in corrected.tensors


def test_nan_is_a_result_of_each_order():
    weight = random(48, WIDTH)
    weight[0, 0] = float("nan")
    results = run(task(LayerOrder(FP8, False, False), LayerOrder(INT8, False, False), weight=weight))
    assert all(isinstance(result, NonFiniteWeightError) for result in results)


def test_damaged_statistics_are_an_error_with_the_layer(sentences):
    damaged = LayerStatistics(torch.full((WIDTH, WIDTH), float("nan")))
    with sentences.raises(CalibrationError) as caught:
        run(task(LayerOrder(INT8, True, False), known=damaged))
    assert caught.value.tensor == "a.weight"


def test_tasks_and_results_can_be_sent():
    made = task(LayerOrder(INT8, True, True), known=statistics())
    (sent,) = run(pickle.loads(pickle.dumps(made)))
    (result,) = pickle.loads(pickle.dumps(run(made)))
    assert torch.equal(sent.tensors["a.weight"], result.tensors["a.weight"])


def test_seconds_are_those_of_the_computation():
    (result,) = run(task(LayerOrder(FP8, False, False)))
    assert result.seconds > 0


@pytest.mark.parametrize("allowed", [True, False])
def test_the_cpu_is_used_only_where_it_is_allowed(monkeypatch, allowed):
    found = []

    def look(*args, cpu_fallback, **options):
        found.append(cpu_fallback)
        return quantize_layer(*args, cpu_fallback=cpu_fallback, **options)

    monkeypatch.setattr(layer_task, "quantize_layer", look)
    run(task(LayerOrder(FP8, False, False)), cpu_fallback=allowed)
    assert found == [allowed]


def test_too_little_memory_is_one_sentence(monkeypatch, sentences):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(layer_task, "quantize_layer", full)
    with sentences.raises(OutOfMemoryError):
        run(task(LayerOrder(FP8, False, False)))


def test_statistics_stay_where_they_are_without_memory(monkeypatch):
    known = statistics()

    def full(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LayerStatistics, "move_hessian", full)
    assert move_statistics(known, CPU) is known
