"""Format "measured": bytes go where they save the most error, by the layers' real inputs and what hurts the model."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.kernels import tuning
from learned_rounding.quant_core import Recipe, quantize_file, quantize_tensors
from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics, LowRankHessian
from learned_rounding.quant_core.display import three_digits
from learned_rounding.quant_core.errors import NothingToQuantizeError, RecipeError, UnknownNameError
from learned_rounding.quant_core.events import LayerMeasured, RunStarted
from learned_rounding.quant_core.formats import FormatConfig
from learned_rounding.quant_core.formats.cards import parse_card
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.run import allocate
from learned_rounding.quant_core.run.allocate import allocate_formats
from learned_rounding.quant_core.run.candidates import LayerMeter
from learned_rounding.quant_core.run.card_times import CardTimes
from learned_rounding.quant_core.sources import TensorSource
from learned_rounding.quant_core.workers import InProcess

CPU = torch.device("cpu")
LAYERS = [f"blocks.{index}.proj" for index in range(4)]
WIDTH = 64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed, outlier=1.0, sensitivity=None):
    """Inputs of a layer; one channel may be an outlier, which spoils what a token's other channels have left."""
    rows = random(96, WIDTH, seed=seed)
    rows[:, 3] *= outlier
    held_out = LowRankHessian(rows.t() / math.sqrt(len(rows)), torch.zeros(WIDTH))
    return LayerStatistics(rows.t() @ rows / len(rows), held_out, sensitivity=sensitivity)


@pytest.fixture(scope="module")
def tensors():
    """Weights that tests only read."""
    return {
        f"{layer}.weight": random(WIDTH * (index + 1), WIDTH, seed=index).bfloat16()
        for index, layer in enumerate(LAYERS)
    }


def plan_of(tensors, recipe, known):
    return allocate_formats(
        TensorSource(tensors),
        recipe,
        InMemoryCalibration(known),
        pool=InProcess(CPU, print, lambda: None),
        device=CPU,
        emit=lambda event: None,
        check=lambda: None,
    )


def measure(tensors, recipe, known, format):
    """Squared output error of the first layer in a format, on the card of the recipe."""
    capability = parse_card(recipe.card)
    meter = LayerMeter(
        TensorSource(tensors),
        recipe,
        InMemoryCalibration(known),
        [format],
        capability,
        None,
        InProcess(CPU, print, lambda: None),
        CPU,
        lambda: None,
    )
    ((_, options),) = meter.measure({f"{LAYERS[0]}.weight": 1.0}, lambda event: None)
    return options[-1].cost


def formats(plan):
    return {name.removesuffix(".weight"): decision.format for name, decision in plan.decisions.items()}


def test_outliers_are_rotated_and_plain_inputs_are_not_worse_off(tensors):
    known = {layer: inputs(index, outlier=200 if index == 2 else 1) for index, layer in enumerate(LAYERS)}
    chosen = formats(plan_of(tensors, Recipe(format="measured", rounding="nearest"), known))
    assert chosen[LAYERS[2]].convrot in (64, 16)


def test_what_hurts_the_model_is_kept(tensors, sentences):
    """All layers are alike but for their sensitivity; the room given suffices for one of them."""
    for sensitive in range(4):
        known = {
            layer: inputs(9, sensitivity=50.0 if index == sensitive else 0.1) for index, layer in enumerate(LAYERS)
        }
        same = {name: tensors[f"{LAYERS[0]}.weight"].clone() for name in tensors}
        plan = plan_of(same, Recipe(format="measured", rounding="nearest", target_size=2.2e-5), known)
        assert list(plan.names("keep")) == [f"{LAYERS[sensitive]}.weight"]
        assert plan.choice.sensitive
        sentences(plan.decisions[f"{LAYERS[sensitive]}.weight"].reason)


@pytest.fixture(scope="module")
def curve(tensors):
    """(calibration, curve from every layer in 8 bits to none) of layers that differ in size and in what they hurt."""
    known = {layer: inputs(index, sensitivity=2.0**index) for index, layer in enumerate(LAYERS)}
    return known, plan_of(tensors, Recipe(format="measured", rounding="nearest", target_error=10.0), known).choice.curve


def test_the_curve_falls_ever_more_slowly(curve):
    points = curve[1]
    assert len(points) > len(LAYERS)
    assert points[-1][1] == pytest.approx(0, abs=1e-6)
    saved = [(a[1] ** 2 - b[1] ** 2) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert min(saved) > 0
    assert saved == pytest.approx(sorted(saved, reverse=True))


def test_a_target_size_buys_the_least_error_on_the_curve(tensors, curve):
    known, points = curve
    for (size, error), spare in zip(points[1:-1:6], (0, 50), strict=False):  # bytes that buy nothing
        recipe = Recipe(format="measured", rounding="nearest", target_size=(size + spare) / 1e9)
        taken = plan_of(tensors, recipe, known).choice.chosen
        assert taken[0] <= size + spare
        assert taken[1] <= error * (1 + 1e-9)


def test_a_target_error_takes_as_few_bytes_as_it_can(tensors, curve):
    known, points = curve
    for (_, worse), point in list(itertools.pairwise(points[:-1]))[::6]:
        target = (worse + point[1]) / 2
        assert plan_of(
            tensors, Recipe(format="measured", rounding="nearest", target_error=target), known
        ).choice.chosen == pytest.approx(point)


def test_a_target_below_eight_bits_is_met_with_four_where_the_error_is_least(tensors):
    """All layers are alike but for their sensitivity, so the most sensitive ones keep 8 bits."""
    same = {name: tensors[f"{LAYERS[0]}.weight"].clone() for name in tensors}
    known = {layer: inputs(9, sensitivity=10.0**index) for index, layer in enumerate(LAYERS)}
    count = sum(tensor.numel() for tensor in same.values())
    plan = plan_of(same, Recipe(format="measured", target_size=0.85 * count / 1e9, rounding="nearest"), known)
    few = [name for name, format in formats(plan).items() if format.codec.weight_bits == 4]
    assert few == LAYERS[: len(few)]
    assert 0 < len(few) < len(LAYERS)
    assert plan.choice.chosen[0] <= 0.85 * count


@pytest.mark.soak
def test_a_model_of_24_gb_fits_in_7():
    """12 billion weights in 7 GB, a ten-thousandth of it: most layers take 4 bits, and the report shows the curve."""
    layers = {f"blocks.{index}.proj": random(480, 512, seed=index).bfloat16() for index in range(5)}
    known = {name: LayerStatistics(sensitivity=10.0**index) for index, name in enumerate(layers)}
    recipe = Recipe(format="measured", target_size=7e-4 * 1.024, rounding="nearest")
    report = quantize_tensors(
        {f"{name}.weight": tensor for name, tensor in layers.items()}, recipe, calibration=InMemoryCalibration(known)
    ).report
    assert report.bytes_in == 24e5 * 1.024
    assert report.bytes_out <= 7e5 * 1.024
    assert report.choice.chosen[0] == report.bytes_out
    assert len(report.choice.curve) > len(layers)
    assert f"{three_digits(report.choice.chosen[1])} (chosen)" in report.table()


def test_four_bits_are_measured_with_the_rounding_of_the_run(tensors):
    known = {layer: correlated_inputs(index) for index, layer in enumerate(LAYERS)}
    errors = {}
    for rounding in ("nearest", "calibrated"):
        recipe = Recipe(format="measured", rounding=rounding, target_error=10.0)
        errors[rounding] = plan_of(tensors, recipe, known).choice.chosen[1]
    assert errors["calibrated"] < 0.8 * errors["nearest"]


def correlated_inputs(seed):
    mix = random(WIDTH, WIDTH, seed=99)
    rows, held_out = (random(256, WIDTH, seed=2 * seed + part) @ mix @ mix for part in range(2))
    return LayerStatistics(
        rows.t() @ rows / len(rows), LowRankHessian(held_out.t() / math.sqrt(len(held_out)), torch.zeros(WIDTH))
    )


def test_the_card_decides_whether_fp4_activations_count(tensors):
    """ComfyUI multiplies NVFP4 from SM 10.0 on, with activations in FP4; older cards have the error of the weight alone."""
    known = {layer: inputs(index) for index, layer in enumerate(LAYERS)}
    made = {}
    for card in ("8.9", "12.0"):
        recipe = Recipe(format="measured", rounding="nearest", target_error=10.0, card=card)
        made[card] = measure(tensors, recipe, known, FormatConfig("nvfp4")) ** 0.5
    assert made["12.0"] > 1.2 * made["8.9"]


def test_an_unknown_card_is_refused(sentences):
    with sentences.raises(UnknownNameError):
        Recipe(format="measured", card="9.1")


def test_a_target_out_of_reach_is_refused(tensors, sentences):
    known = {layer: inputs(index) for index, layer in enumerate(LAYERS)}
    with sentences.raises(RecipeError):
        plan_of(tensors, Recipe(format="measured", rounding="nearest", target_size=1e-5), known)
    with sentences.raises(NothingToQuantizeError):
        plan_of(tensors, Recipe(format="measured", rounding="nearest", target_size=1.0), known)


SPEED = {"float8_e4m3fn": 0.5, "int8_tensorwise": 0.8, "convrot_w4a4": 0.7, "asym_w4a8_int8": 0.85}


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card on which formats take these fractions of the time of bfloat16; NVFP4 is not measured."""

    def measure(codec, shape):
        ratio = SPEED.get(codec.format.name) if codec else 1.0
        return ratio and ratio * shape[0] / 100

    times = CardTimes("NVIDIA Test", "8.9", {}, measure=measure)
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(allocate, "find_card", lambda card, device, *, measure: times)
    return times


def test_a_target_time_is_kept_with_the_least_error(tensors, card):
    known = {layer: inputs(index, outlier=20, sensitivity=2.0**index) for index, layer in enumerate(LAYERS)}
    choices = {}
    for time in (None, 0.9, 0.7, 0.55):
        choices[time] = plan_of(tensors, Recipe(format="measured", rounding="nearest", target_time=time), known).choice
        assert choices[time].time <= (time or 1.0)
        assert choices[time].card == "NVIDIA Test"
        assert len(choices[time].times) == len(choices[time].curve)
    errors = [choice.chosen[1] for choice in choices.values()]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]
    assert choices[0.7].time > 0.55


def test_a_target_size_and_a_target_time_are_kept_together(tensors, card):
    known = {layer: inputs(index, sensitivity=2.0**index) for index, layer in enumerate(LAYERS)}
    count = sum(tensor.numel() for tensor in tensors.values())
    recipe = Recipe(format="measured", target_size=0.85 * count / 1e9, target_time=0.72, rounding="nearest", card="8.9")
    plan = plan_of(tensors, recipe, known)
    assert plan.choice.chosen[0] <= 0.85 * count
    assert plan.choice.time <= 0.72
    assert {format.name for format in formats(plan).values()} >= {"float8_e4m3fn"}


def test_a_target_error_and_a_target_time_are_kept_together(tensors, card):
    known = {layer: inputs(index, sensitivity=2.0**index) for index, layer in enumerate(LAYERS)}
    error = plan_of(tensors, Recipe(format="measured", rounding="nearest"), known).choice.chosen[1]
    recipe = Recipe(format="measured", rounding="nearest", target_error=4 * error, target_time=0.75)
    choice = plan_of(tensors, recipe, known).choice
    assert choice.chosen[1] <= 4 * error
    assert choice.time <= 0.75


def test_a_target_time_out_of_reach_is_refused(tensors, card, sentences):
    known = {layer: inputs(index) for index, layer in enumerate(LAYERS)}
    for fields in ({}, {"target_error": 0.01}):
        with sentences.raises(RecipeError):
            plan_of(tensors, Recipe(format="measured", rounding="nearest", target_time=0.4, **fields), known)


def test_formats_without_a_time_are_left_out_and_named(tensors, card, sentences):
    known = {layer: inputs(index) for index, layer in enumerate(LAYERS)}
    recipe = Recipe(format="measured", rounding="nearest", target_error=0.5, target_time=0.9)
    plan = plan_of(tensors, recipe, known)
    assert not any(format and format.name == "nvfp4" for format in formats(plan).values())
    sentences(plan.warnings)
    assert not plan_of(tensors, Recipe(format="measured", rounding="nearest", target_error=0.5), known).warnings


def test_a_layer_that_the_card_was_not_measured_with_is_refused(tensors, card, monkeypatch, sentences):
    monkeypatch.setattr(card, "measure", None)
    with sentences.raises(RecipeError):
        plan_of(
            tensors,
            Recipe(format="measured", rounding="nearest", target_time=0.9),
            {layer: inputs(0) for layer in LAYERS},
        )
    assert (
        plan_of(
            tensors, Recipe(format="measured", rounding="nearest"), {layer: inputs(0) for layer in LAYERS}
        ).choice.times
        == ()
    )


def test_a_target_time_needs_a_card(tensors, sentences):
    with sentences.raises(RecipeError):
        plan_of(tensors, Recipe(format="measured", target_time=0.9), {})


def test_the_report_shows_the_curve_with_times(tensors, card, sentences):
    known = {layer: inputs(index, sensitivity=1.0) for index, layer in enumerate(LAYERS)}
    recipe = Recipe(format="measured", rounding="nearest", target_time=0.7)
    report = quantize_tensors(tensors, recipe, calibration=InMemoryCalibration(known), device="cpu").report
    content = json.loads(report.to_json())["choice"]
    assert content["chosen"] in content["curve"]
    assert content["time"] == content["times"][content["curve"].index(content["chosen"])]
    lines = [line for line in report.table().splitlines() if line.startswith(("mixed precision", "size and error"))]
    assert lines[1].count("(chosen)") == 1
    assert "NVIDIA Test" in lines[0]
    assert report.choice.outline in report.markdown()
    sentences(lines, numbers=False)


def test_layers_of_a_preset_are_candidates_only_where_it_is_known_what_hurts():
    names = ["img_in", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "single_blocks.0.modulation.lin"]
    tensors = {f"{name}.weight": random(WIDTH, WIDTH, seed=index).bfloat16() for index, name in enumerate(names)}
    for sensitivity in (None, 1e-6):
        known = {name: inputs(index, sensitivity=sensitivity) for index, name in enumerate(names)}
        plan = plan_of(tensors, Recipe(format="measured", rounding="nearest"), known)
        assert plan.preset.name == "flux"
        assert (plan.decisions["img_in.weight"].action == "quantize") == (sensitivity is not None)
    own = plan_of(tensors, Recipe(format="measured", rounding="nearest", keep=("^img_in",)), known)
    assert own.decisions["img_in.weight"].action == "keep"


def test_a_file_of_several_formats_is_sound_and_tells_how_it_came_about(tensors, tmp_path, sentences):
    known = {layer: inputs(index, outlier=1 + 99 * (index % 2), sensitivity=1.0) for index, layer in enumerate(LAYERS)}
    source, target, events = tmp_path / "model.safetensors", tmp_path / "q.safetensors", []
    save_file({**tensors, "norm.weight": torch.ones(WIDTH)}, source)
    recipe = Recipe(format="measured", block_formats=True, damping=0.1, sweeps=0)
    report = quantize_file(source, target, recipe, calibration=InMemoryCalibration(known), on_event=events.append)
    assert verify_file(target).problems == []
    measured = [event for event in events if isinstance(event, LayerMeasured)]
    assert len(measured) == len(LAYERS)
    assert isinstance(events[len(LAYERS)], RunStarted)
    assert report.choice.chosen in report.choice.curve
    sentences(report.table(), numbers=False)
    written = load_file(target)
    configs = {
        layer: json.loads(bytes(written[f"{layer}.comfy_quant"].tolist()))
        for layer in LAYERS
        if f"{layer}.comfy_quant" in written
    }
    told = {layer.name.removesuffix(".weight"): layer.format for layer in report.layers}
    assert {layer: config["format"] for layer, config in configs.items()} == told
    assert abs(target.stat().st_size - report.choice.chosen[0]) < 20_000  # the header
    again = quantize_tensors(load_file(source), recipe, calibration=InMemoryCalibration(known))
    assert all(
        torch.equal(again.tensors[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in written.items()
    )


def test_it_takes_a_calibration(tensors, sentences):
    with sentences.raises(RecipeError):
        quantize_tensors(tensors, Recipe(format="measured"))


def test_options_act_or_are_refused(sentences, subtests):
    for fields in [
        {"format": "measured", "granularity": "row"},
        {"format": "measured", "convrot": True},
        {"target_size": 5.0},
        {"block_formats": True},
        {"card": "8.9"},
        {"target_time": 0.8},
        {"format": "measured", "target_time": -0.5},
        {"format": "measured", "target_size": 1.0, "target_error": 0.1},
        {"format": "measured", "target_size": -1.0},
        {"format": "measured", "target_error": float("nan")},
        {"format": "measured", "target_size": "big"},
    ]:
        with subtests.test(fields=fields), sentences.raises(RecipeError):
            Recipe(**fields)


def test_such_a_recipe_is_written_and_read():
    recipe = Recipe(format="measured", target_size=6.5, block_formats=True, target_time=0.8)
    assert "target_time" not in Recipe(format="measured").to_dict()
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe == Recipe.from_toml(recipe.to_toml())
    assert recipe.format.label == "measured"
