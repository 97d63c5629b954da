"""One output of a run: its order and what it orders, and failures of devices in its report; see test_loop.py for the rest."""

import pytest
import torch

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.events import DeviceFailed
from learned_rounding.quant_core.run.output_run import OutputRun
from learned_rounding.quant_core.sources import TensorSource
from learned_rounding.quant_core.workers import DeviceFailure

FAILURE = DeviceFailure("cuda:1", lost=True, reason="its process was ended by SIGKILL", repeated=2)


class Sink(dict):
    """Tensors by name."""

    def add(self, name, tensor) -> int:
        self[name] = tensor
        return tensor.nbytes


@pytest.fixture
def output(model):
    """output(recipe, calibrated=False, events=[]) → the run of the made-up model."""

    def make(recipe: Recipe, *, calibrated: bool = False, events: list | None = None) -> OutputRun:
        source = TensorSource(model())
        return OutputRun(
            source,
            recipe.plan(source, general=True),
            recipe,
            calibrated=calibrated,
            sink=Sink(),
            journal=None,
            devices="cpu",
            emit=[].append if events is None else events.append,
            check=lambda: None,
        )

    return make


def test_biases_that_may_be_corrected_are_read_with_their_weight(output):
    run = output(Recipe(format="int8_tensorwise"), calibrated=True)
    assert "blocks.0.attn.qkv.bias" not in run.start()
    assert run.biases["blocks.0.attn.qkv.weight"] == "blocks.0.attn.qkv.bias"


def test_biases_are_copied_without_a_calibration(output):
    assert "blocks.0.attn.qkv.bias" in output(Recipe()).start()


def test_a_tensor_that_is_copied_has_no_order(output):
    assert output(Recipe()).layer_order("blocks.0.norm.weight") is None


def test_an_order_has_the_recipe_of_the_layer(output):
    order = output(Recipe(), calibrated=True).layer_order("blocks.0.mlp.0.weight")
    assert order.recipe.format == Recipe().format
    assert order.calibrated


def test_a_failure_of_a_device_is_reported_once(output):
    run = output(Recipe())
    for _ in range(2):
        run.report_failure(FAILURE)
    assert run.report.warnings.count(str(FAILURE)) == 1


def test_a_failure_of_a_device_is_an_event(output):
    events: list = []
    output(Recipe(), events=events).report_failure(FAILURE)
    assert events == [DeviceFailed(device="cuda:1", lost=True, text=str(FAILURE))]


def test_a_copied_tensor_goes_to_the_sink(output):
    run, tensor = output(Recipe()), torch.ones(3)
    with run:
        run.copy("step", tensor)
    assert run._writer._sink["step"] is tensor
