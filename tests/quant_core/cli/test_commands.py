"""The command line: mostly in this process; a few runs as users start it."""

import errno
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import learned_rounding
from learned_rounding import kernels
from learned_rounding.quant_core import FORMATS, PRESETS, Recipe, quantize_weight
from learned_rounding.quant_core.cli import commands as cli
from learned_rounding.quant_core.cli import parser, runs
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.cli.parser import make_parser
from learned_rounding.quant_core.convert.dequantize import DecodedSource
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.recipes.presets import ALIASES
from learned_rounding.quant_core.run import loop
from learned_rounding.quant_core.run import quantize as pipeline
from learned_rounding.quant_core.sources import SafetensorsFile
from learned_rounding.quant_core.version import VERSION

ROOT = Path(learned_rounding.__file__).parent


@pytest.fixture
def lrq(strict_lrq):
    """As strict_lrq, with --general where it is an option: no preset recognizes the made-up models of these tests."""

    def run(command: str = "", *words) -> tuple[int, str, list[str]]:
        general = ("--general",) if command in ("quantize", "plan") else ()
        return strict_lrq(*filter(None, (command,)), *words, *general)

    return run


@pytest.fixture
def strict_lrq(capsys):
    """strict_lrq(*words) → (exit code, stdout, lines on stderr without the progress bar)."""

    def run(*words) -> tuple[int, str, list[str]]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        except KeyboardInterrupt:
            pytest.fail("an interrupt came through")
        captured = capsys.readouterr()
        return code, captured.out, error_lines(captured.err)

    return run


def error_lines(text: str) -> list[str]:
    return [
        line for line in re.split(r"[\r\n]+", text) if line.strip() and not re.search(r"\d+%\|.*\| \d+/\d+ \[", line)
    ]


UNUSED = "lrq: warning: No quantizable layer of model.safetensors matches "


def recipe_of(path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["learned_rounding"])["recipe"]


def test_a_bare_name_is_quantized_beside_itself(lrq, model_file, tmp_path, listing, monkeypatch, sentences):
    model_file()
    monkeypatch.chdir(tmp_path)
    code, out, err = lrq("quantize", "-i", "model.safetensors")
    assert code == 0
    assert err == []
    assert listing() == ["model.safetensors", "model_float8_e4m3fn.safetensors"]
    assert verify_file("model_float8_e4m3fn.safetensors").problems == []
    assert recipe_of("model_float8_e4m3fn.safetensors") == Recipe().to_dict()
    sentences(out, numbers=False)


def test_the_output_is_named_beside_an_input_elsewhere(lrq, model_file, tmp_path, listing, monkeypatch):
    (tmp_path / "cwd").mkdir()
    source = model_file()
    monkeypatch.chdir(tmp_path / "cwd")
    assert lrq("quantize", "-i", source, "--int8")[0] == 0
    assert listing() == ["model.safetensors", "model_int8_convrot.safetensors"]


def test_an_output_in_a_new_folder(lrq, model_file, listing, tmp_path):
    assert lrq("quantize", "-i", model_file(), "-o", tmp_path / "new" / "q.safetensors")[0] == 0
    assert listing() == ["model.safetensors", "new/q.safetensors"]


ROW = {"format": "int8_tensorwise", "granularity": "row"}
INT8 = {**ROW, "convrot": "auto"}  # by default
# Presets of models whose every layer stays: with them there is nothing to quantize.
KEEP_ALL = {name for name, preset in PRESETS.items() if any(rule.text == ".*" for rule in preset.keep)}

OPTIONS = {
    "nothing": ([], {}),
    "comfy_quant": (["--comfy_quant"], {}),
    "comfy-quant": (["--comfy-quant"], {}),
    "fp8": (["--fp8"], {}),
    "format": (["--format", "int8_tensorwise"], INT8),
    "format with =": (["--format=int8_tensorwise"], INT8),
    "int8": (["--int8"], INT8),
    "int8 as a format": (["--format", "int8"], INT8),
    "int8, not rotated": (["--int8", "--convrot", "off"], ROW),
    "int8 without convrot": (["--no-convrot", "--int8"], ROW),
    "int8_tensorwise without convrot": (["--format", "int8_tensorwise", "--no_convrot"], ROW),
    "fp8 without convrot": (["--fp8", "--no-convrot"], {}),
    "fp8 as a format": (["--format", "fp8", "--scaling_mode", "tensor"], {}),
    "int8 block as a format": (
        ["--format=int8", "--scaling_mode=block"],
        {"format": "int8_blockwise", "granularity": "block", "block_size": 128},
    ),
    "int8 tensor": (["--int8", "--scaling_mode", "tensor"], {"format": "int8_tensorwise", "granularity": "tensor"}),
    "int8 tensor, dashes and =": (
        ["--int8", "--scaling-mode=tensor"],
        {"format": "int8_tensorwise", "granularity": "tensor"},
    ),
    "int8 row": (["--scaling_mode", "row", "--int8"], INT8),
    "int8 block": (
        ["--int8", "--scaling_mode", "block", "--block_size", "16"],
        {"format": "int8_blockwise", "granularity": "block", "block_size": 16},
    ),
    "fp8 row": (["--fp8", "--scaling_mode", "row"], {"format": "float8_e4m3fn_rowwise", "granularity": "row"}),
    "fp8 block, without --fp8": (
        ["--scaling-mode", "block"],
        {"format": "float8_e4m3fn_blockwise", "granularity": "block", "block_size": 128},
    ),
    "e5m2": (["--format", "float8_e5m2"], {"format": "float8_e5m2"}),
    "convrot": (["--int8", "--convrot"], {**ROW, "convrot": True}),
    "convrot group": (["--int8", "--convrot", "--convrot-group-size", "16"], {**ROW, "convrot": 16}),
    "convrot group alone": (["--int8", "--convrot_group_size=16"], {**ROW, "convrot": 16}),
    "convrot twice": (["--int8", "--convrot", "16", "--convrot-group-size", "16"], {**ROW, "convrot": 16}),
    "a layer's rule twice": (
        ["--custom-layers", "mlp", "--custom-type", "int8", "--layer-config", '{"mlp": {"format": "int8"}}'],
        {"layer_config": '{"mlp": "int8"}'},
    ),
    "convrot with a value": (["--int8", "--convrot", "64"], {**ROW, "convrot": 64}),
    "convrot auto": (["--int8", "--convrot", "auto"], {**ROW, "convrot": "auto"}),
    "principal": (["--rounding", "principal"], {"rounding": "principal"}),
    "rank": (["--top_p", "0.3", "--min_k", "2", "--max-k", "9"], {"top_p": 0.3, "min_k": 2, "max_k": 9}),
    "complete SVD": (["--full_matrix", "--weight_cost", "0.05"], {"full_matrix": True, "weight_cost": 0.05}),
    "steps": (["--num_iter", "3"], {"num_iter": 3}),
    "original": (["--optimizer", "original", "--num-iter", "3"], {"optimizer": "original", "num_iter": 3}),
    "adamw": (
        ["--optimizer", "adamw", "--num_iter", "3", "--lr", "0.1"],
        {"optimizer": "adamw", "num_iter": 3, "lr": 0.1},
    ),
    "radam": (
        ["--optimizer=radam", "--num_iter=3", "--lr_schedule", "plateau", "--early_stop", "2"],
        {"optimizer": "radam", "num_iter": 3, "lr_schedule": "plateau", "early_stop": 2},
    ),
    "prodigy": (["--optimizer", "prodigy", "--num_iter", "3"], {"optimizer": "prodigy", "num_iter": 3}),
    "stochastic": (["--rounding", "stochastic"], {"rounding": "stochastic"}),
    "synthetic bias": (
        ["--bias_correction", "synthetic", "--calib_samples", "8"],
        {"bias_correction": "synthetic", "calib_samples": 8},
    ),
    "simple": (["--simple"], {"rounding": "nearest"}),
    "rounding": (["--rounding", "nearest"], {"rounding": "nearest"}),
    "exclude": (["--exclude-layers", "mlp"], {"keep": ["mlp"]}),
    "exclude twice": (["--exclude_layers", r"\.0\.", "--exclude-layers", "qkv"], {"keep": [r"\.0\.", "qkv"]}),
    "a value with underscores": (["--exclude-layers=a_b-c"], {"keep": ["a_b-c"]}),
    "seed": (["--manual_seed", "7"], {"seed": 7}),
    "seed, dashes": (["--manual-seed=7"], {"seed": 7}),
    "seed, short": (["--seed", "7"], {"seed": 7}),
    "full precision": (["--full_precision_matrix_mult"], {"full_precision_matmul": True}),
    "full precision, dashes": (["--full-precision-matrix-mult"], {"full_precision_matmul": True}),
    "preset": (["--preset", "none"], {"preset": "none"}),
    "preset by name": (["--preset", "wan"], {"preset": "wan"}),
    **{f"--{name}": ([f"--{name}"], {"preset": name}) for name in PRESETS if name not in KEEP_ALL},
}


@pytest.mark.parametrize("words, changed", OPTIONS.values(), ids=OPTIONS)
def test_options_become_the_recipe(lrq, model_file, tmp_path, words, changed):
    out = tmp_path / "q.safetensors"
    code, _, err = lrq("quantize", "-i", model_file(), "-o", out, *words)
    assert code == 0
    assert [line for line in err if not line.startswith(UNUSED)] == []
    assert recipe_of(out) == {**Recipe().to_dict(), **changed}
    assert verify_file(out).problems == []


def test_migrate_says_what_it_did(lrq, tmp_path, sentences):
    old = tmp_path / "old.safetensors"
    save_file({"a.weight": torch.ones(16, 16).to(torch.float8_e4m3fn), "a.scale_weight": torch.tensor(0.5)}, old)
    code, out, _ = lrq("migrate", "-i", old)
    assert code == 0
    assert verify_file(tmp_path / "old_native.safetensors").layers == 1
    sentences(out)
    code, _, err = lrq("migrate", "-i", old)
    assert code == 1
    sentences(err)
    assert lrq("migrate", "-i", old, "--overwrite")[0] == 0


# The vocabulary of the published tool.
KNOWN = """
    -i --input -o --output --comfy_quant --int8 --simple --heur --full_precision_matrix_mult --input_scale --t5xxl --distillation_large
    --distillation_small --nerf_large --nerf_small --radiance --wan --qwen --hunyuan --zimage --zimage_l --zimage_s --flux2 --full_matrix
    --scaling_mode --block_size --calib_samples --manual_seed --optimizer --num_iter --lr --top_p --min_k --max_k --kernel_backend
    --exclude-layers --custom-layers --custom-type --layer-config --fallback --convrot --convrot-group-size --save-quant-metadata
    --low-memory --convert-fp8-scaled --dry-run --verbose --device
"""
REFUSED = ("--input_scale", "--fallback", "--convert-fp8-scaled")


# Option → what it is tried beside, and its value; others stand alone.
TRIED = {
    "-i": ("", "other.safetensors"),
    "--input": ("", "other.safetensors"),
    "-o": ("", "out.safetensors"),
    "--output": ("", "out.safetensors"),
    "--heur": ('--layer-config {"qkv":"fp8"}', ""),
    "--scaling_mode": ("", "row"),
    "--block_size": ("--int8 --scaling_mode block", "16"),
    "--convrot": ("--format int8_tensorwise", ""),
    "--convrot-group-size": ("--int8 --convrot", "16"),
    "--calib_samples": ("--bias_correction synthetic", "8"),
    "--manual_seed": ("", "7"),
    "--optimizer": ("--num_iter 3", "adamw"),
    "--num_iter": ("", "3"),
    "--lr": ("--optimizer adamw --num_iter 3", "0.1"),
    "--top_p": ("", "0.3"),
    "--min_k": ("", "2"),
    "--max_k": ("", "9"),
    "--kernel_backend": ("", "reference"),
    "--exclude-layers": ("", "mlp"),
    "--custom-layers": ("--custom-type int8 --custom-layers mlp", "qkv"),
    "--custom-type": ("--custom-layers mlp --custom-type int8", "float8_e5m2"),
    "--layer-config": ("", '{"mlp":"int8"}'),
    "--device": ("", "cpu"),
}
ALWAYS = {"--comfy_quant", "--save-quant-metadata", "--low-memory"}


@pytest.mark.parametrize("option", KNOWN.split())
def test_every_option_that_users_know_acts_or_is_refused_by_name(
    lrq, model_file, tmp_path, monkeypatch, option, sentences
):
    """It changes what the run is given, or what it prints and writes."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(model_file(), "other.safetensors")
    if option in REFUSED:
        for words in ([option], [option, "int8"]):
            code, _, err = lrq("quantize", "-i", "model.safetensors", *words)
            assert code == 2
            sentences(err[-1])
        return
    plain, made = pipeline.quantize_file, []

    def recorded(source, output, recipe, **options):
        made.append((source.name, output, recipe, options["device"], kernels.backend()))
        return plain(source, output, recipe, **options)

    monkeypatch.setattr(runs, "quantize_file", recorded)
    beside, value = TRIED.get(option, ("", ""))

    def outcome(*words):
        made.clear()
        code, out, err = lrq("quantize", "-i", "model.safetensors", "--overwrite", *beside.split(), *words)
        assert code == 0
        assert [line for line in err if not line.startswith(UNUSED)] == []
        lines = [re.sub(r"[\d.]+ s$", "", line) for line in out.splitlines() if not line.startswith("time")]
        for path in (*tmp_path.glob("model_*"), *tmp_path.glob("out*")):
            path.unlink()
        return lines, *made

    assert (outcome(option, *filter(None, [value])) == outcome()) is (option in ALWAYS)


@pytest.mark.parametrize("name", [*PRESETS, *ALIASES])
def test_every_preset_has_a_flag_of_its_own(name):
    for spelt in (name, name.replace("_", "-")):
        assert make_parser().parse_args(["plan", "-i", "x", f"--{spelt}"]).preset == name


VALUES = {int: "3", float: "0.5", parser._parse_convrot: "64"}  # types → a value; text takes any


@pytest.mark.parametrize("command", ["quantize", "plan", "migrate"])
def test_every_option_is_understood_with_dashes_and_underscores(command):
    lrq = make_parser()
    options = lrq._subparsers._group_actions[0].choices[command]._option_string_actions
    tried = 0
    for option, action in options.items():
        if not option.startswith("--") or isinstance(action, parser._Refusal) or option == "--help":
            continue
        value = [] if action.nargs == 0 else [next(iter(action.choices or ()), VALUES.get(action.type, "text"))]
        spelt = {option, f"--{option[2:].replace('-', '_')}", f"--{option[2:].replace('_', '-')}"}
        ways = [vars(lrq.parse_args([command, "-i", "x", way, *value])) for way in spelt]
        assert all(way == ways[0] for way in ways), option
        assert ways[0] != vars(lrq.parse_args([command, "-i", "x"])), option
        tried += len(spelt) > 1
    assert tried >= (1 if command == "migrate" else 20)


def test_custom_layers_get_their_type(lrq, model_file, tmp_path, sentences):
    out = tmp_path / "q.safetensors"
    words = [
        "--custom-layers",
        "mlp",
        "--custom_layers",
        "qkv",
        "--custom-type",
        "int8",
        "--layer-config",
        '{"blocks.0.mlp.0": "skip"}',
    ]
    assert lrq("quantize", "-i", model_file(), "-o", out, *words)[0] == 0
    assert json.loads(recipe_of(out)["layer_config"]) == {"blocks.0.mlp.0": "skip", "mlp": "int8", "qkv": "int8"}
    code, lines, _ = lrq("plan", "-i", model_file(), *words)
    assert code == 0
    sentences(lines)


def test_a_layer_config_in_a_file(lrq, model_file, tmp_path, sentences):
    config = tmp_path / "layers.json"
    config.write_text('{"mlp": "skip"}')
    code, lines, _ = lrq("plan", "-i", model_file(), "--layer-config", config)
    assert code == 0
    sentences(lines)
    for words in (
        ["--layer-config", tmp_path / "none.json"],
        ["--custom-layers", "mlp"],
        ["--custom-type", "int8"],
        ["--custom-layers", "mlp", "--custom-type", "int9"],
    ):
        code, _, err = lrq("plan", "-i", model_file(), *words)
        assert code == 1
        sentences(err)


@pytest.mark.parametrize("spelt", ["--kernel_backend", "--kernel-backend"])
def test_a_kernel_backend_holds_for_the_command(lrq, model_file, tmp_path, monkeypatch, spelt, sentences):
    seen = []
    plain = pipeline.quantize_file
    monkeypatch.setattr(
        "learned_rounding.quant_core.cli.runs.quantize_file",
        lambda *a, **k: seen.append(kernels.backend()) or plain(*a, **k),
    )
    before = kernels.backend()
    assert lrq("quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors", spelt, "reference")[0] == 0
    assert seen == ["reference"]
    assert kernels.backend() == before
    code, _, err = lrq("quantize", "-i", model_file(), spelt, "fast")
    assert code == 2
    sentences(err[-1])


def test_options_act(lrq, model_file, tmp_path):
    out = tmp_path / "q.safetensors"
    lrq("quantize", "-i", model_file(), "-o", out, "--int8", "--exclude-layers", "mlp")
    tensors = load_file(out)
    assert {name for name in tensors if name.endswith(".comfy_quant")} == {
        "blocks.0.attn.qkv.comfy_quant",
        "blocks.1.attn.qkv.comfy_quant",
    }
    assert tensors["blocks.0.attn.qkv.weight"].dtype == torch.int8
    assert tensors["blocks.0.attn.qkv.weight_scale"].shape == (96, 1)


def test_a_calibration_acts(lrq, model, model_file, tmp_path, sentences):
    """Layers that it knows are calibrated, the others searched; their biases are corrected, in their own dtype."""
    layer, inputs = "blocks.0.attn.qkv", torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    inputs = (
        inputs @ torch.diag(torch.logspace(0, -2, 32)) @ torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    )
    gram = inputs.t() @ inputs / len(inputs)
    statistics = {f"{layer}.gram": gram.bfloat16(), f"{layer}.mean": inputs.mean(dim=0)}
    save_file(statistics, tmp_path / "calibration.safetensors")
    words = ["quantize", "-i", model_file(), "--int8", "--report", tmp_path / "report.json", "--calibration"]
    code, out, err = lrq(*words, tmp_path / "calibration.safetensors", "-o", tmp_path / "q.safetensors")
    assert code == 0
    assert err == []
    sentences(out, numbers=False)
    made = {entry["name"]: entry for entry in json.loads((tmp_path / "report.json").read_text())["layers"]}
    assert [entry["solver"] for name, entry in made.items() if layer in name] == ["gptq"]
    assert all(entry["output_error"] is None for name, entry in made.items() if layer not in name)
    assert verify_file(tmp_path / "q.safetensors").problems == []
    tensors, bias = load_file(tmp_path / "q.safetensors"), model()[f"{layer}.bias"]
    assert tensors[f"{layer}.bias"].dtype is bias.dtype
    assert not torch.equal(tensors[f"{layer}.bias"], bias)
    assert torch.equal(tensors["blocks.1.attn.qkv.bias"], model()["blocks.1.attn.qkv.bias"])
    # Again with the same statistics it is done already; with others it is another run.
    sentences(lrq(*words, tmp_path / "calibration.safetensors", "-o", tmp_path / "q.safetensors")[1])
    save_file({**statistics, f"{layer}.gram": gram * 2}, tmp_path / "calibration.safetensors")
    assert lrq(*words, tmp_path / "calibration.safetensors", "-o", tmp_path / "q.safetensors")[0] == 1
    assert lrq("inspect", tmp_path / "q.safetensors")[0] == 0


@pytest.mark.parametrize("format", ["asym_w4a8_int8", "nvfp4", "mxfp8"])
def test_a_calibration_acts_in_formats_of_groups(lrq, model_file, tmp_path, format):
    """The layers that it knows have a smaller output error than with round to nearest, on activations of the same kind."""
    layer, generator = "blocks.0.attn.qkv", torch.Generator().manual_seed(0)
    mixed = torch.diag(torch.logspace(0, -2, 32)) @ torch.randn(32, 32, generator=generator)
    known, others = (torch.randn(200, 32, generator=generator) @ mixed for _ in range(2))
    statistics = {
        f"{layer}.gram": known.t() @ known / 200,
        f"{layer}.holdout_gram.factor": others.t().contiguous() / 200**0.5,
        f"{layer}.holdout_gram.diagonal": torch.zeros(32),
    }
    save_file(statistics, tmp_path / "c.safetensors")
    made, words = (
        {},
        ["quantize", "-i", model_file(), "--format", format, "--layer-config", json.dumps({"qkv": format})],
    )
    for rounding, options in {"nearest": [], "calibrated": ["--calibration", tmp_path / "c.safetensors"]}.items():
        out = tmp_path / f"{rounding}.safetensors"
        assert lrq(*words, "-o", out, "--rounding", rounding, *options)[0] == 0
        assert verify_file(out).problems == []
        with SafetensorsFile(out) as opened:
            made[rounding] = DecodedSource(opened).read(f"{layer}.weight").float()
    weight = load_file(model_file())[f"{layer}.weight"].float()
    error = {rounding: float((others @ (value - weight).t()).norm()) for rounding, value in made.items()}
    assert 0 < error["calibrated"] < 0.8 * error["nearest"]


def test_formats_are_measured_with_a_calibration(lrq, model, model_file, tmp_path, sentences):
    names = [name.removesuffix(".weight") for name, tensor in model().items() if tensor.ndim == 2 and "blocks" in name]
    statistics = {}
    for index, layer in enumerate(names):
        inputs = torch.randn(64, model()[f"{layer}.weight"].shape[1], generator=torch.Generator().manual_seed(index))
        statistics |= {
            f"{layer}.gram": inputs.t() @ inputs / 64,
            f"{layer}.holdout_gram.factor": inputs.t().contiguous() / 8,
            f"{layer}.holdout_gram.diagonal": torch.zeros(inputs.shape[1]),
        }
    save_file(statistics, tmp_path / "c.safetensors")
    words = ["quantize", "-i", model_file(), "--format", "measured", "--calibration", tmp_path / "c.safetensors", "-o"]
    code, out, err = lrq(*words, tmp_path / "q.safetensors", "--target-error", "0.5")
    assert code == 0
    assert err == []
    sentences(out, numbers=False)
    assert lrq("verify", tmp_path / "q.safetensors")[0] == 0
    sentences(lrq(*words, tmp_path / "q.safetensors", "--target-error", "0.5")[1])
    code, _, err = lrq(*words, tmp_path / "r.safetensors", "--target-size", "1e-6")
    assert code == 1
    sentences(err)


@pytest.mark.parametrize(
    "capability, hip, expected",
    [
        ((8, 9), None, "int8_convrot"),
        ((7, 0), None, "float8_e4m3fn"),
        ((9, 4), "6", "float8_e4m3fn"),
        (None, None, "float8_e4m3fn"),
    ],
)
def test_format_auto_is_what_suits_the_card(lrq, model_file, tmp_path, monkeypatch, capability, hip, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    code, _out, err = lrq("quantize", "-i", model_file(), "--format", "auto", "--device", "cpu")
    assert code == 0
    assert err.count("lrq:") == 0
    (made,) = tmp_path.glob("model_*")
    assert made.stem == f"model_{expected}"


def test_a_low_rank_calibration_acts_too(lrq, model_file, tmp_path, sentences):
    layer, generator = "blocks.0.mlp.2", torch.Generator().manual_seed(0)
    parts = {"factor": torch.randn(80, 8, generator=generator), "diagonal": torch.full((80,), 0.1)}
    save_file({f"{layer}.gram.{name}": part for name, part in parts.items()}, tmp_path / "c.safetensors")
    words = ["quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors", "--verbose", "--calibration"]
    code, out, _ = lrq(*words, tmp_path / "c.safetensors")
    (line,) = [line for line in out.splitlines() if line.startswith(f"{layer}.weight")]
    assert code == 0
    sentences(line, numbers=False)
    save_file({f"{layer}.gram.factor": parts["factor"]}, tmp_path / "half.safetensors")
    code, _, err = lrq(*words, tmp_path / "half.safetensors", "--overwrite")
    assert code == 1
    sentences(err)
    save_file({f"{layer}.gram": torch.eye(7)}, tmp_path / "wrong.safetensors")
    code, _, err = lrq(*words, tmp_path / "wrong.safetensors", "--overwrite")
    assert code == 1
    sentences(err)


def test_heur_acts(lrq, tmp_path, sentences):
    save_file(
        {"a.weight": torch.zeros(128, 128), "b.weight": torch.zeros(4096, 4096, dtype=torch.bfloat16)},
        tmp_path / "in.safetensors",
    )
    _, plain, _ = lrq("plan", "-i", tmp_path / "in.safetensors")
    _, heur, _ = lrq("plan", "-i", tmp_path / "in.safetensors", "--heur")
    sentences(plain, heur)


def test_presets_are_recognised_and_named(lrq, layer_names, tmp_path, sentences):
    save_file(
        {name: torch.zeros([min(side, 4) for side in shape]) for name, shape in layer_names("flux").items()},
        tmp_path / "in.safetensors",
    )
    _, out, _ = lrq("plan", "-i", tmp_path / "in.safetensors")
    sentences(out.splitlines()[0], *(line for line in out.splitlines() if " img_in.weight" in line))
    _, out, _ = lrq("plan", "-i", tmp_path / "in.safetensors", "--preset", "none")
    sentences(out.splitlines()[0], *(line for line in out.splitlines() if " img_in.weight" in line))
    _, out, _ = lrq("plan", "-i", tmp_path / "in.safetensors", "--flux")
    sentences(out.splitlines()[0])


@pytest.mark.parametrize("write", [Recipe.to_toml, Recipe.to_json], ids=["toml", "json"])
def test_a_recipe_file_and_options_over_it(lrq, model_file, tmp_path, write):
    recipe = Recipe(format="int8_tensorwise", granularity="tensor", rounding="nearest", keep=("qkv",), seed=5)
    path = tmp_path / f"recipe.{'toml' if write is Recipe.to_toml else 'json'}"
    path.write_text(write(recipe), encoding="utf-8")
    source = model_file()
    for words, changed in [
        ([], {}),
        (["--seed", "6", "--rounding", "auto"], {"seed": 6, "rounding": "auto"}),
        (["--scaling_mode", "row"], {"granularity": "row"}),
        (["--exclude-layers", "mlp"], {"keep": ["mlp"]}),
        (["--fp8"], {"format": "float8_e4m3fn"}),  # its granularity is tensor as well
        (["--scaling_mode", "block"], {"format": "int8_blockwise", "granularity": "block", "block_size": 128}),
        (["--int8"], INT8),  # a format that is named comes with its own granularity
    ]:
        code, _, err = lrq(
            "quantize", "-i", source, "-o", tmp_path / "q.safetensors", "--overwrite", "--recipe", path, *words
        )
        assert code == 0
        assert err == []
        assert recipe_of(tmp_path / "q.safetensors") == {**recipe.to_dict(), **changed}


def test_the_report_file(lrq, model_file, tmp_path):
    code, _, _ = lrq(
        "quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors", "--report", tmp_path / "report.json"
    )
    values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert code == 0
    assert len(values["layers"]) == 6
    assert values["output"] == str(tmp_path / "q.safetensors")
    assert values["bytes_out"] == (tmp_path / "q.safetensors").stat().st_size


def test_a_report_replaces_no_file_of_its_run(lrq, model_file, tmp_path, sentences):
    source, out, calibration, recipe = (
        model_file(),
        tmp_path / "q.safetensors",
        tmp_path / "x.calib.safetensors",
        tmp_path / "recipe.json",
    )
    recipe.write_text(Recipe().to_json())
    save_file({"blocks.0.attn.qkv.gram": torch.eye(32)}, calibration)
    (tmp_path / "link.json").symlink_to(source)
    os.link(source, tmp_path / "same.json")
    files = {path: path.read_bytes() for path in (source, calibration, recipe)}
    for report in (source, out, calibration, recipe, tmp_path / "link.json", tmp_path / "same.json"):
        code, _, (line,) = lrq(
            "quantize", "-i", source, "-o", out, "--recipe", recipe, "--calibration", calibration, "--report", report
        )
        assert code == 1
        sentences(line)
        assert not out.exists()
        assert all(path.read_bytes() == content for path, content in files.items())


@pytest.mark.parametrize("read", ["--recipe", "--layer-config", "--calibration"])
def test_an_output_replaces_no_file_that_its_run_reads(lrq, model_file, tmp_path, read, sentences):
    files = {
        "--recipe": lambda path: path.write_text(Recipe().to_json()),
        "--layer-config": lambda path: path.write_text('{"attn": "skip"}'),
        "--calibration": lambda path: save_file({"blocks.0.attn.qkv.gram": torch.eye(32)}, path),
    }
    path, source = tmp_path / "read.json", model_file()
    files[read](path)
    before = path.read_bytes()
    code, _, (line,) = lrq("quantize", "-i", source, "-o", path, read, path, "--overwrite")
    assert code == 1
    sentences(line)
    assert path.read_bytes() == before


def test_a_run_that_was_done_already_keeps_its_report(lrq, model_file, tmp_path):
    words = "quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors", "--report", tmp_path / "report.json"
    assert lrq(*words)[0] == 0
    before = (tmp_path / "report.json").read_bytes()
    assert lrq(*words)[0] == 0
    assert (tmp_path / "report.json").read_bytes() == before
    (tmp_path / "report.json").unlink()
    assert lrq(*words)[0] == 0
    assert json.loads((tmp_path / "report.json").read_text())["already_done"]


def test_a_report_stays_whole_on_a_full_disk(lrq, model_file, tmp_path, monkeypatch, sentences):
    (tmp_path / "report.json").write_text("the one before")
    monkeypatch.setattr(
        os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    )
    code, _, (line,) = lrq(
        "quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors", "--report", tmp_path / "report.json"
    )
    assert code == 1
    sentences(line)
    assert (tmp_path / "report.json").read_text() == "the one before"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "words",
    [
        ["--device", "nonsense"],
        ["--calibration", "nofile"],
        ["--report", "no/such/folder/report.json"],
        ["--rounding", "calibrated"],
        ["--rounding", "sequential"],
    ],
    ids=" ".join,
)
def test_a_dry_run_looks_at_every_option(lrq, model_file, tmp_path, listing, monkeypatch, words, sentences):
    source = model_file()
    monkeypatch.chdir(tmp_path)
    for more in (["--dry-run"], []):
        code, _, err = lrq("quantize", "-i", source, *words, *more)
        assert code == 1
        assert len(err) == 1
        sentences(err)
    assert listing() == ["model.safetensors"]
    assert lrq("plan", "-i", source, "--device", "nonsense")[0] == 1


@pytest.mark.parametrize("words", [["plan", "-i", "model.safetensors", "--general"], ["presets"]], ids=" ".join)
def test_a_reader_that_goes_away_ends_it_quietly(model_file, tmp_path, words):
    """As `lrq plan … | head -1` does, whoever is faster."""
    model_file()
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, ROOT, *words], stdout=write, stderr=subprocess.PIPE, cwd=tmp_path, timeout=120
    )
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    "streams, code",
    [(">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0), ("2>/dev/full", 0), (">/dev/full 2>&-", 1), (">/dev/full", 1)],
)
def test_streams_that_are_closed_or_full_do_not_end_the_work(model_file, tmp_path, streams, code, sentences):
    words = ["-i", model_file(), "-o", tmp_path / "q.safetensors", "--general", "--verbose"]
    command = [sys.executable, ROOT, "quantize", *words]
    for words, expected in ((command, code), ([sys.executable, ROOT, "verify", "none"], 1)):
        done = subprocess.run(
            ["sh", "-c", f"{shlex.join(map(str, words))} {streams}"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
        )
        assert done.returncode == expected
        assert "Traceback" not in done.stderr
        assert "unexpected" not in done.stderr
        if words is command:
            if streams == ">/dev/full":
                sentences(re.sub(r".*\r", "", done.stderr))
            assert verify_file(tmp_path / "q.safetensors").problems == []


def test_a_terminal_that_is_closed_during_the_work_does_not_end_it(model_file, tmp_path):
    """Writing to it is an input/output error from then on."""
    ours, theirs = pty.openpty()
    words = ["-i", model_file(), "-o", tmp_path / "q.safetensors", "--general", "--verbose"]
    command = [sys.executable, ROOT, "quantize", *words]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        os.close(ours)
        assert process.wait(timeout=120) == 0
    assert verify_file(tmp_path / "q.safetensors").problems == []


def test_names_give_a_terminal_no_orders(lrq, tmp_path):
    """A name that clears the screen, begins another line and ends one, or turns the direction of reading."""
    source, out, name = tmp_path / "model.safetensors", tmp_path / "out.safetensors", "a\x1b[2J\r\n\0\u202eb"
    save_file(
        {f"{name}.weight": torch.randn(32, 32), f"{name}.proj.weight": torch.full((32, 32), float("nan"))}, source
    )
    damaged = tmp_path / "damaged.safetensors"
    save_file({f"{name}.weight": torch.randn(8, 8), f"{name}.weight_scale": torch.ones(3)}, damaged)
    made = [
        lrq("plan", "-i", source, "--preset", "none"),
        lrq("quantize", "-i", source, "-o", out, "--preset", "none", "--verbose", "--simple"),
        lrq("inspect", out),
        lrq("verify", damaged),
        lrq("migrate", "-i", damaged, "-o", tmp_path / "new.safetensors"),
    ]
    assert [code for code, *_ in made] == [0, 0, 0, 1, 1]
    for code, text, errors in made:
        assert all(line.isprintable() for line in [*text.split("\n"), *errors]), (code, text, errors)
    assert "a\\x1b[2J\\r\\n\\x00\\u202eb.weight" in made[0][1]


def test_shards_of_a_quantized_model(lrq, model_file, tmp_path, sentences):
    """inspect, verify and migrate take an index or a folder as plan does."""
    lrq("quantize", "-i", model_file(), "-o", tmp_path / "one.safetensors", "--int8", "--simple")
    tensors, folder = load_file(tmp_path / "one.safetensors"), tmp_path / "parts"
    folder.mkdir()
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        metadata = file.metadata()
    places = {}
    for number in (1, 2):
        half = dict(list(tensors.items())[number - 1 :: 2])
        save_file(half, folder / f"model-{number}.safetensors", metadata)
        places |= dict.fromkeys(half, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for given in (folder, folder / "model.safetensors.index.json"):
        assert lrq("verify", given)[1] == lrq("verify", tmp_path / "one.safetensors")[1].replace(
            str(tmp_path / "one.safetensors"), str(given)
        )
        sentences(lrq("inspect", given)[1])
        assert lrq("migrate", "-i", given, "-o", tmp_path / "new.safetensors", "--overwrite")[0] == 0
        assert lrq("verify", tmp_path / "new.safetensors")[0] == 0
        made = load_file(tmp_path / "new.safetensors")
        assert made.keys() == tensors.keys()
        assert all(torch.equal(made[name], tensors[name]) for name in tensors)
    assert lrq("migrate", "-i", folder)[0] == 0
    assert (tmp_path / "parts_native.safetensors").exists()


def test_a_dry_run_writes_nothing(lrq, model_file, listing, sentences):
    source = model_file()
    code, out, err = lrq("quantize", "-i", source, "--dry-run")
    assert code == 0
    assert err == []
    assert listing() == ["model.safetensors"]
    sentences(out)
    assert lrq("quantize", "-i", source, "--dry_run")[1] == out
    assert lrq("plan", "-i", source)[1] == out


def test_verbose_prints_a_line_per_tensor(lrq, model, model_file, tmp_path):
    code, out, err = lrq("quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors", "--verbose")
    assert code == 0
    assert err == []
    assert all(sum(line.startswith(f"{name}  ") for line in out.splitlines()) == 1 for name in model())


def test_the_same_command_again_is_done_already(lrq, model_file, sentences):
    source = model_file()
    lrq("quantize", "-i", source)
    code, out, _ = lrq("quantize", "-i", source)
    assert code == 0
    sentences(out)


def test_overwrite(lrq, model_file, tmp_path):
    source, out = model_file(), tmp_path / "q.safetensors"
    lrq("quantize", "-i", source, "-o", out)
    assert lrq("quantize", "-i", source, "-o", out, "--int8")[0] == 1
    assert lrq("quantize", "-i", source, "-o", out, "--int8", "--overwrite")[0] == 0
    assert recipe_of(out)["format"] == "int8_tensorwise"


def test_inspect(lrq, model_file, tmp_path, sentences):
    source = model_file()
    code, out, err = lrq("inspect", source)
    assert code == 0
    assert err == []
    sentences(out)
    lrq("quantize", "-i", source, "-o", tmp_path / "q.safetensors", "--int8")
    sentences(lrq("inspect", tmp_path / "q.safetensors")[1])
    lrq("quantize", "-i", source, "-o", tmp_path / "r.safetensors", "--int8", "--convrot", "--scaling_mode", "row")
    sentences(lrq("inspect", tmp_path / "r.safetensors")[1])
    lrq("quantize", "-i", source, "-o", tmp_path / "b.safetensors", "--int8", "--scaling_mode", "block")
    sentences(lrq("inspect", tmp_path / "b.safetensors")[1])


def test_verify_prints_notes_on_a_valid_file(lrq, tmp_path, sentences):
    save_file({"a\x1b.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    code, out, err = lrq("verify", tmp_path / "a.safetensors")
    assert code == 0
    assert err == []
    sentences(out)


def test_verify(lrq, model_file, tmp_path, sentences):
    lrq("quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors")
    code, out, err = lrq("verify", tmp_path / "q.safetensors")
    assert code == 0
    assert err == []
    sentences(out)
    tensors = load_file(tmp_path / "q.safetensors")
    tensors["blocks.0.mlp.0.weight_scale"] = torch.tensor(float("nan"))
    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        save_file(tensors, tmp_path / "bad.safetensors", file.metadata())
    code, out, err = lrq("verify", tmp_path / "bad.safetensors")
    assert code == 1
    assert out == ""
    sentences(err)


def test_formats_and_presets(lrq):
    code, out, _ = lrq("formats")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(FORMATS)
    code, out, _ = lrq("presets")
    assert code == 0
    assert all(f"{name}: {preset.title}" in out for name, preset in PRESETS.items())


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["quantize"],
        ["quantize", "-i", "a", "--nonsense"],
        ["quantize", "-i", "a", "--manual_seed", "x"],
        ["quantize", "-i", "a", "--format", "nvfp9"],
        ["quantize", "-i", "a", "--int8", "--fp8"],
        ["quantize", "-i", "a", "--flux", "--wan"],
        ["quantize", "-i", "a", "--flux", "--preset", "none"],
        ["quantize", "-i", "a", "--simple", "--rounding", "auto"],
        ["quantize", "-i", "a", "--over"],
        ["quantize", "-i", "a", "--num_iter", "ten"],
        ["quantize", "-i", "a", "--optimizer", "adam"],
        ["quantize", "-i", "a", "--rounding", "learned"],
        ["verify"],
        ["formats", "extra"],
        ["quantise", "a"],
        ["quantize", "a", "b", "-o", "c.safetensors"],
        ["quantize", "a", "b", "-o", "c/", "--report", "r.json"],
        ["plan", "a", "--no-convrot", "--convrot", "64"],
        ["plan", "a", "--nonsense\nb"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_exits_with_2(strict_lrq, words, sentences):
    """Unknown options are refused, not ignored; abbreviations are unknown options."""
    code, out, err = strict_lrq(*words)
    assert code == 2
    assert out == ""
    assert len(err) == 1
    sentences(err)


@pytest.mark.parametrize(
    "typed, format",
    {
        "INT8": "int8_tensorwise",
        "w8a8": "int8_tensorwise",
        "fp8": "float8_e4m3fn",
        "FP8-E4M3FN": "float8_e4m3fn",
        "e5m2": "float8_e5m2",
        "int4": "asym_w4a8_int8",
        "W4A8": "asym_w4a8_int8",
        "fp4": "nvfp4",
        "NVFP4": "nvfp4",
        "mxfp8": "mxfp8",
        "w4a4": "convrot_w4a4",
    }.items(),
)
def test_names_that_users_type_are_formats(typed, format):
    args = make_parser().parse_args(["plan", "x", "--format", typed])
    assert runs.build_recipe(args).format.name == format


@pytest.mark.parametrize("flag", ["nvfp4", "mxfp8"])
def test_formats_are_options_of_their_own(flag):
    assert runs.build_recipe(make_parser().parse_args(["plan", "x", f"--{flag}"])).format.name == flag


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


@pytest.mark.parametrize("prepare, words", ERRORS.values(), ids=ERRORS)
def test_an_error_is_one_line(lrq, model_file, tmp_path, monkeypatch, prepare, words, sentences):
    model_file()
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, err = lrq(*words)
    assert code == 1, err
    assert len(err) == 1, err
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
    monkeypatch.setattr(loop, "quantize_layer", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are without
    try:
        code, _, err = lrq("quantize", "-i", source)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert len(err) == 1
    sentences(err)
    assert listing() == ["model.safetensors"]


# As users start it


def run(command: list, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_the_process_waits_for_no_thread_that_hangs(tmp_path):
    code = "import sys, threading; from learned_rounding.quant_core import cli; threading.Thread(target=threading.Event().wait).start(); cli.run()"
    result = subprocess.run(
        [sys.executable, "-c", code, "formats"], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "int8_blockwise" in result.stdout, result.stderr


def test_a_clone_under_another_name_runs_from_anywhere(model_file, tmp_path, listing):
    """A copy, with a version of its own: nothing of an installed package may answer in its place."""
    clone = tmp_path / "custom_nodes" / "ComfyUI-Learned-Rounding"
    clone.mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / name, clone / name)
    for name in ("quant_core", "kernels"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "quant_core" / "version.py").write_text('VERSION = "9.8.7"\n')
    (clone / "nodes").mkdir()
    (clone / "nodes" / "__init__.py").write_text("raise ImportError('the command line needs no nodes')")
    work = tmp_path / "work"
    work.mkdir()
    model_file().rename(work / "model.safetensors")
    result = run([sys.executable, clone, "quantize", "-i", "model.safetensors", "--int8", "--general"], work)
    assert result.returncode == 0, result.stderr
    assert error_lines(result.stderr) == []
    assert verify_file(work / "model_int8_convrot.safetensors").problems == []
    with safe_open(work / "model_int8_convrot.safetensors", "pt") as file:
        assert json.loads(file.metadata()["learned_rounding"])["version"] == "9.8.7"
    assert [name for name in listing() if name.startswith("work/")] == [
        "work/model.safetensors",
        "work/model_int8_convrot.safetensors",
    ]


def test_a_link_to_the_folder_runs_and_an_error_has_no_trace(tmp_path, sentences):
    link = tmp_path / "ComfyUI-Learned-Rounding"
    link.symlink_to(ROOT, target_is_directory=True)
    result = run([sys.executable, link, "verify", "none.safetensors"], tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    sentences(result.stderr)


def test_the_installed_command_runs(tmp_path):
    command = Path(sys.executable).with_name("lrq")
    if not command.exists():
        pytest.skip("the package is not installed beside this interpreter")
    result = run([command, "formats"], tmp_path)
    assert result.returncode == 0
    assert "float8_e4m3fn" in result.stdout


def test_what_nobody_foresaw_is_one_line_too(lrq, monkeypatch, tmp_path, sentences):
    def broken(*args):
        raise ZeroDivisionError("a line\nand another")

    monkeypatch.setattr(cli, "inspect_file", broken)
    code, _, err = lrq("inspect", tmp_path)
    assert code == 1
    assert len(err) == 1
    sentences(err)
    code, _, err = lrq("inspect", tmp_path, "--debug")
    assert code == 1
    assert err[0].startswith("Traceback")
    sentences(err[-1])


def test_version_is_that_of_the_package(lrq):
    assert lrq("--version") == (0, f"lrq {VERSION}\n", [])


def test_the_help_tells_the_exit_codes(lrq):
    _, out, _ = lrq("--help")
    said = " ".join(out.split())
    assert all(f"{code} {meaning}" in said for code, meaning in parser.EXIT_CODES.items())


@pytest.mark.parametrize("command", [["plan"], ["quantize"], ["quantize", "--dry-run"]], ids=" ".join)
def test_an_unrecognized_model_ends_before_any_work_unless_general_is_given(
    strict_lrq, model_file, listing, command, sentences
):
    source = model_file()
    code, out, err = strict_lrq(*command, "-i", source)
    assert code == 1
    assert out == ""
    assert listing() == ["model.safetensors"]
    sentences(err)
    assert strict_lrq(*command, "-i", source, "--general")[0] == 0
    none = ["--preset", "none", *(["--overwrite"] if command[0] == "quantize" else [])]
    assert strict_lrq(*command, "-i", source, *none)[0] == 0  # who names the general rule has asked for it


def test_a_choice_that_matches_no_layer_is_a_warning(lrq, model_file, tmp_path, sentences):
    custom = ["--custom-layers", "mpl", "--custom-type", "fp8", "--exclude-layers", "qvk", "--exclude-layers", "qkv"]
    for words in (["plan"], ["quantize", "-o", tmp_path / "q.safetensors", "--report", tmp_path / "r.json"]):
        code, out, err = lrq(*words, "-i", model_file(), "--preset", "flux", *custom)
        assert code == 0
        assert len(err) == 1
        assert err[0].startswith(UNUSED)
        sentences(err)
    (warning,) = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["warnings"]
    assert err == [f"lrq: warning: {warning}"]
    assert warning in out
