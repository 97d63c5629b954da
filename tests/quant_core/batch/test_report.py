"""The report of a batch: stable JSON, a table per source, values of earlier runs, both files whole."""

import json
from dataclasses import replace

import pytest
import torch

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.batch import BatchPlan, Group, Outcome, Output
from learned_rounding.quant_core.batch.report import BatchReport, describe_outcome
from learned_rounding.quant_core.errors import OutputError, SourceError
from learned_rounding.quant_core.failures import describe_error

CPU = (torch.device("cpu"),)
SUMMARY = {
    "output": "a_r.safetensors",
    "already_done": False,
    "format": "int8_tensorwise",
    "granularity": "row",
    "rounding": "nearest",
    "preset": "flux",
    "bytes_in": 2_000_000,
    "bytes_out": 1_000_000,
    "seconds": 1.5,
    "device": "cpu",
    "layers": 6,
    "resumed": 0,
    "unquantized": 3,
    "median_error": 0.0123,
    "median_output_error": None,
    "warnings": [],
}


@pytest.fixture
def plan(tmp_path):
    """A plan of the sources a and b with the recipes r and s."""
    groups = tuple(
        Group(
            tmp_path / f"{name}.safetensors",
            name,
            tuple(Output(recipe, Recipe(), tmp_path / f"{name}_{recipe}.safetensors") for recipe in "rs"),
        )
        for name in "ab"
    )
    return BatchPlan(tmp_path / "plan.toml", groups, tmp_path / "plan")


def outcome(plan, source: int, output: int, status: str = "done", **values) -> Outcome:
    group = plan.groups[source]
    made = group.outputs[output]
    values = {"summary": SUMMARY} | values if status in ("done", "already done") else values
    return Outcome(str(group.source), group.name, made.name, str(made.path), status, 2.5, **values)


@pytest.fixture
def report(plan):
    """A report with an output of every status."""
    made = BatchReport(plan, CPU)
    made.add(outcome(plan, 0, 0))
    made.add(outcome(plan, 0, 1, "already done", summary={**SUMMARY, "already_done": True, "median_error": None}))
    made.add(outcome(plan, 1, 0, "failed", error=describe_error(SourceError("b is | damaged\x1b[2J."))))
    return made


def test_outputs_are_in_the_order_of_the_plan(report):
    assert [(each["name"], each["recipe"], each["status"]) for each in report.to_dict()["files"]] == [
        ("a", "r", "done"),
        ("a", "s", "already done"),
        ("b", "r", "failed"),
        ("b", "s", "not run"),
    ]


def test_statuses_are_counted(report):
    assert report.counts == {"done": 1, "already done": 1, "failed": 1, "not run": 1}


def test_the_keys_of_a_document_are_stable(report):
    assert list(report.to_dict()) == ["version", "command", "error", "plan", "device", "warnings", "files"]


def test_the_keys_of_an_output_are_stable(report):
    assert set(report.to_dict()["files"][0]) == {"input", "name", "recipe", "status", "error", *SUMMARY}


def test_an_output_without_a_run_has_its_keys_without_a_summary(report):
    keys = ["input", "name", "recipe", "output", "status", "error", "seconds"]
    assert [list(entry) for entry in report.to_dict()["files"][2:]] == [keys, keys]


def test_an_error_is_described(report):
    assert report.to_dict()["files"][2]["error"]["type"] == "SourceError"


def test_the_traceback_is_not_reported(plan):
    assert "Traceback!" not in json.dumps(
        describe_outcome(outcome(plan, 0, 0, "failed", error={}, traceback="Traceback!"))
    )


def test_the_table_in_markdown(report, sentences):
    sentences(report.markdown())


def test_a_batch_that_ended_early_is_reported(report, sentences):
    text = report.markdown({"type": "KeyboardInterrupt", "message": "interrupted."})
    sentences(text.split("\n\n")[2])


def test_warnings_are_reported(report):
    report.warn("cuda:1 was lost.")
    assert report.to_dict()["warnings"] == ["cuda:1 was lost."]
    assert "cuda:1 was lost." in report.markdown()


def test_names_cannot_become_markdown(plan, tmp_path):
    made = BatchReport(plan, CPU)
    made.add(outcome(plan, 0, 0, "failed", error={"message": "<script> [a](b)\nx | y"}))
    text = made.markdown()
    assert "<script>" not in text.replace("\\<", "")
    assert "[a]" not in text


def test_both_files_are_written(report, listing, tmp_path):
    report.save()
    assert listing() == ["plan.json", "plan.md"]
    assert json.loads((tmp_path / "plan.json").read_text()) == report.to_dict()
    assert (tmp_path / "plan.md").read_text(encoding="utf-8") == report.markdown()


def test_a_report_in_a_new_folder(plan, tmp_path):
    BatchReport(replace(plan, report=tmp_path / "new" / "r"), CPU).save()
    assert (tmp_path / "new" / "r.json").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(plan, tmp_path, sentences):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        BatchReport(replace(plan, report=tmp_path / "file" / "r"), CPU).save()
    sentences(caught.value)


def test_an_output_that_is_already_done_keeps_its_errors(plan, report):
    report.save()
    again = BatchReport(plan, CPU)
    again.add(outcome(plan, 0, 0, "already done", summary={**SUMMARY, "already_done": True, "median_error": None}))
    assert again.to_dict()["files"][0]["median_error"] == SUMMARY["median_error"]


def test_an_output_of_another_size_does_not_get_earlier_errors(plan, report):
    report.save()
    again = BatchReport(plan, CPU)
    other = {**SUMMARY, "already_done": True, "median_error": None, "bytes_out": 5}
    again.add(outcome(plan, 0, 0, "already done", summary=other))
    assert again.to_dict()["files"][0]["median_error"] is None


def test_an_earlier_file_that_is_no_report_is_ignored(plan, tmp_path, subtests):
    for text in ("", "[]", "{}", '{"files": [1]}', '{"files": 1}', "[" * 100_000, '{"files": [{"output": []}]}'):
        with subtests.test(text[:30]):
            (tmp_path / "plan.json").write_text(text)
            assert BatchReport(plan, CPU).counts == {"not run": 4}


def test_an_output_that_was_done_before_has_no_time_of_this_batch(plan):
    summary = {**SUMMARY, "already_done": True, "seconds": None}
    assert describe_outcome(outcome(plan, 0, 0, "already done", summary=summary))["seconds"] is None
