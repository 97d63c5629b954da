"""Each way to break the contract has its own sentence, and a good file has none."""

import json

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import FORMATS, Recipe, quantize_tensors
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.output import inspect_file, verify_file

LAYER = "blocks.0.attn.qkv"
BANK_FORMATS = [name for name, format in FORMATS.items() if format.banks]
HEADER = "_quantization_metadata"
RECIPES = {
    "fp8": Recipe(rounding="nearest"),
    "fp8 full precision": Recipe(rounding="nearest", full_precision_matmul=True),
    "e5m2": Recipe(format="float8_e5m2", rounding="nearest"),
    "int8 row": Recipe(format="int8_tensorwise", convrot=False, rounding="nearest"),
    "int8 tensor": Recipe(format="int8_tensorwise", granularity="tensor", rounding="nearest"),
    "int8 convrot": Recipe(format="int8_tensorwise", convrot=16, rounding="nearest"),
    "nvfp4": Recipe(format="nvfp4", rounding="nearest"),
    "mxfp8": Recipe(format="mxfp8", rounding="nearest"),
}


def config(value) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.fixture
def verify(model, tmp_path):
    """verify(recipe, change=…, prefix="") → the problems of a quantized file after ``change(tensors, metadata)``."""

    def run(recipe: Recipe, change=lambda tensors, metadata: None, prefix: str = ""):
        made = quantize_tensors({prefix + name: tensor for name, tensor in model().items()}, recipe)
        change(made.tensors, made.metadata)
        save_file(made.tensors, tmp_path / "q.safetensors", made.metadata or None)
        return verify_file(tmp_path / "q.safetensors")

    return run


def test_a_good_file_has_no_problems(verify, subtests):
    for label, recipe in RECIPES.items():
        for prefix in ["", "model.diffusion_model."]:
            with subtests.test(label, prefix=prefix):
                result = verify(recipe, prefix=prefix)
                assert result.problems == []
                assert result.warnings == []
                assert result.layers == 6


def test_plain_weights_have_no_problems(model_file):
    result = verify_file(model_file())
    assert result.problems == []
    assert result.warnings == []
    assert result.layers == 0


def change_header(edit):
    def change(tensors, metadata):
        header = json.loads(metadata[HEADER])
        edit(header["layers"])
        metadata[HEADER] = json.dumps(header)

    return change


def set_both(key, value):
    """Change a layer's JSON in both places, so that they still agree."""

    def change(tensors, metadata):
        now = json.loads(tensors[f"{LAYER}.comfy_quant"].numpy().tobytes())
        now[key] = value
        if value is None:
            del now[key]
        tensors[f"{LAYER}.comfy_quant"] = config(now)
        change_header(lambda layers: layers.update({LAYER: now}))(tensors, metadata)

    return change


def put(suffix, value):
    return lambda tensors, metadata: tensors.update({f"{LAYER}.{suffix}": value(tensors) if callable(value) else value})


def drop(*suffixes):
    return lambda tensors, metadata: [tensors.pop(f"{LAYER}.{suffix}") for suffix in suffixes]


def both(*changes):
    return lambda tensors, metadata: [change(tensors, metadata) for change in changes]


BREAKS = {
    "codes nothing multiplies": (
        "e5m2",
        set_both("full_precision_matrix_mult", None),
    ),
    "no scale": ("int8 row", drop("weight_scale")),
    "scale of another shape": (
        "int8 row",
        put("weight_scale", torch.ones(96)),
    ),
    "scale of a part of the rows": ("int8 row", put("weight_scale", torch.ones(95, 1))),
    "row scale on fp8": (
        "fp8",
        put("weight_scale", torch.ones(96, 1)),
    ),
    "one-element scale on fp8": ("fp8", put("weight_scale", torch.ones(1))),
    "scale in half precision": (
        "fp8",
        put("weight_scale", torch.tensor(1.0, dtype=torch.float16)),
    ),
    "NaN scale": (
        "fp8",
        put("weight_scale", torch.tensor(float("nan"))),
    ),
    "infinite scale": (
        "fp8",
        put("weight_scale", torch.tensor(float("inf"))),
    ),
    "zero scale": (
        "fp8",
        put("weight_scale", torch.tensor(0.0)),
    ),
    "one negative row": (
        "int8 row",
        put("weight_scale", torch.cat([torch.ones(95, 1), -torch.ones(1, 1)])),
    ),
    "zero input scale": (
        "fp8",
        put("input_scale", torch.tensor(0.0)),
    ),
    "complex input scale": (
        "fp8",
        put("input_scale", torch.tensor(1j)),
    ),
    "input scale in whole numbers": (
        "fp8",
        put("input_scale", torch.tensor(1, dtype=torch.uint16)),
    ),
    "several input scales": (
        "fp8",
        put("input_scale", torch.ones(3)),
    ),
    "zero input scale in FP8": (
        "fp8",
        put("input_scale", torch.zeros(()).to(torch.float8_e4m3fn)),
    ),
    "codes of another dtype": ("fp8", put("weight", torch.zeros(96, 32, dtype=torch.int8))),
    "weights instead of codes": ("int8 row", put("weight", torch.zeros(96, 32))),
    "no weight": ("int8 row", drop("weight")),
    "weight of four axes": (
        "fp8",
        put("weight", torch.zeros(4, 4, 2, 2).to(torch.float8_e4m3fn)),
    ),
    "unknown format": (
        "fp8",
        set_both("format", "float8_e3m4"),
    ),
    "another format": (
        "fp8",
        set_both("format", "float8_e4m3fn_rowwise"),
    ),
    "no format": ("fp8", set_both("format", None)),
    "rotation under params": (
        "int8 row",
        set_both("params", {"convrot": True, "convrot_groupsize": 256}),
    ),
    "per_row without rows": (
        "int8 tensor",
        set_both("per_row", True),
    ),
    "header disagrees": (
        "fp8",
        change_header(lambda layers: layers.update({LAYER: {"format": "int8_tensorwise"}})),
    ),
    "header lacks a layer": (
        "fp8",
        change_header(lambda layers: layers.pop(LAYER)),
    ),
    "header has a layer more": (
        "fp8",
        change_header(lambda layers: layers.update(ghost={"format": "float8_e4m3fn"})),
    ),
    "only the header knows a layer": (
        "fp8",
        drop("comfy_quant"),
    ),
    "codes unknown to both": (
        "fp8",
        both(drop("comfy_quant", "weight_scale"), change_header(lambda layers: layers.pop(LAYER))),
    ),
    "scale of an unquantized weight": (
        "fp8",
        lambda tensors, metadata: tensors.update(
            {"patch.weight": torch.ones(4, 4), "patch.weight_scale": torch.tensor(0.5)}
        ),
    ),
    "orphan scale": (
        "fp8",
        lambda tensors, metadata: tensors.update({"patch.weight_scale": torch.tensor(1.0)}),
    ),
}


def test_a_broken_contract_has_its_sentence(verify, sentences, subtests):
    for name, (recipe, change) in BREAKS.items():
        with subtests.test(name):
            (problem,) = verify(RECIPES[recipe], change).problems
            sentences(problem)
            assert problem.startswith(("blocks.", "ghost: ", "patch: "))
            assert "\n" not in problem


def remove_header(tensors, metadata):
    metadata.pop(HEADER)


# Files as other writers make them: ComfyUI's own save, Comfy-Org's files, convert_to_quant.
VALID = {
    "per_row missing": ("int8 row", set_both("per_row", None)),
    "per_row missing in the header": (
        "int8 row",
        change_header(lambda layers: [config.pop("per_row") for config in layers.values()]),
    ),
    "no header": ("int8 row", remove_header),
    "neither": ("int8 row", both(set_both("per_row", None), remove_header)),
    "per_row missing, rotated": ("int8 convrot", set_both("per_row", None)),
    "rotation under params": (
        "int8 convrot",
        both(
            set_both("convrot", None),
            set_both("convrot_groupsize", None),
            set_both("params", {"convrot": True, "convrot_groupsize": 16}),
        ),
    ),
    "one scale without per_row": ("int8 tensor", remove_header),
}


def test_files_of_other_writers_are_valid(verify, subtests):
    for name, (recipe, change) in VALID.items():
        with subtests.test(name):
            result = verify(RECIPES[recipe], change)
            assert result.problems == []
            assert result.warnings == []
            assert result.layers == 6


def test_a_missing_header_is_a_warning_for_formats_of_older_releases(verify, sentences):
    result = verify(RECIPES["fp8"], remove_header)
    assert result.problems == []
    (warning,) = result.warnings
    sentences(warning)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_files_without_json_tensors_are_valid(verify, tmp_path, prefix):
    """The only form that ComfyUI's QUANTIZATION.md describes; our header lists the layers of a checkpoint by two names."""

    def remove_json(tensors, metadata):
        for name in [name for name in tensors if name.endswith(".comfy_quant")]:
            del tensors[name]

    result = verify(RECIPES["fp8"], remove_json, prefix=prefix)
    assert result.problems == []
    assert result.warnings == []
    assert result.layers == 6
    assert inspect_file(tmp_path / "q.safetensors").quantized == {"float8_e4m3fn per tensor": 6}
    put_nan = put("weight", lambda tensors: (tensors[f"{LAYER}.weight"].float() * float("nan")).to(torch.float8_e4m3fn))
    (problem,) = verify(RECIPES["fp8"], both(remove_json, put_nan)).problems
    assert problem.startswith(LAYER)
    assert "NaN" in problem


def test_rotations_by_any_power_of_four_are_valid(tmp_path, subtests):
    for size in [4, 16, 64, 256, 1024, 4096]:
        with subtests.test(size=size):
            save_rotated(tmp_path / "a.safetensors", torch.randn(4, 8192), size)
            result = verify_file(tmp_path / "a.safetensors")
            assert result.problems == []
            assert result.layers == 1


def test_other_rotations_are_not(tmp_path, sentences, subtests):
    for size, columns in [(1024, 512), (512, 8192), (2, 8192), (0, 8192), (True, 8192), ("256", 8192)]:
        with subtests.test(size=size, columns=columns):
            save_rotated(tmp_path / "a.safetensors", torch.randn(4, columns), size)
            (problem,) = verify_file(tmp_path / "a.safetensors").problems
            sentences(problem)


def save_rotated(path, values, size):
    """A layer whose JSON has a ConvRot group of that size."""
    tensors = {
        "a.weight": values.mul(20).to(torch.int8),
        "a.weight_scale": torch.ones(len(values), 1),
        "a.comfy_quant": config({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}),
    }
    save_file(tensors, path)


def test_a_prefixed_checkpoint_needs_both_names(verify):
    for gone in (LAYER, f"model.diffusion_model.{LAYER}"):
        result = verify(
            RECIPES["fp8"], change_header(lambda layers, gone=gone: layers.pop(gone)), prefix="model.diffusion_model."
        )
        assert [problem.split(":")[0] for problem in result.problems] == [gone]


def test_a_second_name_is_for_releases_that_have_the_format(verify):
    """ComfyUI before 0.27, which needs the name without prefix, has no INT8."""
    remove = change_header(lambda layers: layers.pop(LAYER))
    assert verify(RECIPES["int8 row"], remove, prefix="model.diffusion_model.").problems == []


BANK = "layers.0.mlp.experts.gate_up_proj"
BANK_RECIPES = {
    **{
        name: Recipe(format=name, rounding="nearest", preset="none", layer_config=f'{{"_proj": "{name}"}}')
        for name in BANK_FORMATS
    },
    "int8 tensor": Recipe(format="int8_tensorwise", granularity="tensor", rounding="nearest", preset="none"),
}


@pytest.fixture
def verify_bank(gpt_oss, tmp_path):
    """verify_bank(recipe, change=…) → the problems of a quantized file with banks of experts after ``change(tensors)``."""

    def run(recipe: Recipe, change=lambda tensors: None):
        tensors = quantize_tensors(gpt_oss(), recipe).tensors
        change(tensors)
        save_file(tensors, tmp_path / "q.safetensors", {})
        return verify_file(tmp_path / "q.safetensors")

    return run


def test_banks_of_experts_are_checked_like_layers(verify_bank, subtests):
    for label, recipe in BANK_RECIPES.items():
        with subtests.test(label):
            result = verify_bank(recipe)
            assert result.problems == []
            assert result.layers == 3


def damage(suffix, value):
    def change(tensors):
        scale = tensors[f"{BANK}.{suffix}"]
        tensors[f"{BANK}.{suffix}"] = torch.cat([scale[:1], torch.full_like(scale[1:2], value), scale[2:]])

    return change


def test_a_damaged_expert_is_named(verify_bank, sentences, subtests):
    for label, (name, change) in {
        "scale": ("int8_tensorwise", damage("weight_scale", -1.0)),
        "tensor scale": ("nvfp4", damage("weight_scale_2", float("nan"))),
        "values": ("float8_e4m3fn", damage("weight", float("nan"))),
        "exponent": ("mxfp8", damage("weight_scale", 255)),
        "scales of fewer experts": (
            "float8_e4m3fn",
            lambda tensors: tensors.update({f"{BANK}.weight_scale": torch.ones(2)}),
        ),
        "no scale": ("int8_tensorwise", lambda tensors: tensors.pop(f"{BANK}.weight_scale")),
    }.items():
        with subtests.test(label):
            (problem,) = verify_bank(BANK_RECIPES[name], change).problems
            sentences(problem)


def test_banks_that_comfyui_misreads_are_not_valid(tmp_path, sentences, subtests):
    for label, bank in {
        "rotated": {
            "format": "int8_tensorwise",
            "per_row": True,
            "convrot": True,
            "convrot_groupsize": 16,
            "num_experts": 3,
        },
        "format of this pack": {"format": "float8_e4m3fn_rowwise", "num_experts": 3},
        "another number of experts": {"format": "int8_tensorwise", "per_row": True, "num_experts": 4},
        "unknown": {"format": "nvfp9", "num_experts": 3},
    }.items():
        with subtests.test(label):
            dtype = torch.float8_e4m3fn if "float8" in bank["format"] else torch.int8
            tensors = {
                "a.weight": torch.ones(3, 16, 32).to(dtype),
                "a.weight_scale": torch.ones(3, 16, 1),
                "a.comfy_quant": config(bank),
            }
            save_file(tensors, tmp_path / "a.safetensors")
            (problem,) = verify_file(tmp_path / "a.safetensors").problems
            sentences(problem)


def test_all_broken_layers_are_found(verify):
    def change(tensors, metadata):
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name] = torch.full_like(tensors[name], -1.0)

    assert len(verify(RECIPES["int8 row"], change).problems) == 6


def test_quantized_values_without_json(tmp_path, sentences):
    save_file({"a.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "a.safetensors")
    (problem,) = verify_file(tmp_path / "a.safetensors").problems
    assert problem.startswith("a: ")
    sentences(problem)


FP8 = (torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) * 20).clamp(-100, 100)


def scaled_fp8(dtype=torch.float8_e4m3fn, **changes):
    """A layer of scaled FP8 as it was written before ComfyUI had layer JSON; a changed tensor of None is left out."""
    tensors = {
        "a.weight": FP8.to(dtype),
        "a.scale_weight": torch.tensor(0.01),
        "a.scale_input": torch.tensor(1.0),
        "scaled_fp8": torch.zeros(0).to(dtype),
        "norm.weight": torch.ones(16),
    }
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in (tensors | named).items() if tensor is not None}


OLD = {
    "scaled": scaled_fp8(),
    "scaled, full precision": scaled_fp8(scaled_fp8=torch.zeros(2)),
    "scaled in one element": scaled_fp8(a__scale_weight=torch.tensor([0.01])),
    "scaled, with an unscaled layer": scaled_fp8(b__weight=FP8.to(torch.float8_e4m3fn)),
    "prefixed": {f"model.diffusion_model.{name}": tensor for name, tensor in scaled_fp8().items()},
    "plain e4m3": {"a.weight": FP8.to(torch.float8_e4m3fn), "a.bias": FP8[0].to(torch.float8_e4m3fn)},
    "plain e5m2": {"a.weight": FP8.to(torch.float8_e5m2)},
    "plain, embedding of large values": {"a.weight": (FP8 * 4).to(torch.float8_e4m3fn)},
}


def test_older_fp8_files_are_valid(tmp_path, sentences, subtests):
    for name in OLD:
        with subtests.test(name):
            save_file(OLD[name], tmp_path / "a.safetensors")
            result = verify_file(tmp_path / "a.safetensors")
            assert result.problems == []
            assert result.layers == 0
            assert result.warnings
            sentences(result.warnings)


def test_older_layers_beside_one_of_today(tmp_path, sentences):
    """ComfyUI looks for older layers in files without the header entry only."""
    today = {"format": "float8_e4m3fn"}
    tensors = scaled_fp8(
        b__comfy_quant=config(today), b__weight=FP8.to(torch.float8_e4m3fn), b__weight_scale=torch.ones(())
    )
    save_file(tensors, tmp_path / "a.safetensors")
    assert verify_file(tmp_path / "a.safetensors").problems == []
    save_file(tensors, tmp_path / "b.safetensors", {HEADER: json.dumps({"layers": {"b": today}})})
    (problem,) = verify_file(tmp_path / "b.safetensors").problems
    assert problem.startswith("a: ")
    sentences(problem)


MISREAD = {
    "no marker": scaled_fp8(scaled_fp8=None),
    "marker of another part": scaled_fp8(scaled_fp8=None, vae__scaled_fp8=torch.zeros(0)),
    "e5m2": scaled_fp8(torch.float8_e5m2),
    "scale per row": scaled_fp8(a__scale_weight=torch.ones(32, 1)),
    "negative scale": scaled_fp8(a__scale_weight=torch.tensor(-1.0)),
    "infinite scale": scaled_fp8(a__scale_weight=torch.tensor(float("inf"))),
    "no weight": scaled_fp8(a__weight=None),
    "unquantized weight": scaled_fp8(a__weight=FP8),
    "lost scale": scaled_fp8(b__weight=(FP8 * 4.48).to(torch.float8_e4m3fn)),
}


def test_older_fp8_files_that_comfyui_misreads(tmp_path, sentences, subtests):
    for name in MISREAD:
        with subtests.test(name):
            save_file(MISREAD[name], tmp_path / "a.safetensors")
            (problem,) = verify_file(tmp_path / "a.safetensors").problems
            sentences(problem)
            assert problem.startswith(("a", "b.weight"))


def test_what_cannot_be_read_is_an_error(tmp_path, sentences):
    with sentences.raises(SourceError):
        verify_file(tmp_path / "none.safetensors")
