"""What a disturbed layer does to the model's output, against what one computes by hand."""

import pytest
import torch
from torch import nn

from learned_rounding.quant_core.calibration import CalibrationFile, Collector, Sensitivity
from learned_rounding.quant_core.layer import quantize_weight

WIDTH = 48


class Gated(nn.Module):
    """Two layers side by side, one of which hardly counts; the third is not called."""

    def __init__(self):
        super().__init__()
        self.loud, self.quiet, self.idle = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        return self.loud(x) + 0.01 * self.quiet(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Gated().eval()


def measured(model, runs, check=lambda: None):
    layers = dict(model.named_children())
    found = Sensitivity(layers, lambda name: layers[name].weight, check)
    for x in runs:
        found.probe(lambda x=x: model(x))
    return found


def test_it_says_how_much_of_a_layers_error_reaches_the_output(model):
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    found = measured(model, [x]).found
    assert set(found) == {"loud", "quiet"}
    with torch.no_grad():
        for name, gate in (("loud", 1.0), ("quiet", 0.01)):
            layer = getattr(model, name)
            error = (
                x @ (quantize_weight(layer.weight, "float8_e4m3fn", rounding="nearest").dequantize() - layer.weight).t()
            )
            moved = (gate * error).square().sum() / model(x).square().sum()
            caused = error.square().sum() / layer(x).square().sum()
            assert found[name] == pytest.approx(float(moved / caused), rel=1e-3)


def test_the_model_is_left_as_it_was(model):
    x = torch.randn(8, WIDTH)
    before = model(x)
    found = measured(model, [x, 2 * x])
    assert torch.equal(model(x), before) and found.found["loud"] > 100 * found.found["quiet"]

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(model, [x], interrupt)
    assert torch.equal(model(x), before) and not model.loud._forward_hooks


def test_outputs_that_are_zero_or_not_finite_say_nothing(model):
    runs = [torch.full((4, WIDTH), float("nan"))]
    assert measured(model, runs).found == {}


def test_it_is_kept_in_the_file_and_when_a_calibration_is_continued(model, tmp_path):
    layers, path = dict(model.named_children()), tmp_path / "c.calib.safetensors"
    options = {"device": torch.device("cpu"), "device_bytes": 1 << 30}
    with Collector(layers, tmp_path, **options) as collector, collector.watching(model, False):
        model(torch.randn(32, WIDTH))
        collector.sensitivity = {"loud": 2.5, "idle": 1.0}
        collector.save(path, {})
    with CalibrationFile(path) as earlier:
        assert earlier.inputs("loud").sensitivity == 2.5 and earlier.inputs("quiet").sensitivity is None
        with Collector(layers, tmp_path, **options, earlier=earlier) as collector, collector.watching(model, False):
            model(torch.randn(32, WIDTH))
            collector.save(tmp_path / "d.calib.safetensors", {})
    with CalibrationFile(tmp_path / "d.calib.safetensors") as later:
        assert dict(later.sensitivity) == {"loud": 2.5}
