"""The table of lrq bench: facts on every format, and times of every layer that it can store."""

import pytest
import torch

from learned_rounding.kernels import tuning
from learned_rounding.quant_core.formats import FORMATS
from learned_rounding.quant_core.run.card_bench import (
    FLUX_SHAPES,
    describe_card,
    find_shapes,
    measure_card,
    summarize_card,
)
from learned_rounding.quant_core.run.card_times import UNQUANTIZED, CardTimes
from learned_rounding.quant_core.sources import TensorSource


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))


@pytest.fixture
def times():
    """A card on which FP8 is not measured, and everything else takes half of the time of bfloat16."""

    def measure(codec, shape):
        return None if codec and codec.format.name == "float8_e4m3fn" else (1.0 if codec else 2.0) * shape[0] / 1024

    return CardTimes("NVIDIA Test", "8.9", {"torch": "2.13"}, measure=measure)


def test_every_format_is_measured_for_every_shape(times):
    measure_card(times, FLUX_SHAPES)
    names = {name.split()[0] for name, _ in times.times}
    assert names == {UNQUANTIZED, *FORMATS}
    assert {shape for _, shape in times.times} == set(FLUX_SHAPES)
    assert any(name.endswith(", smoothed") for name, _ in times.times)


def test_formats_that_cannot_hold_a_layer_are_left_out(times):
    measure_card(times, [(64, 20)])
    names = {name for name, _ in times.times}
    assert "int8_tensorwise per row" in names
    assert not any("ConvRot" in name for name in names)


def test_shapes_of_a_model_are_those_of_its_layers():
    tensors = {
        "blocks.0.attn.weight": torch.randn(64, 32),
        "blocks.1.attn.weight": torch.randn(64, 32),
        "blocks.0.mlp.weight": torch.randn(48, 64),
        "norm.weight": torch.randn(32),
    }
    assert find_shapes(TensorSource(tensors)) == [(64, 32), (48, 64)]


def test_plain_values_hold_facts_and_times(times):
    measure_card(times, [(1024, 1024)])
    summary = summarize_card(times)
    assert summary["formats"]["nvfp4 per group of 16"] == "decoded"
    assert summary["formats"]["float8_e4m3fn per tensor"] == "native, E4M3 activations"
    rows = {row["format"]: (row["milliseconds"], row["ratio"]) for row in summary["layers"]}
    assert rows["int8_tensorwise per row"] == (1.0, 0.5)
    assert rows["float8_e4m3fn per tensor"] == (None, None)
    assert CardTimes.from_dict(summary).times == times.times


def test_the_text_reports_what_is_not_measured(times, sentences):
    measure_card(times, [(1024, 64)])
    sentences(describe_card(times), describe_card(CardTimes("", "12.0", {})))
