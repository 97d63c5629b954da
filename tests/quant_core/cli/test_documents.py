"""The JSON document of --json: its keys, one object for each model, errors in place of results."""

import json

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, Report, quantize_weight
from learned_rounding.quant_core.cli.documents import describe_report
from learned_rounding.quant_core.version import VERSION

INT8 = ("--int8", "--simple", "--general")


RUN_KEYS = {
    *(
        "input",
        "error",
        "output",
        "already_done",
        "format",
        "granularity",
        "rounding",
        "preset",
        "bytes_in",
        "bytes_out",
    ),
    *("seconds", "device", "layers", "resumed", "unquantized", "median_error", "median_output_error", "warnings"),
    "next_step",
}


PLAN_KEYS = {"input", "error", "model", "preset", "recipe", "bytes_in", "bytes_out", "seconds", "tensors", "warnings"}


INSPECT_KEYS = {"input", "error", "size", "tensors", "dtypes", "quantized", "layers", "stock", "made_by"}


VERIFY_KEYS = {"input", "error", "valid", "layers", "problems", "warnings", "model_run"}


def document(text: str, command: str) -> dict:
    """The only entry of the only JSON document on standard output."""
    read = json.loads(text)
    assert set(read) == {"version", "command", "error", "files"}
    assert text.count("\n") == 1
    assert read["version"] == VERSION
    assert read["command"] == command
    assert read["error"] is None
    (entry,) = read["files"]
    return entry


@pytest.fixture
def run(lrq, model_file):
    """run(command, file, *words) → (exit code, entry of the document, lines on stderr)."""
    model_file()

    def make(command, *words):
        code, out, err = lrq(command, *words, *(INT8 if command in ("quantize", "plan") else ()), "--json")
        return code, document(out, command), err

    return make


def test_document_of_plan(run):
    code, plan, _ = run("plan", "model.safetensors")
    assert code == 0
    assert set(plan) == PLAN_KEYS
    assert plan["recipe"] == Recipe(format="int8", rounding="nearest").to_dict()
    assert plan["bytes_out"] == sum(tensor["bytes_out"] for tensor in plan["tensors"])
    assert plan["bytes_out"] < plan["bytes_in"]
    assert {tensor["action"] for tensor in plan["tensors"]} == {"keep", "quantize"}


def test_document_of_quantize_and_its_messages_on_standard_error(run):
    code, made, err = run("quantize", "model.safetensors")
    assert code == 0
    assert set(made) == RUN_KEYS
    assert made["output"] == "model_int8_convrot.safetensors"
    assert made["layers"] == 6
    assert len(err) == 1
    assert "model.safetensors → model_int8_convrot.safetensors" in err[0]


def test_document_of_a_run_that_is_already_done(run):
    run("quantize", "model.safetensors")
    code, again, _ = run("quantize", "model.safetensors")
    assert code == 0
    assert set(again) == RUN_KEYS
    assert again["already_done"]
    assert again["seconds"] is None


@pytest.mark.parametrize("command, keys", [("inspect", INSPECT_KEYS), ("verify", VERIFY_KEYS)])
def test_document_of_a_finished_file(run, command, keys):
    run("quantize", "model.safetensors")
    code, entry, err = run(command, "model_int8_convrot.safetensors")
    assert code == 0
    assert err == []
    assert set(entry) == keys
    assert entry.get("valid", True)


def test_dry_run_has_the_document_of_plan(lrq, model_file):
    model_file()
    planned = document(lrq("plan", "model.safetensors", *INT8, "--json")[1], "plan")
    assert document(lrq("quantize", "model.safetensors", *INT8, "--dry-run", "--json")[1], "quantize") == planned


def test_verify_reports_problems_in_the_document(lrq, tmp_path):
    tensors = quantize_weight(torch.ones(8, 8), "int8_tensorwise").tensors("a")
    save_file(tensors | {"a.weight_scale": torch.full_like(tensors["a.weight_scale"], float("nan"))}, "bad.safetensors")
    code, out, err = lrq("verify", "bad.safetensors", "--json")
    found = document(out, "verify")
    assert code == 1
    assert err == []
    assert not found["valid"]
    assert len(found["problems"]) == 1


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_an_error_of_a_command_is_in_the_document(lrq, command, sentences):
    code, out, err = lrq(command, "none.safetensors", "--json")
    read = json.loads(out)
    assert code == 1
    assert read["files"] == []
    assert read["error"]["file"] == "none.safetensors"
    assert err == [f"lrq: {read['error']['message']}"]
    sentences(err)


def test_a_recipe_error_is_in_the_document(lrq, model_file):
    code, out, err = lrq("plan", model_file(), "--fp8", "--convrot", "64", "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "RecipeError"
    assert len(err) == 1


def test_a_header_without_json_numbers_gives_valid_json(lrq, tmp_path, model_file):
    path = model_file(learned_rounding='{"version": "0.1.0", "recipe": {"target_size": NaN, "keep": Infinity}}')
    code, out, _ = lrq("inspect", path, "--json")
    recipe = json.loads(out, parse_constant=pytest.fail)["files"][0]["made_by"]["recipe"]
    assert code == 0
    assert recipe == {"target_size": None, "keep": None}


def test_sizes_that_are_not_known_before_the_run_are_null(lrq, model_file):
    planned = document(lrq("plan", model_file(), "--format", "measured", "--json")[1], "plan")
    assert planned["bytes_out"] is None
    assert {tensor["bytes_out"] for tensor in planned["tensors"]} > {None}


def test_already_done_runs_have_null_for_what_was_not_measured():
    report = Report("model.safetensors", "int8_tensorwise", "row", "auto", "flux", already_done=True, output="out")
    entry = describe_report(report, "Next: …")
    assert entry["already_done"] is True
    assert entry["next_step"] == "Next: …"
    for name in ("bytes_in", "bytes_out", "seconds", "device", "median_error", "median_output_error"):
        assert entry[name] is None, name
