"""What a run says of itself afterwards."""

import json
import math
from dataclasses import replace

import pytest

from learned_rounding.quant_core import Report
from learned_rounding.quant_core.display import human_bytes
from learned_rounding.quant_core.events import LayerFinished, LayerKept
from learned_rounding.quant_core.run.blocks import WalkSummary
from learned_rounding.quant_core.run.report import PartSummary


def layer(name: str, error: float, index: int = 0) -> LayerFinished:
    return LayerFinished(index, 3, name, (96, 32), "int8_tensorwise", "row", error, 0.5, 6144, 3500, 1.0, 2.0)


def report(*errors: float, **fields) -> Report:
    layers = [layer(f"blocks.{index}.weight", error, index) for index, error in enumerate(errors)]
    return Report("model.safetensors", "int8_tensorwise", "row", "auto", "flux", layers=layers, **fields)


def test_the_median_is_that_of_the_layers(subtests):
    for errors, median in [((0.3,), 0.3), ((0.1, 0.5), 0.3), ((0.5, 0.1, 0.2), 0.2), ((0.4, 0.1, 0.2, 0.9), 0.3)]:
        with subtests.test(errors=errors, median=median):
            assert report(*errors).median_error == pytest.approx(median)


def test_without_layers_there_is_no_median(sentences):
    assert math.isnan(report().median_error)
    assert report().worst == []
    sentences(report().table())


def test_the_worst_come_first():
    assert [found.weight_error for found in report(0.1, 0.3, 0.2).worst] == [0.3, 0.2, 0.1]


def test_json_holds_everything():
    made = report(
        0.1,
        0.2,
        kept=[LayerKept("a.bias", (8,), "not a weight"), LayerKept("b", (2, 2), "bad", planned=False)],
        bytes_in=10,
        bytes_out=5,
        output="out",
    )
    values = json.loads(made.to_json())
    assert values == json.loads(json.dumps(made.to_dict()))
    assert values["median_error"] == pytest.approx(0.15)
    assert values["layers"][1] == {**json.loads(json.dumps(vars(made.layers[1]))), "shape": [96, 32]}
    assert values["kept"] == [
        {"name": "a.bias", "shape": [8], "reason": "not a weight", "removed": False, "planned": True},
        {"name": "b", "shape": [2, 2], "reason": "bad", "removed": False, "planned": False},
    ]
    assert values["source"] == "model.safetensors"
    assert values["format"] == "int8_tensorwise"
    assert values["granularity"] == "row"
    assert values["rounding"] == "auto"
    assert values["preset"] == "flux"
    assert values["bytes_in"] == 10
    assert values["bytes_out"] == 5
    assert values["output"] == "out"
    assert values["already_done"] is False
    assert values["device"] == "cpu"


def test_json_gives_the_report_back():
    made = report(0.1, 0.2, kept=[LayerKept("a.bias", (8,), "not a weight")], bytes_in=10)
    values = json.loads(made.to_json())
    for summary in ("median_error", "median_output_error", "median_gain", "solvers"):
        values.pop(summary)
    layers = [LayerFinished(**{**entry, "shape": tuple(entry["shape"])}) for entry in values.pop("layers")]
    kept = [LayerKept(**{**entry, "shape": tuple(entry["shape"])}) for entry in values.pop("kept")]
    assert Report(**values, layers=layers, kept=kept) == made


def test_json_without_layers_is_still_json():
    """NaN is no JSON."""
    assert json.loads(report().to_json(), parse_constant=pytest.fail)["median_error"] is None


def test_the_table_says_what_happened(sentences):
    made = report(
        *(index / 100 for index in range(1, 8)),
        kept=[LayerKept("a.bias", (8,), "not a weight")] * 3 + [LayerKept("n.weight", (8,), "normalisation")],
        bytes_in=2_000_000,
        bytes_out=1_000_000,
        output="out.safetensors",
        seconds=3.21,
    )
    sentences(made.table())
    five, one = (made.table(worst=count).count("\n") for count in (5, 1))
    assert five == one + 4


def test_every_text_encoder_has_its_summary():
    sequential = {part: WalkSummary("9.0", 4, error) for part, error in {"clip_l": 0.0123456, "t5xxl": 0.05}.items()}
    made = report(0.1, parts={part: PartSummary(sequential=summary) for part, summary in sequential.items()})
    assert [line.split()[:4] for line in made.table().splitlines() if line.startswith("model output")] == [
        ["model", "output,", part, "error"] for part in sequential
    ]
    assert "error 0.0123 as run on SM 9.0; 4 recorded calls" in made.markdown()
    assert json.loads(made.to_json())["parts"]["t5xxl"]["sequential"]["output_error"] == 0.05


def test_the_table_says_which_solver_won_and_by_how_much(sentences):
    layers = [
        replace(layer(f"blocks.{index}.weight", 0.1, index), solver=solver, gain=gain, output_error=error, note=note)
        for index, (solver, gain, error, note) in enumerate(
            [("gptq", 0.4, 0.01, ""), ("nearest", 1.0, 0.03, "rounded on the CPU"), ("gptq", 0.5, 0.02, "")]
        )
    ]
    made = Report("model.safetensors", "int8_tensorwise", "row", "calibrated", "flux", layers=layers)
    sentences(made.table())
    assert made.to_dict()["solvers"] == {"gptq": 2, "nearest": 1}
    sentences(report(0.1).table())
    assert report(0.1).to_dict()["median_gain"] is None


def test_layers_that_could_not_be_quantized_stand_out(sentences):
    made = report(
        0.1, kept=[LayerKept("a.bias", (8,), "not a weight"), LayerKept("b.weight", (2, 2), "holds NaN", planned=False)]
    )
    assert [kept.name for kept in made.unplanned] == ["b.weight"]
    sentences(made.table())


def test_a_run_that_was_done_already_says_only_that(sentences):
    sentences(report(already_done=True, output="out").table())


def test_markdown_holds_the_totals_and_the_worst_layers(sentences):
    made = report(0.1, 0.3, 0.2, bytes_in=2_000_000, bytes_out=1_000_000)
    lines = made.markdown(worst=2).splitlines()
    assert [line.split(" | ")[0].lstrip("| ") for line in lines[-2:]] == ["blocks.1.weight", "blocks.2.weight"]
    sentences(lines, report().markdown(), report(already_done=True, output="out").markdown())


def test_sizes_are_decimal_with_three_digits(subtests):
    for count, text in [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (19_200_000, "19.2 MB"),
        (23_800_000_000, "23.8 GB"),
        (10**12, "1 TB"),
        (5 * 10**15, "5e+03 TB"),
        (10**6, "1 MB"),
        (10**9, "1 GB"),
    ]:
        with subtests.test(count=count, text=text):
            assert human_bytes(count) == text


def test_sizes_just_below_a_unit_are_not_written_as_powers(subtests):
    for count in [999_600, 999_999, 999_999_999]:
        with subtests.test(count=count):
            assert "e+" not in human_bytes(count)


def test_the_summary_has_no_nan():
    assert report(bytes_in=10).summarize()["median_error"] is None


def test_the_summary_of_an_output_that_was_done_has_no_sizes():
    assert report(0.1, bytes_in=10, already_done=True).summarize()["bytes_in"] is None


def test_the_summary_is_plain_data():
    made = report(0.1, 0.3, bytes_in=10, bytes_out=5, output="out")
    assert json.loads(json.dumps(made.summarize())) == made.summarize()
