"""The parser: flags of presets and formats, spellings, options of other tools, and help."""

import re

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding import kernels
from learned_rounding.quant_core.cli import parser, runs
from learned_rounding.quant_core.cli.parser import is_folder, make_parser
from learned_rounding.quant_core.cli.recipe import build_recipe
from learned_rounding.quant_core.recipes import PRESETS
from learned_rounding.quant_core.recipes.presets import ALIASES
from learned_rounding.quant_core.run import quantize as pipeline
from learned_rounding.quant_core.version import VERSION

from .reading import UNUSED

KNOWN = """
    -i --input -o --output --comfy_quant --int8 --simple --heur --full_precision_matrix_mult --input_scale --t5xxl --distillation_large
    --distillation_small --nerf_large --nerf_small --radiance --wan --qwen --hunyuan --zimage --zimage_l --zimage_s --flux2 --full_matrix
    --scaling_mode --block_size --calib_samples --manual_seed --optimizer --num_iter --lr --top_p --min_k --max_k --kernel_backend
    --exclude-layers --custom-layers --custom-type --layer-config --fallback --convrot --convrot-group-size --save-quant-metadata
    --low-memory --convert-fp8-scaled --dry-run --verbose --device
"""


REFUSED = ("--input_scale", "--fallback", "--convert-fp8-scaled")


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


def outcome(lrq, made: list, tmp_path, *words):
    """What a run is given, prints and writes."""
    made.clear()
    code, out, err = lrq("quantize", "-i", "model.safetensors", "--overwrite", *words)
    assert code == 0
    assert [line for line in err if not line.startswith(UNUSED)] == []
    lines = [re.sub(r"[\d.]+ s$", "", line) for line in out.splitlines() if not line.startswith("time")]
    for path in (*tmp_path.glob("model_*"), *tmp_path.glob("out*")):
        path.unlink()
    return lines, *made


@pytest.fixture
def made(monkeypatch, tmp_path):
    """What :func:`quantize_file` is given; beside the model is another of the same content."""
    generator, given = torch.Generator().manual_seed(0), []
    layers = ("blocks.0.attn.qkv.weight", "blocks.0.mlp.0.weight")
    for name in ("model.safetensors", "other.safetensors"):
        save_file({layer: torch.randn(32, 32, generator=generator) for layer in layers}, tmp_path / name)

    def record(source, output, recipe, **options):
        given.append((source.name, output, recipe, options["device"], kernels.backend()))
        return pipeline.quantize_file(source, output, recipe, **options)

    monkeypatch.setattr(runs, "quantize_file", record)
    return given


def test_options_of_the_published_tool_act(lrq, made, tmp_path, subtests):
    """They change what the run is given, or what it prints and writes, unless they ask for what is always done."""
    without: dict[str, object] = {}
    for option in (word for word in KNOWN.split() if word not in REFUSED):
        with subtests.test(option):
            beside, value = TRIED.get(option, ("", ""))
            if beside not in without:
                without[beside] = outcome(lrq, made, tmp_path, *beside.split())
            found = outcome(lrq, made, tmp_path, *beside.split(), option, *filter(None, [value]))
            assert (found == without[beside]) is (option in ALWAYS)


def test_options_of_other_tools_that_are_refused_name_what_to_do(lrq, sentences, subtests):
    for option in REFUSED:
        for words in ([option], [option, "int8"]):
            with subtests.test(option, value=words[1:]):
                code, _, err = lrq("quantize", "-i", "model.safetensors", *words)
                assert code == 2
                sentences(err[-1])


def test_every_preset_has_a_flag_of_its_own(subtests):
    parse = make_parser().parse_args
    for name in (*PRESETS, *ALIASES):
        with subtests.test(name):
            assert parse(["plan", "-i", "x", f"--{name}"]).preset == name
            assert parse(["plan", "-i", "x", f"--{name.replace('_', '-')}"]).preset == name


VALUES = {int: "3", float: "0.5", parser._parse_convrot: "64"}  # types → a value; text takes any


@pytest.mark.parametrize("command, spelt_twice", [("quantize", 20), ("plan", 20), ("migrate", 1)])
def test_every_option_is_understood_with_dashes_and_underscores(command, spelt_twice, subtests):
    lrq = make_parser()
    options = lrq._subparsers._group_actions[0].choices[command]._option_string_actions
    default, tried = vars(lrq.parse_args([command, "-i", "x"])), 0
    for option, action in options.items():
        if not option.startswith("--") or isinstance(action, parser._Refusal) or option == "--help":
            continue
        value = [] if action.nargs == 0 else [next(iter(action.choices or ()), VALUES.get(action.type, "text"))]
        spelt = {option, f"--{option[2:].replace('-', '_')}", f"--{option[2:].replace('_', '-')}"}
        with subtests.test(option):
            first, *others = (vars(lrq.parse_args([command, "-i", "x", way, *value])) for way in spelt)
            assert first != default
            assert all(other == first for other in others)
        tried += len(spelt) > 1
    assert tried >= spelt_twice


TYPED = {
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
}


def test_names_that_users_type_are_formats(subtests):
    for typed, format in TYPED.items():
        with subtests.test(typed):
            args = make_parser().parse_args(["plan", "x", "--format", typed])
            assert build_recipe(args).format.name == format


def test_formats_are_options_of_their_own(subtests):
    for flag in ("nvfp4", "mxfp8"):
        with subtests.test(flag):
            assert build_recipe(make_parser().parse_args(["plan", "x", f"--{flag}"])).format.name == flag


def test_version_is_that_of_the_package(lrq):
    assert lrq("--version") == (0, f"lrq {VERSION}\n", [])


def test_the_help_tells_the_exit_codes(lrq):
    _, out, _ = lrq("--help")
    said = " ".join(out.split())
    assert all(f"{code} {meaning}" in said for code, meaning in parser.EXIT_CODES.items())


def test_preset_flags_are_accepted_and_not_in_the_help():
    parser = make_parser()
    commands = parser._subparsers._group_actions[0].choices
    for command in ("quantize", "plan"):
        text = commands[command].format_help()
        assert not any(f"--{name.replace('_', '-')} " in text or f"--{name} " in text for name in PRESETS)
    assert parser.parse_args(["plan", "x", "--t5xxl"]).preset == "t5xxl"


def test_models_of_both_spellings_are_joined_without_repetition():
    args = make_parser().parse_args(["plan", "a", "b", "-i", "c", "--input", "a"])
    assert [str(path) for path in args.inputs] == ["a", "b", "c"]


def test_output_is_a_folder_if_it_ends_with_a_separator_or_exists(tmp_path):
    assert is_folder("new/")
    assert is_folder(str(tmp_path))
    assert not is_folder(str(tmp_path / "new"))
