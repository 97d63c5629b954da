"""Recorded calls as streams: each advances block by block, and a block can be run while its call waits."""

import threading

import pytest
import torch
from torch import nn

from learned_rounding.quant_core.sequential import Block, UnfollowedModelError
from learned_rounding.quant_core.sequential.streams import Stream, Streams

from .models import Pairs, Transformer, make, make_arguments, outputs, replay

MIB = 1 << 20


class Stop(Exception):
    """What a host raises to cancel."""


def open_streams(kind=Pairs, *args, folder=None, arguments=None, check=lambda: None, weights_only=False, **options):
    """Streams of a model, and the model with its recorded calls."""
    limits = {name: options.pop(name) for name in ("device_bytes", "ram_bytes") if name in options}
    root = make(kind, *args, **options)
    model = replay(root, folder, arguments=arguments, **limits)
    blocks = [Block(f"blocks.{index}", block, ()) for index, block in enumerate(root.blocks)]
    return Streams(model, blocks, check, weights_only=weights_only), model


def test_calls_are_divided_into_calibration_and_validation():
    streams, _ = open_streams()
    assert streams.calibration == [0, 1, 2, 3]
    assert streams.validation == [4, 5]


@pytest.mark.parametrize("weights_only", [False, True])
def test_third_stream_is_carried_on_request(weights_only):
    streams, _ = open_streams(weights_only=weights_only)
    third = [Stream.WEIGHTS_ONLY] if weights_only else []
    assert streams.carried == [Stream.ORIGINAL, Stream.QUANTIZED, *third]


def test_third_stream_has_validation_calls_only():
    streams, _ = open_streams(weights_only=True)
    assert list(streams._calls[Stream.WEIGHTS_ONLY]) == streams.validation


def test_results_are_those_of_the_model():
    streams, model = open_streams()
    with streams:
        for position in range(3):
            streams.advance(Stream.ORIGINAL, {}, position)
        found = streams.results(Stream.ORIGINAL)
    assert found.keys() == set(streams.validation)
    for index, tensors in found.items():
        assert all(map(torch.equal, tensors, outputs(model.run(index))))


def test_block_runs_while_its_call_waits_and_the_call_stays():
    streams, model = open_streams()
    with streams:
        streams.advance(Stream.ORIGINAL, {}, 0)
        first, second = (streams.run(Stream.ORIGINAL, 0, {}) for _ in range(2))
        waiting = streams._calls[Stream.ORIGINAL][0].waiting
        assert waiting.block is model.root.blocks[0]
    assert all(map(torch.equal, first, second))


def test_block_that_changes_its_inputs_in_place_gives_the_same_again():
    streams, _ = open_streams(Transformer, 1, in_place=True)
    with streams:
        streams.advance(Stream.ORIGINAL, {}, 0)
        first, second = (streams.run(Stream.ORIGINAL, 0, {}) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_layers_are_replaced_during_the_run_only():
    streams, model = open_streams()
    layer = model.root.blocks[0].image
    with streams:
        streams.advance(Stream.ORIGINAL, {}, 0)
        plain = streams.run(Stream.ORIGINAL, 0, {})
        replaced = streams.run(Stream.ORIGINAL, 0, {"blocks.0.image": lambda x: x * 2})
        again = streams.run(Stream.ORIGINAL, 0, {})
    assert not torch.equal(plain[0], replaced[0])
    assert torch.equal(plain[0], again[0])
    assert "forward" not in vars(layer)


class Skipping(nn.Module):
    """Leaves out its first block where the time is negative."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x, time):
        return self.blocks[1](self.blocks[0](x) if time.sum() > 0 else x)


def test_call_on_another_path_is_refused_by_the_names_of_the_blocks(sentences):
    arguments = [(x, -time.abs() if index == 3 else time.abs()) for index, (x, time) in enumerate(make_arguments())]
    streams, _ = open_streams(Skipping, arguments=arguments)
    with streams, sentences.raises(UnfollowedModelError):
        streams.advance(Stream.ORIGINAL, {}, 0)


def test_advancing_can_be_cancelled_before_each_call():
    checks = iter([None] * 3)

    def check():
        if next(checks, Stop) is Stop:
            raise Stop

    streams, model = open_streams(check=check)
    with pytest.raises(Stop), streams:
        streams.advance(Stream.ORIGINAL, {}, 0)
    assert not any("forward" in vars(module) for module in model.root.modules())


def large_arguments():
    """Two calls with tensors of more than 1 MiB."""
    return [(x.repeat(1, 200, 1), time) for x, time in make_arguments(2)]


def test_nothing_is_left_of_parked_calls_when_their_streams_are_closed(tmp_path, listing):
    streams, model = open_streams(folder=tmp_path, arguments=large_arguments(), device_bytes=0, ram_bytes=0)
    with streams:
        for stream in streams.carried:
            streams.advance(stream, {}, 0)
        assert len(listing()) == 4  # a file for each call of each stream
    assert listing() == []
    assert not any("forward" in vars(module) for module in model.root.modules())
    assert not [thread for thread in threading.enumerate() if thread.name == "learned-rounding-call"]


@pytest.mark.parametrize("limits", [(1 << 30, 0), (0, 1 << 30), (0, 0), (2 * MIB, 2 * MIB)])
def test_parked_calls_compute_what_others_compute(tmp_path, listing, limits):
    device_bytes, ram_bytes = limits
    streams, model = open_streams(
        folder=tmp_path, arguments=large_arguments(), device_bytes=device_bytes, ram_bytes=ram_bytes
    )
    expected = {index: model.run(index) for index in streams.validation + streams.calibration}
    with streams:
        for position in range(len(model.root.blocks) + 1):
            streams.advance(Stream.ORIGINAL, {}, position)
            if position < len(model.root.blocks):
                streams.run(Stream.ORIGINAL, 0, {})
        found = {index: call.result for index, call in streams._calls[Stream.ORIGINAL].items()}
    assert listing() == []
    for index, value in expected.items():
        assert all(map(torch.equal, outputs(found[index]), outputs(value)))
