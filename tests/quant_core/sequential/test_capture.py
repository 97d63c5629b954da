"""Sampled inputs of the layers of a block."""

import pytest
import torch

from learned_rounding.quant_core.sequential import Block, capture
from learned_rounding.quant_core.sequential.capture import InputSampler
from learned_rounding.quant_core.sequential.streams import Stream, Streams

from .models import TOKENS, WIDTH, Pairs, make, replay

IMAGE, TEXT = "blocks.0.image", "blocks.0.text"


@pytest.fixture
def waiting():
    """Streams of which all original calls wait at the first block, and the layers of the model."""
    root = make(Pairs)
    model = replay(root)
    blocks = [Block(f"blocks.{index}", block, ()) for index, block in enumerate(root.blocks)]
    with Streams(model, blocks, lambda: None, weights_only=False) as streams:
        streams.advance(Stream.ORIGINAL, {}, 0)
        yield streams, model.layers


def make_sampler(waiting, seed: int = 0, width: int = WIDTH) -> InputSampler:
    streams, layers = waiting
    return InputSampler(streams, layers, dict.fromkeys(layers, width), seed)


def test_all_tokens_are_taken_where_they_are_few(waiting):
    sampled = make_sampler(waiting).sample(Stream.ORIGINAL, 0, [IMAGE, TEXT], {})
    assert sampled[IMAGE].shape == (TOKENS, WIDTH)
    assert sampled[TEXT].shape == (4, WIDTH)


def test_inputs_are_those_of_the_block(waiting):
    streams, _ = waiting
    image, text = streams._calls[Stream.ORIGINAL][0].waiting.args
    sampled = make_sampler(waiting).sample(Stream.ORIGINAL, 0, [IMAGE, TEXT], {})
    assert torch.equal(sampled[IMAGE], image.flatten(0, 1))
    assert torch.equal(sampled[TEXT], text.flatten(0, 1))


def test_block_ends_when_its_layers_are_reached(waiting, monkeypatch):
    _, layers = waiting
    ran = []
    monkeypatch.setattr(layers[TEXT], "forward", lambda x: ran.append(x) or x)
    make_sampler(waiting).sample(Stream.ORIGINAL, 0, [IMAGE], {})
    assert ran == []


def test_replaced_layers_run_in_place_of_those_of_the_model(waiting):
    """The first layer is sampled and then runs, because the second one is still to be reached."""
    ran = []
    make_sampler(waiting).sample(Stream.ORIGINAL, 0, [IMAGE, TEXT], {IMAGE: lambda x: ran.append(x) or x})
    assert len(ran) == 1


def test_forward_is_that_of_the_layer(waiting):
    _, layers = waiting
    assert make_sampler(waiting).forward(IMAGE) == layers[IMAGE].forward


@pytest.fixture
def few(monkeypatch):
    """Room for 16 tokens of a calibration call and 10 of a validation call."""
    monkeypatch.setattr(capture, "_LEAST_ROWS", 64)
    monkeypatch.setattr(capture, "_ROWS_PER_CHANNEL", 1)
    monkeypatch.setattr(capture, "_VALIDATION_ROWS", 20)


@pytest.mark.parametrize("call, count", [(0, 16), (5, 10)], ids=["calibration", "validation"])
def test_tokens_are_limited_over_all_calls_of_a_kind(waiting, few, call, count):
    sampled = make_sampler(waiting).sample(Stream.ORIGINAL, call, [IMAGE], {})
    assert len(sampled[IMAGE]) == count


def test_wide_layers_have_more_tokens(waiting, few):
    sampled = make_sampler(waiting, width=128).sample(Stream.ORIGINAL, 0, [IMAGE], {})
    assert len(sampled[IMAGE]) == 32


def test_the_same_tokens_are_drawn_again_and_others_with_another_seed_or_call(waiting, few):
    def tokens(seed: int, call: int) -> list[int]:
        return make_sampler(waiting, seed)._tokens(IMAGE, call, TOKENS, torch.device("cpu")).tolist()

    assert tokens(0, 0) == tokens(0, 0)
    assert tokens(0, 0) == sorted(tokens(0, 0))
    assert tokens(0, 0) != tokens(1, 0)
    assert tokens(0, 0) != tokens(0, 1)
