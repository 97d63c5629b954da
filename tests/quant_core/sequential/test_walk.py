"""Following a model block by block: its streams, what is kept of each block, and models that leave the path."""

import contextlib
import functools
import gc
import logging
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.events import BlockAdvanced, BlockFinished, BlockStarted
from learned_rounding.quant_core.formats import QuantizedWeight
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.sequential import (
    ModelWalk,
    PendingLayer,
    ReplayedModel,
    block,
    capture,
    find_blocks,
    parking,
)
from learned_rounding.quant_core.sequential import block as rounding
from learned_rounding.quant_core.sequential import walk as walking
from learned_rounding.quant_core.sequential.calls import replaced_forward
from learned_rounding.quant_core.sequential.streams import Stream

from .models import (
    WIDTH,
    Block,
    Pairs,
    Transformer,
    UNet,
    calibrate,
    make,
    make_arguments,
    outputs,
    pend,
    replay,
)

W4A8 = Recipe("asym_w4a8_int8", rounding="sequential", preset="none")
INT8 = Recipe(
    "int8_tensorwise", convrot=False, rounding="sequential", preset="none", damping=0.1, sweeps=0
)  # the fastest
FP8 = Recipe("float8_e4m3fn", rounding="sequential", preset="none")
OPTIONS = {
    "rounding": INT8.rounding,
    "capability": None,
    "weights_only": False,
    "seed": 0,
    "emit": lambda event: None,
    "check": lambda: None,
}
NVFP4 = Recipe("nvfp4", rounding="sequential", preset="none")


@dataclass
class Walk:
    """What a walk through a model gave."""

    pending: dict[str, PendingLayer] = field(default_factory=dict)
    results: dict[str, QuantizedWeight] = field(default_factory=dict)
    events: list = field(default_factory=list)
    streams: dict[Stream, dict] = field(default_factory=dict)
    errors: object = None
    unfollowed: str | None = None

    @property
    def finished(self) -> list[BlockFinished]:
        return [event for event in self.events if isinstance(event, BlockFinished)]

    def linears(self, capability=None, *, plain: bool = False, weights_only: bool = False) -> dict:
        """The layers as they run quantized."""
        made = {
            name: pending.linear(pending.plain if plain else self.results[name], capability)
            for name, pending in self.pending.items()
        }
        return {name: linear.without_activations() for name, linear in made.items()} if weights_only else made


def walk(
    model: ReplayedModel,
    recipe=W4A8,
    *,
    capability=None,
    weights_only=True,
    seed=0,
    outside=(),
    left_out=frozenset(),
    calibration=None,
    sensitivity=lambda layer: None,
    check=lambda: None,
) -> Walk:
    """Round all blocks of a model, but no layer of ``left_out``."""
    made, calibration = Walk(), calibration or calibrate(model)
    options = {"rounding": recipe.rounding, "capability": capability, "weights_only": weights_only, "seed": seed}
    options["sensitivity"] = sensitivity
    inside = [name for name in model.layers if name not in ("embed", "final", "modulation")]
    with ModelWalk(model, [*inside, *outside], **options, emit=made.events.append, check=check) as followed:
        for name, pending in pend(model, calibration, recipe, outside).items():
            made.pending[name], made.results[name] = pending, pending.plain
            followed.add_outside(name, pending.plain.codec, parts_of(pending.plain), pending.plain.shape)
        for block in followed.blocks:
            pending = pend(model, calibration, recipe, [name for name in block.layers if name not in left_out])
            made.pending |= pending
            made.results |= followed.round_block(pending)
        made.errors, made.unfollowed = followed.model_errors(), followed.unfollowed
        if followed._streams is not None:
            made.streams = {stream: followed._streams.results(stream) for stream in followed._streams.carried}
    return made


def parts_of(quantized: QuantizedWeight) -> dict[str, torch.Tensor]:
    return {name.rpartition(".")[2]: tensor for name, tensor in quantized.tensors("layer").items()}


def run_whole(model: ReplayedModel, linears) -> dict[int, list[torch.Tensor]]:
    """Outputs of the model in its validation calls with these layers."""
    with contextlib.ExitStack() as stack:
        for name, linear in linears.items():
            stack.enter_context(replaced_forward(model.layers[name], linear))
        return {index: outputs(model.run(index)) for index, judges in enumerate(model.validation) if judges}


def same(left: dict[int, list[torch.Tensor]], right: dict[int, list[torch.Tensor]]) -> bool:
    return left.keys() == right.keys() and all(
        len(left[index]) == len(right[index]) and all(map(torch.equal, left[index], right[index])) for index in left
    )


def relative_error(found: dict[int, list[torch.Tensor]], exact: dict[int, list[torch.Tensor]]) -> float:
    """√ of the mean, over the outputs, of Σ‖y − ŷ‖²/Σ‖y‖²."""
    shares = []
    for position in range(len(next(iter(exact.values())))):
        pairs = [(found[index][position].double(), exact[index][position].double()) for index in exact]
        shares.append(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))
    return float(torch.stack(shares).mean().sqrt())


def state_of(root: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in root.state_dict().items()}


def is_unchanged(root: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return (
        not any("forward" in vars(module) for module in root.modules())
        and not any(module._forward_hooks or module._forward_pre_hooks for module in root.modules())
        and all(torch.equal(tensor, state[name]) for name, tensor in root.state_dict().items())
    )


def same_bytes(left: Walk, right: Walk) -> bool:
    return left.results.keys() == right.results.keys() and all(
        all(map(torch.equal, parts_of(left.results[name]).values(), parts_of(right.results[name]).values()))
        for name in left.results
    )


KINDS = {
    "shared modulation": lambda: Transformer(2),
    "in-place blocks": lambda: Transformer(2, in_place=True),
    "keyword arguments": lambda: Transformer(2, keywords=True),
    "two outputs": Pairs,
    "skips": UNet,
    "skips, children called": lambda: UNet(children=True),
}


@functools.cache
def walked(kind: str, recipe: Recipe = W4A8) -> tuple[ReplayedModel, Walk]:
    """A model and its walk, made once for the tests that only read it."""
    model = replay(make(KINDS[kind]))
    return model, walk(model, recipe)


@pytest.mark.parametrize(
    "kind, parked", [*((kind, False) for kind in KINDS), ("in-place blocks", True), ("skips", True)]
)
def test_each_stream_is_the_model_run_whole(kind, parked, tmp_path, listing, monkeypatch):
    limits = {}
    if parked:
        monkeypatch.setattr(parking, "_SMALLEST", 1)
        limits = {"device_bytes": 40_000, "ram_bytes": 40_000}
    root = make(KINDS[kind])
    state, model = state_of(root), replay(root, tmp_path, **limits)
    made = walk(model, INT8, outside=["modulation"] if hasattr(root, "modulation") else [])
    assert made.unfollowed is None
    exact = run_whole(model, {})
    found = {
        stream: {index: outputs(value) for index, value in values.items()} for stream, values in made.streams.items()
    }
    assert same(found[Stream.ORIGINAL], exact)
    assert same(found[Stream.QUANTIZED], run_whole(model, made.linears()))
    assert same(found[Stream.WEIGHTS_ONLY], run_whole(model, made.linears(weights_only=True)))
    assert made.errors.quantized == pytest.approx(relative_error(found[Stream.QUANTIZED], exact), rel=1e-4)
    assert made.errors.weights_only == pytest.approx(relative_error(found[Stream.WEIGHTS_ONLY], exact), rel=1e-4)
    assert is_unchanged(root, state)
    assert listing() == []


def test_streams_go_through_reconstructed_blocks():
    model = replay(make(Pairs))
    made = walk(model, Recipe("asym_w4a8_int8", rounding="reconstructed", preset="none", num_iter=60))
    found = {index: outputs(value) for index, value in made.streams[Stream.QUANTIZED].items()}
    assert same(found, run_whole(model, made.linears()))
    assert "reconstructed" in {event.kept for event in made.finished}
    assert all(event.error <= event.calibrated_error for event in made.finished)


# What is kept


def test_layers_after_others_compensate_for_them():
    """The model's error is less than with layers that are calibrated one by one."""
    model, made = walked("skips")
    assert [event.kept for event in made.finished] == ["sequential"] * 5
    calibrated = run_whole(model, made.linears(plain=True))
    assert made.errors.quantized < 0.8 * relative_error(calibrated, run_whole(model, {}))


def test_layers_take_the_dampening_of_their_calibrated_rounding(monkeypatch):
    taken = []

    def quantize(layer, codecs, config, **options):
        taken.append(config.damping)
        return quantize_layer(layer, codecs, config, **options)

    monkeypatch.setattr(rounding, "quantize_layer", quantize)
    made = walk(replay(make(Pairs)))
    chosen = {name: pending.plain.solution.dampening for name, pending in made.pending.items()}
    assert set(chosen.values()) > {None}  # of layers that are rounded to nearest
    assert Counter(taken) == Counter(chosen.values())


@pytest.mark.parametrize("recipe", [W4A8, NVFP4, INT8], ids=lambda recipe: recipe.format.name)
def test_no_block_is_worse_than_calibrated(recipe):
    _, made = walked("two outputs", recipe)
    assert len(made.finished) == 2
    for event in made.finished:
        assert (event.error < event.calibrated_error) == (event.kept == "sequential")
        assert event.kept == "sequential" or event.error == event.calibrated_error


def test_block_keeps_calibrated_rounding_where_sequential_is_worse(monkeypatch):
    """Weights of a sequential result that are zero."""
    real = block.BlockRounding._round_layer

    def spoil(self, pending, activations):
        made = real(self, pending, activations)
        solution = replace(made.quantized.solution, scale=torch.zeros_like(made.quantized.scale))
        return replace(made, quantized=replace(made.quantized, solution=solution))

    monkeypatch.setattr(block.BlockRounding, "_round_layer", spoil)
    made = walk(replay(make(Pairs)), INT8)
    assert [event.kept for event in made.finished] == ["calibrated"] * 2
    assert all(made.results[name] is pending.plain for name, pending in made.pending.items())


def block_outputs(model: ReplayedModel, linears, *, validation: bool = True) -> dict[int, list[torch.Tensor]]:
    """Outputs of the first block in the whole model."""
    found: list[list[torch.Tensor]] = []
    first = {name: linear for name, linear in linears.items() if name.startswith("blocks.0.")}
    hook = model.root.blocks[0].register_forward_hook(lambda _, args, value: found.append(outputs(value)))
    try:
        with contextlib.ExitStack() as stack:
            for name, linear in first.items():
                stack.enter_context(replaced_forward(model.layers[name], linear))
            calls = [index for index, judges in enumerate(model.validation) if judges == validation]
            for index in calls:
                model.run(index)
    finally:
        hook.remove()
    return dict(zip(calls, found, strict=True))


def test_errors_of_blocks_are_those_of_their_outputs():
    """Of the first block, whose inputs are those of the original model."""
    model, made = walked("two outputs")
    exact, first = block_outputs(model, {}), made.finished[0]
    for attribute, layers in {
        "error": made.linears(),
        "calibrated_error": made.linears(plain=True),
        "weights_only_error": made.linears(weights_only=True),
    }.items():
        expected = relative_error(block_outputs(model, layers), exact)
        assert getattr(first, attribute) == pytest.approx(expected, rel=1e-4)


def test_sensitivity_between_measured_steps_is_interpolated(subtests):
    for points, position, value in [
        ([(0.5, 2.0)], 0.0, 2.0),
        ([(0.5, 2.0)], 1.0, 2.0),
        ([(0.2, 1.0), (0.6, 3.0)], 0.1, 1.0),
        ([(0.2, 1.0), (0.6, 3.0)], 0.2, 1.0),
        ([(0.2, 1.0), (0.6, 3.0)], 0.3, 1.5),
        ([(0.2, 1.0), (0.6, 3.0)], 0.6, 3.0),
        ([(0.2, 1.0), (0.6, 3.0)], 0.9, 3.0),
        ([(0.0, 1.0), (0.5, 3.0), (1.0, 2.0)], 0.75, 2.5),
    ]:
        with subtests.test(points=points, position=position, value=value):
            assert walking.interpolate(points, position) == pytest.approx(value)


def test_calls_are_weighted_by_the_sensitivity_of_the_layers_of_the_block():
    steps = {"blocks.0.image": [(0.0, 1.0), (1.0, 2.0)], "blocks.0.text": [(0.0, 4.0)]}
    model = replay(make(Pairs))
    with ModelWalk(model, list(model.layers), **OPTIONS, sensitivity=steps.get) as followed:
        known, unknown = (followed._call_weights(each) for each in followed.blocks)
    exact = [5 + position for position in model.positions]
    assert list(known.values()) == pytest.approx([weight / (sum(exact) / len(exact)) for weight in exact])
    assert set(unknown.values()) == {1.0}


def test_equal_weights_change_nothing_and_others_do():
    model = replay(make(Pairs))
    plain = walk(model)
    equal = walk(model, sensitivity=lambda layer: [(0.0, 7.0)])
    late = walk(model, sensitivity=lambda layer: [(0.0, 1e-6), (1.0, 1.0)])
    assert same_bytes(plain, equal)
    assert plain.finished == equal.finished
    assert plain.finished != late.finished


def test_events_of_blocks_are_in_order():
    _, made = walked("two outputs")
    around = [event for event in made.events if not isinstance(event, BlockAdvanced)]
    assert [(type(event), event.index, event.total, event.name) for event in around] == [
        (kind, index, 2, f"blocks.{index}") for index in range(2) for kind in (BlockStarted, BlockFinished)
    ]


def test_each_layer_of_a_block_and_the_comparison_are_reported():
    model, made = walked("two outputs")
    steps = [(event.step, event.done) for event in made.events if isinstance(event, BlockAdvanced) and event.index == 0]
    count = len(find_blocks(model, list(model.layers))[0].layers)
    assert steps == [*(("rounding", number) for number in range(count)), ("comparing", 0)]


def test_layers_outside_of_blocks_are_quantized_in_the_quantized_streams():
    model = replay(make(lambda: Transformer(1)))
    without, beside = walk(model), walk(model, outside=["modulation", "final"])
    assert without.results.keys() == beside.results.keys() - {"modulation", "final"}
    assert beside.errors.quantized > without.errors.quantized
    assert not torch.equal(without.results["blocks.0.q"].qdata, beside.results["blocks.0.q"].qdata)


def test_same_bytes_twice_and_other_tokens_with_another_seed(monkeypatch):
    monkeypatch.setattr(capture, "_LEAST_ROWS", 64)
    monkeypatch.setattr(capture, "_ROWS_PER_CHANNEL", 1)
    model = replay(make(Pairs))
    first, again, other = walk(model), walk(model), walk(model, seed=1)
    assert same_bytes(first, again)
    assert first.finished == again.finished
    assert not same_bytes(first, other)


def test_card_decides_whether_activations_are_quantized():
    model = replay(make(Pairs))
    native, older = walk(model, NVFP4), walk(model, NVFP4, capability=(8, 9))
    assert all(event.weights_only_error < event.error for event in native.finished)
    assert all(event.weights_only_error == event.error for event in older.finished)
    assert older.errors.quantized < native.errors.quantized
    assert older.errors.quantized < native.errors.weights_only
    assert not same_bytes(native, older)


def test_weights_only_is_not_measured_unless_asked():
    made = walk(replay(make(Pairs)), NVFP4, capability=(8, 9), weights_only=False)
    assert {event.weights_only_error for event in made.finished} == {None}
    assert {made.errors.weights_only} == {None}
    assert list(made.streams) == [Stream.ORIGINAL, Stream.QUANTIZED]


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


# Layers


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


def test_layer_that_stays_unquantized_runs_as_it_is():
    """A block goes on without a layer whose weight has NaN or Inf."""
    root = make(Pairs)
    model = replay(root)
    left_out = "blocks.0.text"
    made = walk(model, left_out={left_out})
    assert left_out not in made.results
    assert len(made.results) == 3
    found = {index: outputs(value) for index, value in made.streams[Stream.QUANTIZED].items()}
    assert same(found, run_whole(model, made.linears()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_leave_calibrated_rounding(bad):
    """A damaged weight makes all activations after it NaN or Inf."""
    root = make(Pairs)
    model = replay(root)
    known = calibrate(model)
    root.blocks[0].image.weight[0, 0] = bad
    made = walk(model, calibration=known, left_out={"blocks.0.image"})
    assert made.unfollowed is None
    assert made.errors is None
    assert made.finished == []
    assert len(made.results) == 3
    assert all(made.results[name] is pending.plain for name, pending in made.pending.items())


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


@pytest.mark.parametrize("calls", [{0}, {0, 2}, {0, 5}, {0, 4, 5}, {0, 1, 2, 3}, {4, 5}], ids=str)
def test_layer_that_some_calls_leave_out_is_rounded_with_the_others(calls):
    arguments = [(x, time.abs() if index in calls else -time.abs()) for index, (x, time) in enumerate(make_arguments())]
    model = replay(make(WithSometimes), arguments=arguments)
    made = walk(model)
    assert made.unfollowed is None
    assert made.results.keys() >= {"blocks.0.always", "blocks.1.always"}
    assert all(event.error <= event.calibrated_error for event in made.finished)


# Models that leave the path


class Detour(nn.Module):
    """Runs another block than in its first call, or none, where the time is negative."""

    def __init__(self, detour: str = "none"):
        super().__init__()
        self.blocks, self.detour = nn.ModuleList(Block() for _ in range(3)), detour

    def forward(self, x, time):
        x = self.blocks[0](x)
        if time.sum() > 0:
            return self.blocks[2](self.blocks[1](x))
        return {"none": lambda: x, "skip": lambda: self.blocks[2](x), "more": lambda: self._repeat(x)}[self.detour]()

    def _repeat(self, x):
        return self.blocks[2](self.blocks[2](self.blocks[1](x)))


@pytest.mark.parametrize("detour, followed", [("none", 1), ("skip", 1), ("more", 3)])
def test_call_on_another_path_is_named_and_later_blocks_stay_calibrated(detour, followed, sentences, caplog):
    arguments = [(x, -time.abs() if index == 3 else time.abs()) for index, (x, time) in enumerate(make_arguments())]
    root = make(lambda: Detour(detour))
    state = state_of(root)
    with caplog.at_level(logging.WARNING):
        made = walk(replay(root, arguments=arguments), INT8)
    sentences(made.unfollowed, caplog.messages)
    assert [event.name for event in made.finished] == [f"blocks.{index}" for index in range(followed)]
    later = [name for name in made.pending if int(name.split(".")[1]) >= followed]
    assert all(made.results[name] is made.pending[name].plain for name in later)
    assert made.results.keys() == made.pending.keys()
    assert made.errors is None
    assert is_unchanged(root, state)


def test_calls_without_others_to_judge_on_are_too_few(sentences, subtests):
    for count, judges in [(1, False), (1, True), (3, False), (0, False)]:
        with subtests.test(count=count, judges=judges):
            model = replay(make(Pairs), arguments=make_arguments(count), validation=[judges] * count)
            with ModelWalk(model, list(model.layers), **OPTIONS) as followed:
                sentences(followed.unfollowed)
                assert followed.blocks == []
                assert followed.round_block({}) == {}
                assert followed.model_errors() is None


def test_nothing_outlives_the_walk_of_a_block():
    """Weights, sampled inputs and calls are freed."""
    alive: list[weakref.ref] = []

    class Watched(block.BlockRounding):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            alive.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walking, "BlockRounding", Watched)
        walk(replay(make(Pairs)), INT8)
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_model_without_blocks_has_none(sentences):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, time):
            return self.layer(x)

    made = walk(replay(make(Flat)))
    sentences(made.unfollowed)
    assert made.results == {}
    assert made.events == []
    assert made.errors is None


# Ends


class Stop(BaseException):
    """What a host raises to cancel."""


def test_cancelling_at_any_check_leaves_the_model_as_it_was(tmp_path, listing, monkeypatch):
    monkeypatch.setattr(parking, "_SMALLEST", 1)
    root = make(Pairs)
    state, model, total = state_of(root), replay(root, tmp_path, device_bytes=0), 0

    def count():
        nonlocal total
        total += 1

    walk(model, INT8, check=count)
    assert total > 50
    for last in (*range(1, 16), *range(16, total, total // 10), total):
        left = last

        def stop():
            nonlocal left
            left -= 1
            if not left:
                raise Stop

        with pytest.raises(Stop):
            walk(model, INT8, check=stop)
        assert is_unchanged(root, state)
        assert listing() == []
        assert not [thread for thread in threading.enumerate() if thread.name == "learned-rounding-call"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [1, 9, 20, 30])
def test_error_of_a_block_leaves_the_model_as_it_was(error, calls):
    """Raised in the thread of a call, or in a block that runs while its call waits."""
    root = make(Pairs)
    state, model, left = state_of(root), replay(root), calls
    known = calibrate(model)

    def fail(module, args):
        nonlocal left
        left -= 1
        if not left:
            raise error("in a block")

    hook = root.blocks[1].text.register_forward_pre_hook(fail)
    with pytest.raises(error):
        walk(model, INT8, calibration=known)
    hook.remove()
    assert is_unchanged(root, state)
