"""Groups and plans are run: the files are those of single runs, errors are outcomes, complete outputs stay."""

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.batch.run import (
    GroupStarted,
    OutputAdvanced,
    OutputFinished,
    preview_group,
    run_group,
    run_plan,
)
from learned_rounding.quant_core.calibration import CalibrationFile
from learned_rounding.quant_core.events import DeviceFailed, LayerFinished, LayerStarted

CPU = torch.device("cpu")
TWO = [torch.device("cpu", 0), torch.device("cpu", 1)]
ONE = """
general = true
sources = ["a.safetensors"]
[recipes.int8]
format = "int8_tensorwise"
convrot = false
rounding = "nearest"
[recipes.fp8]
format = "fp8"
rounding = "nearest"
"""
SEVERAL = ONE.replace('"a.safetensors"', '"*.safetensors"')


class Events(list):
    """Listener that keeps all events."""

    __call__ = list.append

    def of(self, kind: type) -> list:
        return [event for event in self if isinstance(event, kind)]


class Stopped(Exception):
    """A user cancels."""


@pytest.fixture
def events():
    return Events()


@pytest.fixture
def models(model, model_file):
    model_file("a.safetensors")
    model_file("b.safetensors", model(1))


@pytest.fixture
def calibrated(models, tmp_path):
    """A calibration of one layer, as c.calib.safetensors."""
    inputs = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    layer = "blocks.0.attn.qkv"
    statistics = {f"{layer}.gram": inputs.t() @ inputs / 200, f"{layer}.mean": inputs.mean(0)}
    save_file(statistics, tmp_path / "c.calib.safetensors")
    return tmp_path / "c.calib.safetensors"


def never() -> None:
    """A check that cancels nothing."""


def statuses(outcomes) -> list[str]:
    return [outcome.status for outcome in outcomes]


def run(plan, events=lambda event: None):
    """Outcomes of all groups of a plan, one group after the other."""
    return [outcome for group in plan.groups for outcome in run_group(group, CPU, events, never)]


def test_outputs_are_those_of_single_runs(planned, models, tmp_path, subtests):
    (group,) = planned(ONE).groups
    run_group(group, CPU, lambda event: None, never)
    for output in group.outputs:
        with subtests.test(output.name):
            quantize_file(group.source, tmp_path / "single.safetensors", output.recipe, overwrite=True, device=CPU)
            assert output.path.read_bytes() == (tmp_path / "single.safetensors").read_bytes()


def test_calibrated_and_uncalibrated_outputs_are_those_of_single_runs(planned, calibrated, tmp_path, subtests):
    text = 'general = true\nsources = ["a.safetensors"]\n[recipes.plain]\n[recipes.gptq]\ncalibration = "c.calib.safetensors"\n'
    (group,) = planned(text).groups
    run_group(group, CPU, lambda event: None, never)
    for output in group.outputs:
        with subtests.test(output.name), CalibrationFile(calibrated) as calibration:
            used = calibration if output.name == "gptq" else None
            single = tmp_path / "single.safetensors"
            quantize_file(group.source, single, output.recipe, calibration=used, overwrite=True, device=CPU)
            assert output.path.read_bytes() == single.read_bytes()


def test_outcomes_are_those_of_the_runs(planned, models, tmp_path):
    outcomes = run(planned(ONE))
    assert [(each.name, each.status, each.summary["layers"]) for each in outcomes] == [
        ("int8", "done", 6),
        ("fp8", "done", 6),
    ]


def test_the_summary_has_the_size_of_the_file(planned, models):
    for outcome in run(planned(ONE)):
        assert outcome.summary["bytes_out"] == Path(outcome.output).stat().st_size


def test_the_same_plan_again_is_done_already(planned, models, listing):
    run(planned(SEVERAL))
    before = listing()
    assert statuses(run(planned(SEVERAL))) == ["already done"] * 4
    assert listing() == before


def test_what_is_already_done_has_the_sizes_of_its_files(planned, models, tmp_path):
    run(planned(ONE))
    outcome = run(planned(ONE))[0]
    sizes = [(tmp_path / name).stat().st_size for name in ("a.safetensors", "a_int8.safetensors")]
    assert [outcome.summary["bytes_in"], outcome.summary["bytes_out"]] == sizes


def test_a_changed_recipe_makes_only_its_own_outputs_again(planned, models):
    run(planned(ONE))
    changed = ONE.replace('"fp8"', '"float8_e5m2"') + "\n"
    assert statuses(run(planned("overwrite = true\n" + changed))) == ["already done", "done"]


def test_a_file_in_the_way_of_one_output_leaves_the_others(planned, models, tmp_path, sentences):
    (tmp_path / "a_int8.safetensors").write_text("in the way")
    outcomes = run(planned(ONE))
    assert statuses(outcomes) == ["failed", "done"]
    assert (tmp_path / "a_int8.safetensors").read_text() == "in the way"
    sentences(outcomes[0].error["message"])


def test_a_damaged_source_is_an_outcome_of_all_its_outputs(planned, models, tmp_path, sentences):
    (tmp_path / "a.safetensors").write_text("damaged")
    outcomes = run(planned(SEVERAL))
    assert statuses(outcomes) == ["failed", "failed", "done", "done"]
    assert outcomes[0].traceback.startswith("Traceback")
    sentences(outcomes[0].error["message"])


def test_an_unexpected_error_is_an_outcome(planned, models):
    (group,) = planned(ONE).groups

    def fail(event):
        if isinstance(event, OutputAdvanced) and isinstance(event.event, LayerStarted):
            raise KeyError("name")

    assert {outcome.error["type"] for outcome in run_group(group, CPU, fail, never)} == {"KeyError"}


def test_a_quantized_source_is_dequantized_if_asked_for(planned, models, tmp_path, events):
    quantize_file(tmp_path / "a.safetensors", tmp_path / "q.safetensors", Recipe(format="int8_tensorwise"), device=CPU)
    text = 'general = true\nsources = ["q.safetensors"]\n[recipes.fp8]\n'
    assert run(planned(text))[0].error["type"] == "AlreadyQuantizedError"
    assert statuses(run(planned("requantize = true\n" + text), events)) == ["done"]
    assert "int8_tensorwise" in events.of(GroupStarted)[0].note


def test_events_name_their_output(planned, models, events, tmp_path):
    run(planned(ONE), events)
    finished = [event.output.name for event in events.of(OutputAdvanced) if isinstance(event.event, LayerFinished)]
    assert {name: finished.count(name) for name in finished} == {"a_int8.safetensors": 6, "a_fp8.safetensors": 6}


def test_every_output_is_finished_once(planned, models, events):
    outcomes = run(planned(SEVERAL), events)
    assert [event.outcome for event in events.of(OutputFinished)] == outcomes


def test_after_a_cancellation_complete_outputs_stay_and_nothing_else(planned, models, listing):
    """The second group is cancelled at its first layer."""
    plan = planned(SEVERAL)
    seen = Events()

    def check():
        if len(seen.of(GroupStarted)) == 2 and any(
            event.output.name.startswith("b") for event in seen.of(OutputAdvanced)
        ):
            raise Stopped

    with pytest.raises(Stopped):
        run_plan(plan, [CPU], seen, check)
    assert [name for name in listing() if name.endswith(".safetensors")] == [
        "a.safetensors",
        "a_fp8.safetensors",
        "a_int8.safetensors",
        "b.safetensors",
    ]
    assert [name for name in listing() if name.startswith(".")] == []


def test_a_cancelled_group_has_no_outcomes(planned, models, events):
    def check():
        if events.of(OutputAdvanced):
            raise Stopped

    with pytest.raises(Stopped):
        run_plan(planned(ONE), [CPU], events, check)
    assert events.of(OutputFinished) == []


@pytest.mark.soak
def test_two_devices_write_the_same_files_as_one(planned, models, events, tmp_path, subtests):
    """A damaged source among them leaves the other groups."""
    (tmp_path / "c.safetensors").write_text("damaged")
    plan = planned(SEVERAL)
    run_plan(plan, TWO, events, never)
    outcomes = [event.outcome for event in events.of(OutputFinished)]
    assert sorted((each.source_name, each.status) for each in outcomes) == [
        ("a", "done"), ("a", "done"), ("b", "done"), ("b", "done"), ("c", "failed"), ("c", "failed"),
    ]  # fmt: skip
    for group in plan.groups[:2]:
        for output in group.outputs:
            with subtests.test(output.path.name):
                made = output.path.read_bytes()
                output.path.unlink()
                quantize_file(group.source, output.path, output.recipe, device=CPU)
                assert made == output.path.read_bytes()


@pytest.mark.soak
def test_the_group_of_a_lost_device_goes_to_another(planned, models, events):
    """The process of one device is killed before its group."""
    killed = []

    def kill():
        for child in () if killed else psutil.Process().children():
            if "cpu:0" in child.cmdline():
                killed.append(child)
                child.kill()

    run_plan(planned(SEVERAL), TWO, events, kill)
    assert statuses(event.outcome for event in events.of(OutputFinished)) == ["done"] * 4
    assert [(event.lost, event.device) for event in events.of(DeviceFailed)] == [(True, "cpu:0")]


@pytest.mark.soak
def test_after_a_cancellation_of_two_devices_nothing_incomplete_is_left(planned, model_file, tmp_path, listing):
    """The layers take long enough for hidden files to be seen."""
    generator = torch.Generator().manual_seed(0)
    layers = {f"blocks.{index}.a.weight": torch.randn(512, 512, generator=generator) for index in range(24)}
    for name in ("a.safetensors", "b.safetensors"):
        model_file(name, layers)
    plan = planned(SEVERAL.replace('"nearest"', '"principal"'))
    before = listing()

    def check():
        if any(tmp_path.glob(".*.partial")):
            raise Stopped

    with pytest.raises(Stopped):
        run_plan(plan, TWO, Events(), check)
    assert listing() == before


def test_a_preview_shows_what_is_done_and_what_would_run(planned, models, tmp_path):
    run(planned(ONE))
    (tmp_path / "a_fp8.safetensors").unlink()
    assert statuses(preview_group(planned(ONE).groups[0])) == ["already done", "not run"]


def test_a_preview_has_the_sizes(planned, models):
    (group,) = planned(ONE).groups
    previewed, made = preview_group(group), run_group(group, CPU, lambda event: None, never)
    for before, after in zip(previewed, made, strict=True):
        assert before.summary["layers"] == after.summary["layers"]
        assert before.summary["bytes_out"] == pytest.approx(after.summary["bytes_out"], rel=0.5)


def test_a_preview_reports_errors_that_a_run_would_have(planned, models, tmp_path, subtests):
    (tmp_path / "a_int8.safetensors").write_text("in the way")
    assert statuses(preview_group(planned(ONE).groups[0])) == ["failed", "not run"]
    (tmp_path / "a.safetensors").write_text("damaged")
    assert statuses(preview_group(planned(ONE).groups[0])) == ["failed", "failed"]


def test_a_preview_writes_nothing(planned, models, listing):
    plan = planned(SEVERAL)
    before = listing()
    for group in plan.groups:
        preview_group(group)
    assert listing() == before
