"""Sensitivity analysis against the error of the model's output computed by hand."""

import pytest
import torch
from torch import nn

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.calibration import CalibrationFile, Collector, SensitivityAnalysis

WIDTH = 48


class Gated(nn.Module):
    """Two parallel layers with gates 1 and 0.01; the third layer is not called."""

    def __init__(self):
        super().__init__()
        self.loud, self.quiet, self.idle = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        return self.loud(x) + 0.01 * self.quiet(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Gated().eval()


def analyze(model, batches, check=lambda: None):
    layers = dict(model.named_children())
    analysis = SensitivityAnalysis(layers, lambda name: layers[name].weight, check)
    for x in batches:
        analysis.probe(lambda x=x: model(x))
    return analysis.sensitivities


def test_sensitivity_is_the_ratio_of_model_error_to_layer_error(model):
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    sensitivities = analyze(model, [x])
    assert set(sensitivities) == {"loud", "quiet"}
    with torch.no_grad():
        for name, gate in (("loud", 1.0), ("quiet", 0.01)):
            layer = getattr(model, name)
            quantized = quantize_weight(layer.weight, "float8_e4m3fn", rounding="nearest").dequantize()
            error = x @ (quantized - layer.weight).t()
            model_error = (gate * error).square().sum() / model(x).square().sum()
            layer_error = error.square().sum() / layer(x).square().sum()
            assert sensitivities[name] == pytest.approx(float(model_error / layer_error), rel=1e-3)


def test_sensitivities_of_single_steps_are_kept_with_their_positions(model):
    layers = dict(model.named_children())
    analysis = SensitivityAnalysis(layers, lambda name: layers[name].weight, lambda: None)
    batches = [torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for position, x in zip((0.25, 0.75), batches, strict=True):
        analysis.probe(lambda x=x: model(x), position)
    analysis.probe(lambda: torch.zeros(3), 0.9)  # skipped
    found = analysis.step_sensitivities
    assert set(found) == {"loud", "quiet"}
    for name, steps in found.items():
        alone = [analyze(model, [x])[name] for x in batches]
        assert steps == ((0.25, pytest.approx(alone[0])), (0.75, pytest.approx(alone[1])))
        assert min(alone) <= analysis.sensitivities[name] <= max(alone)


def test_the_model_is_not_modified(model):
    x = torch.randn(8, WIDTH)
    before = model(x)
    sensitivities = analyze(model, [x, 2 * x])
    assert torch.equal(model(x), before)
    assert sensitivities["loud"] > 100 * sensitivities["quiet"]


def test_the_model_is_not_modified_when_cancelled(model):
    x = torch.randn(8, WIDTH)
    before = model(x)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze(model, [x], interrupt)
    assert torch.equal(model(x), before)
    assert not model.loud._forward_hooks


def test_outputs_that_are_not_finite_are_skipped(model):
    assert analyze(model, [torch.full((4, WIDTH), float("nan"))]) == {}


def test_sensitivities_are_saved_and_continued(model, tmp_path):
    layers, path = dict(model.named_children()), tmp_path / "c.calib.safetensors"
    options = {"device": torch.device("cpu"), "device_bytes": 1 << 30}
    with Collector(layers, tmp_path, **options) as collector, collector.watching(model, False):
        model(torch.randn(32, WIDTH))
        collector.sensitivities = {"loud": 2.5, "idle": 1.0}
        collector.save(path, {})
        steps = {"loud": ((0.25, 2.0), (0.75, 3.0)), "idle": ((0.25, 1.0),)}
        assert b"step_sensitivity" not in path.read_bytes()  # without steps the file is as before
        collector.step_sensitivities = steps
        collector.save(path, {})
    with CalibrationFile(path) as earlier:
        assert earlier.step_sensitivity("loud") == steps["loud"]
        assert earlier.step_sensitivity("diffusion_model.loud") == steps["loud"]
        assert earlier.step_sensitivity("quiet") is None
        assert earlier.layer_statistics("loud").sensitivity == 2.5
        assert earlier.layer_statistics("quiet").sensitivity is None
        with Collector(layers, tmp_path, **options, earlier=earlier) as collector, collector.watching(model, False):
            model(torch.randn(32, WIDTH))
            collector.save(tmp_path / "d.calib.safetensors", {})
    with CalibrationFile(tmp_path / "d.calib.safetensors") as later:
        assert dict(later.sensitivities) == {"loud": 2.5}
        assert later.step_sensitivities == {"loud": steps["loud"]}
