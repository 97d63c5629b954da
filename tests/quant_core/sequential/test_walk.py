"""Following a model block by block: its streams, what is kept of each block, and models that leave the path."""

import gc
import logging
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.events import BlockAdvanced, BlockFinished, BlockStarted
from learned_rounding.quant_core.sequential import (
    ModelWalk,
    block,
    capture,
    find_blocks,
    parking,
)
from learned_rounding.quant_core.sequential import walk as walking
from learned_rounding.quant_core.sequential.streams import Stream

from .models import (
    WIDTH,
    Block,
    Pairs,
    Transformer,
    calibrate,
    make,
    make_arguments,
    outputs,
    replay,
)
from .walks import (
    INT8,
    KINDS,
    NVFP4,
    OPTIONS,
    W4A8,
    block_outputs,
    is_unchanged,
    relative_error,
    run_whole,
    same,
    same_bytes,
    state_of,
    walk,
    walked,
)


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


def test_streams_go_through_reconstructed_blocks(twice_as_wide):
    model = replay(make(Pairs))
    made = walk(model, Recipe("asym_w4a8_int8", rounding="reconstructed", preset="none", num_iter=60))
    found = {index: outputs(value) for index, value in made.streams[Stream.QUANTIZED].items()}
    assert same(found, run_whole(model, made.linears()))
    assert "reconstructed" in {event.kept for event in made.finished}
    assert all(event.error <= event.calibrated_error for event in made.finished)


# What is kept


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


def test_same_bytes_twice_and_other_tokens_with_another_seed(monkeypatch, twice_as_wide):
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


# Layers


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


@pytest.mark.soak
def test_cancelling_at_any_check_leaves_the_model_as_it_was(tmp_path, listing, monkeypatch):
    monkeypatch.setattr(parking, "_SMALLEST", 1)
    root = make(Pairs)
    state, model, total = state_of(root), replay(root, tmp_path, device_bytes=0), 0

    def count():
        nonlocal total
        total += 1

    walk(model, INT8, check=count)
    assert total > 50
    for last in (1, 2, 3, 5, 8, 12, *range(16, total, total // 6), total):
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


@pytest.mark.parametrize(
    "error, calls", [(ValueError, 1), (KeyboardInterrupt, 9), (ValueError, 20), (KeyboardInterrupt, 30)]
)
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
