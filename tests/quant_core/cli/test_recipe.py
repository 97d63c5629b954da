"""The recipe that options and recipe files describe."""

import json
from pathlib import Path

import pytest
import torch

from learned_rounding.quant_core import PRESETS, Recipe
from learned_rounding.quant_core.cli.parser import make_parser
from learned_rounding.quant_core.cli.recipe import build_recipe, layer_config_file
from learned_rounding.quant_core.output import verify_file

from .reading import INT8, KEEP_ALL, ROW, recipe_of

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


def recipe_for(*words) -> Recipe:
    return build_recipe(make_parser().parse_args(["quantize", "-i", "model.safetensors", *map(str, words)]))


def test_options_become_the_recipe(subtests):
    for title, (words, changed) in OPTIONS.items():
        with subtests.test(title):
            assert recipe_for(*words).to_dict() == {**Recipe().to_dict(), **changed}


def test_the_recipe_of_the_options_is_in_the_file(lrq, model_file, subtests):
    source = model_file()
    for title in ("convrot with a value", "rank", "synthetic bias", "exclude twice", "a layer's rule twice"):
        words, changed = OPTIONS[title]
        with subtests.test(title):
            assert lrq("quantize", "-i", source, "-o", "q.safetensors", "--overwrite", *words)[0] == 0
            assert recipe_of("q.safetensors") == {**Recipe().to_dict(), **changed}
            assert verify_file("q.safetensors").problems == []


CUSTOM = [
    "--custom-layers",
    "mlp",
    "--custom_layers",
    "qkv",
    "--custom-type",
    "int8",
    "--layer-config",
    '{"blocks.0.mlp.0": "skip"}',
]


def test_custom_layers_get_their_type(lrq, model_file, sentences):
    assert json.loads(recipe_for(*CUSTOM).layer_config) == {"blocks.0.mlp.0": "skip", "mlp": "int8", "qkv": "int8"}
    code, lines, _ = lrq("plan", "-i", model_file(), *CUSTOM)
    assert code == 0
    sentences(lines)


def test_a_layer_config_in_a_file(lrq, model_file, tmp_path, sentences):
    config = tmp_path / "layers.json"
    config.write_text('{"mlp": "skip"}')
    code, lines, _ = lrq("plan", "-i", model_file(), "--layer-config", config)
    assert code == 0
    sentences(lines)


def test_layer_configs_without_a_file_a_type_or_layers_are_refused(lrq, model_file, tmp_path, sentences, subtests):
    for words in (
        ["--layer-config", tmp_path / "none.json"],
        ["--custom-layers", "mlp"],
        ["--custom-type", "int8"],
        ["--custom-layers", "mlp", "--custom-type", "int9"],
    ):
        with subtests.test(words=words):
            code, _, err = lrq("plan", "-i", model_file(), *words)
            assert code == 1
            sentences(err)


def test_layer_config_names_a_file_unless_it_is_json():
    def file_of(*words):
        return layer_config_file(make_parser().parse_args(["plan", "x", *words]))

    assert file_of() is None
    assert file_of("--layer-config", ' {"mlp": "skip"}') is None
    assert file_of("--layer-config", "layers.json") == Path("layers.json")


@pytest.mark.parametrize(
    "capability, hip, expected",
    [
        ((8, 9), None, "int8_convrot"),
        ((7, 0), None, "float8_e4m3fn"),
        ((9, 4), "6", "float8_e4m3fn"),
        (None, None, "float8_e4m3fn"),
    ],
    ids=["SM 8.9", "SM 7.0", "AMD", "no card"],
)
def test_format_auto_is_that_of_the_card(monkeypatch, capability, hip, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert recipe_for("--format", "auto").format.label == expected


@pytest.mark.parametrize("write", [Recipe.to_toml, Recipe.to_json], ids=["toml", "json"])
def test_options_override_a_recipe_file(tmp_path, write, subtests):
    recipe = Recipe(format="int8_tensorwise", granularity="tensor", rounding="nearest", keep=("qkv",), seed=5)
    path = tmp_path / f"recipe.{'toml' if write is Recipe.to_toml else 'json'}"
    path.write_text(write(recipe), encoding="utf-8")
    for words, changed in [
        ([], {}),
        (["--seed", "6", "--rounding", "auto"], {"seed": 6, "rounding": "auto"}),
        (["--scaling_mode", "row"], {"granularity": "row"}),
        (["--exclude-layers", "mlp"], {"keep": ["mlp"]}),
        (["--fp8"], {"format": "float8_e4m3fn"}),  # its granularity is tensor as well
        (["--scaling_mode", "block"], {"format": "int8_blockwise", "granularity": "block", "block_size": 128}),
        (["--int8"], INT8),  # a format that is named comes with its own granularity
    ]:
        with subtests.test(words=words):
            assert recipe_for("--recipe", path, *words).to_dict() == {**recipe.to_dict(), **changed}
