"""Candidates of format measured: which formats are tried, and their error by the rounding of the run."""

import math

import pytest
import torch

from learned_rounding.kernels import tuning
from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics, LowRankHessian
from learned_rounding.quant_core.formats import FormatConfig
from learned_rounding.quant_core.layer import Layer, output_error
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.run import candidates
from learned_rounding.quant_core.run.candidates import FEWER_ACTIVATION_BITS, LayerMeter, find_candidates
from learned_rounding.quant_core.run.card_times import CardTimes
from learned_rounding.quant_core.sources import TensorSource
from learned_rounding.quant_core.workers import InProcess

CPU = torch.device("cpu")
WIDTH = 64
HOPPER, BLACKWELL = (9, 0), (12, 0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(seed=0, outlier=1.0) -> LayerStatistics:
    """Statistics of correlated activations; every eighth channel may be an outlier."""
    mix = random(WIDTH, WIDTH, seed=99) * 0.1 + torch.eye(WIDTH)
    mix = mix @ mix
    rows, held_out = (random(512, WIDTH, seed=2 * seed + part) @ mix for part in (1, 2))
    for each in (rows, held_out):
        each[:, ::8] *= outlier
    validation = LowRankHessian(held_out.t() / math.sqrt(len(held_out)), torch.zeros(WIDTH))
    return LayerStatistics(rows.t() @ rows / len(rows), validation, rows.mean(dim=0))


def meter(formats, recipe=None, capability=HOPPER, times=None, known=None, tensors=None):
    names = [f"blocks.{index}.proj" for index in range(3)]
    tensors = tensors or {f"{name}.weight": random(48, WIDTH, seed=index) for index, name in enumerate(names)}
    known = known or {name: statistics(index) for index, name in enumerate(names)}
    recipe = recipe or Recipe(format="measured")
    return LayerMeter(
        TensorSource(tensors),
        recipe,
        InMemoryCalibration(known),
        formats,
        capability,
        times,
        InProcess(CPU, ignore, lambda: None),
        CPU,
        lambda: None,
    )


def ignore(event) -> None:
    """Listener."""


def options_of(measured, name: str, sensitivity: float = 1.0):
    return dict(measured.measure({name: sensitivity}, ignore))[name]


def error(measured, layer=0) -> float:
    return options_of(measured, f"blocks.{layer}.proj.weight", 1.0)[-1].cost ** 0.5


def names(found) -> set[str]:
    return {format.name for format in found}


def test_candidates_depend_on_the_target_and_the_card():
    plain = Recipe(format="measured")
    assert names(find_candidates(plain, None, few_bits=False)) == {"int8_tensorwise", "float8_e4m3fn"}
    assert {"asym_w4a8_int8", "nvfp4", "convrot_w4a4"} < names(find_candidates(plain, HOPPER, few_bits=True))
    for capability, there in ((HOPPER, False), (BLACKWELL, True), (None, False)):
        assert ("mxfp8" in names(find_candidates(plain, capability, few_bits=False))) is there
    assert "int8_blockwise" in names(
        find_candidates(Recipe(format="measured", block_formats=True), None, few_bits=False)
    )


def test_int4_activations_are_tried_for_their_speed_where_the_card_has_them():
    """They have the size of INT8 activations and more error."""
    timed = Recipe(format="measured", target_time=0.8)
    assert FEWER_ACTIVATION_BITS in find_candidates(timed, (8, 9), few_bits=True)
    for recipe, capability in ((timed, HOPPER), (Recipe(format="measured"), (8, 9))):
        assert FEWER_ACTIVATION_BITS not in find_candidates(recipe, capability, few_bits=True)


@pytest.mark.parametrize("format", [FormatConfig("asym_w4a8_int8"), FormatConfig("nvfp4")], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "calibrated"])
def test_errors_of_few_bits_are_those_of_the_layer_that_the_run_makes(format, rounding):
    recipe = Recipe(format="measured", rounding=rounding)
    measured = meter([format], recipe)
    known = statistics(1)
    layer = Layer(random(48, WIDTH, seed=1), statistics=known)
    made = quantize_layer(layer, format.codecs(WIDTH), recipe.rounding)
    assert layer.validation_activations is not None
    expected = output_error(layer.weight, made, layer.validation_activations, HOPPER)
    assert error(measured, 1) == pytest.approx(expected)


def test_errors_of_eight_bits_are_round_to_nearest_times_the_ratio_of_the_first_layer_of_a_type(monkeypatch):
    format, calls = FormatConfig("int8_tensorwise"), []

    def count(layer, codecs, rounding, **options):
        calls.append(rounding.rounding)
        return quantize_layer(layer, codecs, rounding, **options)

    monkeypatch.setattr(candidates, "quantize_layer", count)
    measured = meter([format])
    found = [error(measured, index) for index in range(3)]
    assert calls == ["auto", "auto", "auto", "auto"]  # one of them calibrated: the first layer's
    for index in range(3):
        layer = Layer(random(48, WIDTH, seed=index), statistics=statistics(index))
        made = quantize_layer(layer, format.codecs(WIDTH), Recipe(format="measured").rounding)
        expected = output_error(layer.weight, made, layer.validation_activations, HOPPER)
        assert found[index] == pytest.approx(expected, rel=1e-5 if index == 0 else 0.1)


def test_another_shape_or_name_has_a_ratio_of_its_own(monkeypatch):
    tensors = {
        "blocks.0.proj.weight": random(48, WIDTH),
        "blocks.1.proj.weight": random(32, WIDTH),
        "out.weight": random(48, WIDTH),
    }
    known = {name.removesuffix(".weight"): statistics() for name in tensors}
    measured = meter([FormatConfig("int8_tensorwise")], known=known, tensors=tensors)
    for name in tensors:
        options_of(measured, name, 1.0)
    assert len(measured._ratios) == 3


@pytest.mark.parametrize("capability", [HOPPER, BLACKWELL], ids=str)
def test_nvfp4_is_smoothed_where_the_recipe_asks_for_it(capability):
    known = {"blocks.0.proj": statistics(outlier=30.0)}
    errors = {}
    for smoothing in (None, True):
        recipe = Recipe(format="measured", smoothing=smoothing)
        errors[smoothing] = error(meter([FormatConfig("nvfp4")], recipe, capability, known=known))
    assert errors[True] < 0.95 * errors[None]


def test_the_size_of_a_smoothed_layer_includes_its_scales():
    known = {"blocks.0.proj": statistics(outlier=30.0)}
    sizes = [
        options_of(
            meter([FormatConfig("nvfp4")], Recipe(format="measured", smoothing=smoothing), known=known),
            "blocks.0.proj.weight",
        )[-1].size
        for smoothing in (None, True)
    ]
    assert sizes[1] == sizes[0] + 4 * WIDTH


def test_times_are_those_of_the_codec_of_the_layer(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    times = CardTimes("", "9.0", {}, measure=lambda codec, shape: len(str(codec)))
    known = {"blocks.0.proj": statistics(outlier=30.0)}
    recipe = Recipe(format="measured", smoothing=True)
    measured = meter([FormatConfig("nvfp4")], recipe, times=times, known=known)
    options = options_of(measured, "blocks.0.proj.weight")
    assert [option.time for option in options] == [len("None"), len("nvfp4 per group of 16, smoothed")]


def test_layers_that_cannot_be_quantized_have_one_option():
    weight = random(48, WIDTH)
    weight[3, 4] = float("nan")
    measured = meter([FormatConfig("int8_tensorwise")], tensors={"blocks.0.proj.weight": weight})
    options = options_of(measured, "blocks.0.proj.weight")
    assert [option.format for option in options] == [None]
