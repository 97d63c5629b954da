"""Rounding of the layers of a block for the activations of the quantized model."""

from collections import Counter

import torch
from torch import nn

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.sequential import block as rounding
from learned_rounding.quant_core.sequential.streams import Stream

from .models import WIDTH, Pairs, calibrate, make, make_arguments, outputs, replay
from .walks import FP8, Walk, block_outputs, parts_of, relative_error, run_whole, same, walk, walked


def test_layers_after_others_compensate_for_them():
    """The model's error is less than with layers that are calibrated one by one."""
    model, made = walked("skips")
    assert [event.kept for event in made.finished] == ["sequential"] * 5
    calibrated = run_whole(model, made.linears(plain=True))
    assert made.errors.quantized < 0.8 * relative_error(calibrated, run_whole(model, {}))


def test_layers_take_the_dampening_of_their_calibrated_rounding(monkeypatch, twice_as_wide):
    taken = []

    def quantize(layer, codecs, config, **options):
        taken.append(config.damping)
        return quantize_layer(layer, codecs, config, **options)

    monkeypatch.setattr(rounding, "quantize_layer", quantize)
    made = walk(replay(make(Pairs)))
    chosen = {name: pending.plain.solution.dampening for name, pending in made.pending.items()}
    assert set(chosen.values()) > {None}  # of layers that are rounded to nearest
    assert Counter(taken) == Counter(chosen.values())


def test_bias_takes_the_difference_of_the_mean_outputs():
    model = replay(make(Pairs))
    corrected = walk(model)
    unchanged = walk(model, Recipe("asym_w4a8_int8", rounding="sequential", preset="none", bias_correction="none"))
    for name, pending in unchanged.pending.items():
        assert torch.equal(unchanged.results[name].bias, pending.layer.bias)
        assert not torch.equal(corrected.results[name].bias, pending.layer.bias)

    def mean_difference(made: Walk) -> float:
        exact, quantized = (
            torch.cat([found[0] for found in block_outputs(model, linears, validation=False).values()]).flatten(0, -2)
            for linears in ({}, made.linears())
        )
        return float((quantized.mean(dim=0) - exact.mean(dim=0)).norm())

    assert mean_difference(corrected) < 0.2 * mean_difference(unchanged)


def test_static_input_scale_is_kept_and_used():
    """Inputs so small that FP8 flushes them without their scale."""
    arguments = [(x * 1e-3, time * 1e-3) for x, time in make_arguments()]
    model = replay(make(Pairs), arguments=arguments)
    made = walk(model, FP8)
    assert made.unfollowed is None
    scales = {name: pending.plain.input_scale for name, pending in made.pending.items()}
    assert scales["blocks.0.image"] < 1e-3
    assert {name: quantized.input_scale for name, quantized in made.results.items()} == scales
    assert made.errors.quantized < 0.05
    assert made.errors.weights_only < made.errors.quantized


def test_smoothed_layers_keep_their_channel_scales():
    """Channels with large inputs, where nvfp4 is smoothed."""
    outliers = torch.ones(WIDTH)
    outliers[::8] = 30
    arguments = [(x * outliers, time * outliers) for x, time in make_arguments()]
    recipe = Recipe("nvfp4", rounding="sequential", preset="none", smoothing=True)
    model = replay(make(Pairs), arguments=arguments)
    made = walk(model, recipe)
    smoothed = [name for name, pending in made.pending.items() if pending.plain.codec.smoothing]
    assert smoothed
    for name in smoothed:
        scales = [
            parts_of(quantized)["pre_quant_scale"] for quantized in (made.pending[name].plain, made.results[name])
        ]
        assert torch.equal(*scales)
    found = {index: outputs(value) for index, value in made.streams[Stream.QUANTIZED].items()}
    assert same(found, run_whole(model, made.linears()))
    assert all(event.error <= event.calibrated_error for event in made.finished)


def test_layer_without_statistics_is_rounded_with_its_block(monkeypatch):
    model = replay(make(Pairs))
    known = calibrate(model)
    unknown = "blocks.0.text"
    monkeypatch.setattr(
        known, "layer_statistics", lambda name, real=known.layer_statistics: None if name == unknown else real(name)
    )
    made = walk(model, calibration=known)
    assert made.unfollowed is None
    assert unknown in made.results
    assert made.errors.quantized < 0.1


class Sometimes(nn.Module):
    """A block with a layer that some calls leave out, such as those of a branch of guidance."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, time):
        x = x + self.always(x)
        return x + self.sometimes(x) if time.sum() > 0 else x


class WithSometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Sometimes() for _ in range(2))

    def forward(self, x, time):
        for each in self.blocks:
            x = each(x, time)
        return x


def test_layer_that_some_calls_leave_out_is_rounded_with_the_others(subtests):
    for calls in [{0}, {0, 2}, {0, 5}, {0, 4, 5}, {0, 1, 2, 3}, {4, 5}]:
        with subtests.test(calls=calls):
            arguments = [
                (x, time.abs() if index in calls else -time.abs()) for index, (x, time) in enumerate(make_arguments())
            ]
            model = replay(make(WithSometimes), arguments=arguments)
            made = walk(model)
            assert made.unfollowed is None
            assert made.results.keys() >= {"blocks.0.always", "blocks.1.always"}
            assert all(event.error <= event.calibrated_error for event in made.finished)
