"""What is timed: the layer of each format as a card runs it, with activations as they are quantized there."""

from dataclasses import replace

import pytest
import torch

from learned_rounding.quant_core.formats import FormatConfig, Smoothing
from learned_rounding.quant_core.formats.cards import find_support
from learned_rounding.quant_core.run import layer_time
from learned_rounding.quant_core.run.kitchen_layers import kitchen_version
from learned_rounding.quant_core.run.layer_time import measure_layer

CPU = torch.device("cpu")
SHAPE = (96, 256)
needs_kitchen = pytest.mark.skipif(kitchen_version() is None, reason="no comfy-kitchen")


class Clock:
    """A timer that keeps the output of every call and takes the given times in ms."""

    def __init__(self, *times: float):
        self.times, self.outputs = iter(times), []

    def __call__(self, call) -> float:
        self.outputs.append(call().float())
        return next(self.times, 1.0)


def outputs(codec, capability=(9, 0)):
    clock = Clock()
    assert (measure_layer(codec, SHAPE, CPU, capability, tokens=24, timer=clock) is None) is not bool(clock.outputs)
    return clock.outputs


def error(output, expected) -> float:
    return float((output - expected).norm() / expected.norm())


def test_bfloat16_is_a_linear_layer():
    (output,) = outputs(None)
    assert output.shape == (24, SHAPE[0])
    assert output.std() == pytest.approx(1, abs=0.1)


def test_layers_of_this_package_compute_the_product(subtests):
    for format, largest in [
        (FormatConfig("int8_tensorwise"), 0.02),
        (FormatConfig("int8_tensorwise", convrot=64), 0.02),
        (FormatConfig("int8_blockwise", "block"), 0.03),
        (FormatConfig("float8_e4m3fn"), 0.05),
        (FormatConfig("float8_e4m3fn_rowwise"), 0.05),
        (FormatConfig("float8_e4m3fn_blockwise", "block"), 0.05),
    ]:
        with subtests.test(format=format, largest=largest):
            (expected,) = outputs(None)
            made = outputs(format.codecs(SHAPE[1])[0])
            assert made
            assert all(error(output, expected) < largest for output in made)


@needs_kitchen
def test_layers_of_comfy_kitchen_compute_the_product(subtests):
    for name, capability, count in [
        ("asym_w4a8_int8", (8, 9), 1),
        ("nvfp4", (8, 9), 2),
        ("mxfp8", (9, 0), 2),
        ("convrot_w4a4", (8, 9), 1),
    ]:
        with subtests.test(name=name, capability=capability, count=count):
            (expected,) = outputs(None)
            made = outputs(FormatConfig(name).codecs(SHAPE[1])[0], capability)
            assert len(made) >= count
            assert all(error(output, expected) < 0.25 for output in made)


def test_cards_that_do_not_multiply_a_format_dequantize_it(subtests):
    """The output is that of unquantized activations."""
    for name in ["nvfp4", "mxfp8", "float8_e4m3fn"]:
        with subtests.test(name):
            codec = FormatConfig(name).codec
            (expected,), decoded = outputs(None), outputs(codec, (8, 6))
            weight_error = {"nvfp4": 0.1, "mxfp8": 0.03, "float8_e4m3fn": 0.03}[name]
            assert decoded
            assert all(error(output, expected) < weight_error for output in decoded)


def test_activations_of_smoothed_layers_are_multiplied_first():
    scale = torch.linspace(0.5, 2, SHAPE[1]).bfloat16().float()
    (expected,) = outputs(None)
    smoothed = outputs(replace(FormatConfig("nvfp4").codec, smoothing=Smoothing(scale)))
    assert smoothed
    assert all(error(output, expected) < 0.12 for output in smoothed)


@needs_kitchen
def test_the_fastest_implementation_counts():
    codec = FormatConfig("int8_tensorwise").codec
    assert measure_layer(codec, SHAPE, CPU, (9, 0), tokens=4, timer=Clock(3.0, 2.0)) == 2.0
    assert measure_layer(codec, SHAPE, CPU, (9, 0), tokens=4, timer=Clock(2.0, 3.0)) == 2.0


def test_an_implementation_that_fails_is_left_out(monkeypatch):
    monkeypatch.setattr(layer_time, "prepare_kitchen_layer", lambda *arguments, **options: None)

    def fail(call):
        raise RuntimeError("no such product")

    assert measure_layer(FormatConfig("int8_tensorwise").codec, SHAPE, CPU, (9, 0), tokens=4, timer=fail) is None
    assert measure_layer(FormatConfig("nvfp4").codec, SHAPE, CPU, (12, 0), tokens=4, timer=Clock()) is None


def test_running_out_of_memory_is_not_a_missing_implementation():
    def fail(call):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        measure_layer(FormatConfig("int8_tensorwise").codec, SHAPE, CPU, (9, 0), tokens=4, timer=fail)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int8_tensorwise", "float8_e4m3fn", "int8_blockwise", "nvfp4", "mxfp8"])
def test_layers_are_measured_on_a_gpu(name):
    device, capability = torch.device("cuda"), torch.cuda.get_device_capability()
    whole = measure_layer(None, (1024, 1024), device, capability)
    time = measure_layer(FormatConfig(name).codec, (1024, 1024), device, capability)
    assert whole is not None
    assert 0 < whole < 1000
    if time is None:  # nothing here multiplies the format
        assert find_support(FormatConfig(name).codec, capability) == "native"
    else:
        assert 0 < time < 1000
