"""Errors of a command: one sentence on standard error, and a traceback with --debug."""

import argparse
import os
import signal

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.cli import commands as cli
from learned_rounding.quant_core.cli.failures import report_error
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.run import layer_task


def nan_model(tmp_path):
    save_file({"a.weight": torch.full((8, 8), float("nan"))}, tmp_path / "nan.safetensors")


def empty_folder(folder):
    (folder / "empty").mkdir()


def text_file(tmp_path):
    (tmp_path / "text.safetensors").write_text("I am no model at all")


def quantized(tmp_path):
    tensors = quantize_weight(torch.ones(8, 8), "int8_tensorwise").tensors("a")
    save_file(tensors, tmp_path / "quantized.safetensors")


def in_the_way(tmp_path):
    (tmp_path / "out.safetensors").write_text("in the way")


def recipe_file(text, name="recipe.toml"):
    return lambda tmp_path: (tmp_path / name).write_bytes(text)


def nothing(tmp_path):
    pass


Q = ["quantize", "-i", "model.safetensors", "-o", "out.safetensors"]


ERRORS = {
    "missing source": (nothing, ["quantize", "-i", "none.safetensors"]),
    "a folder without a model": (empty_folder, ["quantize", "-i", "empty"]),
    "no safetensors file": (text_file, ["quantize", "-i", "text.safetensors"]),
    "quantized already": (
        quantized,
        ["quantize", "-i", "quantized.safetensors"],
    ),
    "quantized already, dry": (
        quantized,
        ["quantize", "-i", "quantized.safetensors", "--dry-run"],
    ),
    "nothing but NaN": (nan_model, ["quantize", "-i", "nan.safetensors"]),
    "nothing to quantize": (nothing, [*Q, "--exclude-layers", "."]),
    "no such granularity": (nothing, [*Q, "--scaling_mode", "tensr"]),
    "row scales on a format by name": (
        nothing,
        [*Q, "--format", "float8_e4m3fn", "--scaling_mode", "row"],
    ),
    "convrot on fp8": (nothing, [*Q, "--convrot"]),
    "a convrot of another size": (nothing, [*Q, "--int8", "--convrot", "32"]),
    "two rotations": (
        nothing,
        [*Q, "--int8", "--convrot", "16", "--convrot-group-size", "256"],
    ),
    "a rotation of all sizes and of one": (
        nothing,
        [*Q, "--int8", "--convrot", "auto", "--convrot-group-size", "64"],
    ),
    "two rules for one pattern": (
        nothing,
        [*Q, "--custom-layers", "mlp", "--custom-type", "int8", "--layer-config", '{"mlp": "skip"}'],
    ),
    "a block size without blocks": (nothing, [*Q, "--block_size", "64"]),
    "steps of nearest": (nothing, [*Q, "--simple", "--num_iter", "5"]),
    "damping without calibration": (nothing, [*Q, "--damping", "0.1"]),
    "no calibration": (nothing, [*Q, "--rounding", "calibrated"]),
    "a missing calibration": (nothing, [*Q, "--calibration", "none.safetensors"]),
    "a model as calibration": (nothing, [*Q, "--calibration", "model.safetensors"]),
    "no such preset": (nothing, [*Q, "--preset", "fluks"]),
    "a bad pattern": (nothing, [*Q, "--exclude-layers", "("]),
    "full precision on int8": (nothing, [*Q, "--int8", "--full_precision_matrix_mult"]),
    "a huge seed": (nothing, [*Q, "--manual_seed", str(2**70)]),
    "no such device": (nothing, [*Q, "--device", "nonsense"]),
    "a device without arithmetic": (nothing, [*Q, "--device", "meta"]),
    "no such recipe": (nothing, [*Q, "--recipe", "none.toml"]),
    "a recipe that is no text": (recipe_file(b"\xff\xfe"), [*Q, "--recipe", "recipe.toml"]),
    "a recipe that is no TOML": (recipe_file(b"a = \n\n b"), [*Q, "--recipe", "recipe.toml"]),
    "a recipe that is no JSON": (recipe_file(b"{", "recipe.json"), [*Q, "--recipe", "recipe.json"]),
    "an unknown field in a recipe": (recipe_file(b"width = 8"), [*Q, "--recipe", "recipe.toml"]),
    "the source as output": (
        nothing,
        ["quantize", "-i", "model.safetensors", "-o", "model.safetensors"],
    ),
    "an output in the way": (in_the_way, Q),
    "a folder as output": (nothing, ["migrate", "-i", "model.safetensors", "-o", "."]),
    "a report that cannot be written": (nothing, [*Q, "--report", "none/report.json"]),
    "a report with a name too long": (nothing, [*Q, "--report", "r" * 300]),
    "a report beside an output with a name too long": (
        lambda folder: (folder / "report.json").write_text("{}"),
        ["quantize", "-i", "model.safetensors", "-o", "o" * 300, "--report", "report.json"],
    ),
    "a migrated file with a name too long": (
        nothing,
        ["migrate", "-i", "model.safetensors", "-o", "o" * 300],
    ),
    "a recipe with a number of 5,000 digits": (
        recipe_file(b"seed = " + b"9" * 5000),
        [*Q, "--recipe", "recipe.toml"],
    ),
    "a report in place of a folder": (nothing, [*Q, "--report", "."]),
    "verify a missing file": (nothing, ["verify", "none.safetensors"]),
    "inspect text": (text_file, ["inspect", "text.safetensors"]),
    "sequential rounding of a missing file": (
        nothing,
        ["quantize", "-i", "none.safetensors", "--rounding", "sequential"],
    ),
    "reconstructed rounding with a calibration": (
        nothing,
        [*Q, "--rounding", "reconstructed", "--calibration", "a.safetensors"],
    ),
    "a plan of sequential rounding": (nothing, ["plan", "-i", "model.safetensors", "--rounding", "sequential"]),
    "plan a missing file": (nothing, ["plan", "-i", "none.safetensors"]),
}


def test_an_error_is_one_line(lrq, model_file, tmp_path, sentences, subtests):
    model = model_file().read_bytes()
    for title, (prepare, words) in ERRORS.items():
        with subtests.test(title):
            for path in tmp_path.iterdir():
                path.rmdir() if path.is_dir() else path.unlink()
            (tmp_path / "model.safetensors").write_bytes(model)
            prepare(tmp_path)
            code, _, err = lrq(*words)
            assert code == 1
            assert len(err) == 1
            sentences(err)
            assert not list(tmp_path.rglob("*.partial"))


def test_a_full_disk_is_one_line(lrq, model_file, listing, monkeypatch, sentences):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    source = model_file()
    monkeypatch.setattr(os, "fsync", full)
    code, _, err = lrq("quantize", "-i", source)
    assert code == 1
    assert len(err) == 1
    sentences(err)
    assert listing() == ["model.safetensors"]


def test_debug_shows_the_trace(lrq, tmp_path, sentences):
    code, _, err = lrq("--debug", "quantize", "-i", tmp_path / "none.safetensors")
    assert code == 1
    assert err[0].startswith("Traceback")
    sentences(err[-1])


def test_an_interrupt_leaves_nothing(lrq, model_file, listing, monkeypatch, sentences):
    def interrupt(*args, **options):
        signal.raise_signal(signal.SIGINT)  # as Ctrl+C does
        return quantize_layer(*args, **options)

    source = model_file()
    monkeypatch.setattr(layer_task, "quantize_layer", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are without
    try:
        code, _, err = lrq("quantize", "-i", source)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert len(err) == 1
    sentences(err)
    assert listing() == ["model.safetensors"]


@pytest.fixture
def broken_inspection(monkeypatch):
    """lrq inspect fails with an error that no code expects."""

    def fail(*args):
        raise ZeroDivisionError("a line\nand another")

    monkeypatch.setattr(cli, "inspect_file", fail)


@pytest.mark.usefixtures("broken_inspection")
def test_an_unexpected_error_is_one_line(lrq, tmp_path, sentences):
    code, _, err = lrq("inspect", tmp_path)
    assert code == 1
    assert len(err) == 1
    sentences(err)


@pytest.mark.usefixtures("broken_inspection")
def test_debug_shows_the_trace_of_an_unexpected_error(lrq, tmp_path, sentences):
    code, _, err = lrq("inspect", tmp_path, "--debug")
    assert code == 1
    assert err[0].startswith("Traceback")
    sentences(err[-1])


def test_reported_error_is_printed_once_with_control_characters_escaped(capsys):
    described = report_error(argparse.Namespace(), RecipeError("no \x1b[2J here", option="format"))
    assert capsys.readouterr().err == "lrq: no \\x1b[2J here\n"
    assert described["option"] == "format"
