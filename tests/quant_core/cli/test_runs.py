"""Several models in one command, output folders, disk space, and the JSON document."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_weight
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.cli.parser import make_parser
from learned_rounding.quant_core.recipes import PRESETS
from learned_rounding.quant_core.version import VERSION

INT8 = ("--int8", "--simple", "--general")


@pytest.fixture
def lrq(capsys, tmp_path, monkeypatch):
    """lrq(*words) → (exit code, stdout, lines on stderr), in the test's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> tuple[int, str, list[str]]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def two_models(model, model_file):
    model_file("a.safetensors")
    model_file("b.safetensors", model(1))


def test_several_models_are_named_after_their_inputs(lrq, two_models, listing):
    assert lrq("quantize", "a.safetensors", "b.safetensors", *INT8)[0] == 0
    assert listing() == ["a.safetensors", "a_int8_convrot.safetensors", "b.safetensors", "b_int8_convrot.safetensors"]


@pytest.mark.parametrize("output", ["new/", "there"])
def test_an_output_folder(lrq, two_models, listing, tmp_path, output):
    (tmp_path / "there").mkdir()
    words = ("-i", "a.safetensors", "-i", "b.safetensors", "-o", output, "--int8", "--no-convrot", "--general")
    assert lrq("quantize", *words)[0] == 0
    folder = output.rstrip("/")
    assert listing() == [
        "a.safetensors",
        "b.safetensors",
        f"{folder}/a_int8.safetensors",
        f"{folder}/b_int8.safetensors",
    ]


def test_two_models_with_one_output_are_refused_before_any_work(lrq, model_file, listing, tmp_path, sentences):
    (tmp_path / "sub").mkdir()
    shutil.copy(model_file(), tmp_path / "sub")
    code, out, err = lrq("quantize", "model.safetensors", "sub/model.safetensors", "-o", "out/", *INT8)
    assert code == 1
    assert out == ""
    assert listing() == ["model.safetensors", "sub/model.safetensors"]
    sentences(err)


def test_after_an_error_the_other_models_follow(lrq, two_models, listing, sentences):
    code, out, err = lrq(
        "quantize", "a.safetensors", "none.safetensors", "b.safetensors", "-o", "out/", *INT8, "--json"
    )
    assert code == 1
    assert [name for name in listing() if "out" in name] == [
        "out/a_int8_convrot.safetensors",
        "out/b_int8_convrot.safetensors",
    ]
    files = json.loads(out)["files"]
    assert [entry["input"] for entry in files] == ["a.safetensors", "none.safetensors", "b.safetensors"]
    assert [entry["error"] and entry["error"]["type"] for entry in files] == [None, "SourceError", None]
    sentences([line for line in err if line.startswith("lrq:")], files[1]["error"]["message"])


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


def test_documents_have_their_keys(lrq, model_file):
    source, made = model_file(), "model_int8_convrot.safetensors"
    code, out, _ = lrq("plan", source, *INT8, "--json")
    plan = document(out, "plan")
    assert code == 0
    assert set(plan) == PLAN_KEYS
    assert plan["recipe"] == Recipe(format="int8", rounding="nearest").to_dict()
    assert plan["bytes_out"] == sum(tensor["bytes_out"] for tensor in plan["tensors"]) < plan["bytes_in"]
    assert {tensor["action"] for tensor in plan["tensors"]} == {"keep", "quantize"}
    code, out, err = lrq("quantize", "model.safetensors", *INT8, "--json")
    run = document(out, "quantize")
    assert code == 0
    assert set(run) == RUN_KEYS
    assert run["output"] == made
    assert run["layers"] == 6
    assert len(err) == 1
    assert "model.safetensors → model_int8_convrot.safetensors" in err[0]
    code, out, _ = lrq("quantize", "model.safetensors", *INT8, "--json")
    again = document(out, "quantize")
    assert code == 0
    assert again["already_done"]
    assert again["seconds"] is None
    assert set(again) == RUN_KEYS
    code, out, err = lrq("inspect", made, "--json")
    assert code == 0
    assert err == []
    assert set(document(out, "inspect")) == INSPECT_KEYS
    code, out, err = lrq("verify", made, "--json")
    assert code == 0
    assert err == []
    assert set(document(out, "verify")) == VERIFY_KEYS
    assert document(out, "verify")["valid"]


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


def test_plan_groups_tensors_by_pattern_and_verbose_lists_them(lrq, model_file, sentences):
    source = model_file()
    sentences(lrq("plan", source, *INT8)[1], lrq("plan", source, *INT8, "--verbose")[1])


def test_one_long_name_does_not_widen_all_lines_of_a_plan(lrq, model_file):
    name = f"blocks.0.{'x' * 900}.weight"
    source = model_file("long.safetensors", {name: torch.zeros(32, 32), "blocks.1.a.weight": torch.zeros(32, 32)})
    lines = lrq("plan", source, *INT8)[1].splitlines()
    assert any("blocks.1.a.weight" in line and len(line) < 150 for line in lines)


def test_plan_groups_layers_whose_format_is_chosen_later(lrq, model_file, sentences):
    source = model_file()
    sentences(lrq("plan", source, "--format", "measured", "--general")[1])
    planned = document(lrq("plan", source, "--format", "measured", "--general", "--json")[1], "plan")
    assert planned["bytes_out"] is None
    assert {tensor["bytes_out"] for tensor in planned["tensors"]} > {None}


def test_a_full_disk_is_reported_before_the_start(lrq, model_file, listing, monkeypatch, sentences):
    source = model_file()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    code, _, err = lrq("quantize", source, *INT8)
    assert code == 1
    assert listing() == ["model.safetensors"]
    sentences(err)
    code, _, _ = lrq("quantize", source, *INT8, "--dry-run")
    assert code == 0


KILL = """
import os, sys
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.events import LayerFinished
seen = []
def kill(event):
    seen.append(isinstance(event, LayerFinished))
    if sum(seen) == 4:
        os._exit(9)
quantize_file(sys.argv[1], sys.argv[2], Recipe(format="int8", rounding="nearest"), device="cpu", general=True, on_event=kill)
"""


@pytest.mark.parametrize("verbose", [(), ("--verbose",)], ids=["bar", "verbose"])
def test_resuming_is_shown(lrq, model_file, tmp_path, verbose):
    source, out = model_file(), tmp_path / "out.safetensors"
    assert subprocess.run([sys.executable, "-c", KILL, source, out], timeout=120).returncode == 9
    code, text, _ = lrq("quantize", source, "-o", out, *INT8, "--device", "cpu", *verbose)
    (line,) = [line for line in text.splitlines() if line.startswith("Resuming: ")]
    resumed = int(line.split()[1])
    assert code == 0
    assert 0 < resumed <= 4
    assert line == f"Resuming: {resumed} of 6 layers already done."
    assert f"{resumed} of them resumed" in text


def test_preset_flags_are_accepted_and_not_in_the_help():
    parser = make_parser()
    commands = parser._subparsers._group_actions[0].choices
    for command in ("quantize", "plan"):
        text = commands[command].format_help()
        assert not any(f"--{name.replace('_', '-')} " in text or f"--{name} " in text for name in PRESETS)
    assert parser.parse_args(["plan", "x", "--t5xxl"]).preset == "t5xxl"


def test_quality_card_is_written_beside_the_output(lrq, model_file, tmp_path, listing):
    model_file()
    words = ("quantize", "model.safetensors", "-o", "q.safetensors", *INT8, "--quality-card")
    assert lrq(*words)[0] == 0
    assert listing() == ["model.safetensors", "q.md", "q.safetensors"]
    assert (tmp_path / "q.md").read_text(encoding="utf-8").startswith("# q\n\n* **format**: int8_tensorwise per row")
    code, out, _ = lrq(*words)
    assert code == 0
    assert "q.md is not written" in out


def test_quality_card_replaces_no_other_file_unasked(lrq, model_file, tmp_path):
    model_file()
    (tmp_path / "q.md").write_text("of another model")
    words = ("quantize", "model.safetensors", "-o", "q.safetensors", *INT8, "--quality-card")
    code, _, (*_, error) = lrq(*words)
    assert code == 1
    assert "q.md exists" in error
    assert error.endswith("q.safetensors is complete.")
    assert (tmp_path / "q.md").read_text() == "of another model"
    (tmp_path / "q.safetensors").unlink()
    assert lrq(*words, "--overwrite")[0] == 0
    assert (tmp_path / "q.md").read_text(encoding="utf-8").startswith("# q\n")
