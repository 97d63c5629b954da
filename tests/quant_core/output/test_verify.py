"""Each way to break the contract has its own sentence, and a good file has none."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_tensors
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.output import verify_file

LAYER = "blocks.0.attn.qkv"
HEADER = "_quantization_metadata"
RECIPES = {
    "fp8": Recipe(rounding="nearest"),
    "fp8 full precision": Recipe(rounding="nearest", full_precision_matmul=True),
    "e5m2": Recipe(format="float8_e5m2", rounding="nearest"),
    "int8 row": Recipe(format="int8_tensorwise", rounding="nearest"),
    "int8 tensor": Recipe(format="int8_tensorwise", granularity="tensor", rounding="nearest"),
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


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_good_file_has_no_problems(verify, recipe, prefix):
    result = verify(recipe, prefix=prefix)
    assert result.problems == [] and result.layers == 6


def test_plain_weights_have_no_problems(model_file):
    result = verify_file(model_file())
    assert result.problems == [] and result.layers == 0


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
        "lacks full_precision_matrix_mult, and no NVIDIA card multiplies float8_e5m2 codes; lrq migrate adds it",
    ),
    "no scale": ("int8 row", drop("weight_scale"), "weight_scale missing"),
    "scale of another shape": (
        "int8 row",
        put("weight_scale", torch.ones(96)),
        r"needs .*\(96, 1\).* has .*weight_scale torch.float32 \(96,\)",
    ),
    "scale of a part of the rows": ("int8 row", put("weight_scale", torch.ones(95, 1)), r"has .*\(95, 1\)"),
    "row scale on fp8": (
        "fp8",
        put("weight_scale", torch.ones(96, 1)),
        r"float8_e4m3fn needs .*weight_scale torch.float32 \(\)",
    ),
    "one-element scale on fp8": ("fp8", put("weight_scale", torch.ones(1)), r"has .*weight_scale torch.float32 \(1,\)"),
    "scale in half precision": (
        "fp8",
        put("weight_scale", torch.tensor(1.0, dtype=torch.float16)),
        "has .*weight_scale torch.float16",
    ),
    "NaN scale": (
        "fp8",
        put("weight_scale", torch.tensor(float("nan"))),
        "weight_scale holds values that are not finite and positive",
    ),
    "infinite scale": (
        "fp8",
        put("weight_scale", torch.tensor(float("inf"))),
        "weight_scale holds values that are not finite and positive",
    ),
    "zero scale": (
        "fp8",
        put("weight_scale", torch.tensor(0.0)),
        "weight_scale holds values that are not finite and positive",
    ),
    "one negative row": (
        "int8 row",
        put("weight_scale", torch.cat([torch.ones(95, 1), -torch.ones(1, 1)])),
        "weight_scale holds values",
    ),
    "zero input scale": (
        "fp8",
        put("input_scale", torch.tensor(0.0)),
        "input_scale holds values that are not finite and positive",
    ),
    "complex input scale": (
        "fp8",
        put("input_scale", torch.tensor(1j)),
        "input_scale is torch.complex64 .*should be one number",
    ),
    "input scale in whole numbers": (
        "fp8",
        put("input_scale", torch.tensor(1, dtype=torch.uint16)),
        "input_scale is torch.uint16",
    ),
    "several input scales": (
        "fp8",
        put("input_scale", torch.ones(3)),
        r"input_scale is torch.float32 \(3,\), and should be one number",
    ),
    "zero input scale in FP8": (
        "fp8",
        put("input_scale", torch.zeros(()).to(torch.float8_e4m3fn)),
        "input_scale holds values",
    ),
    "codes of another dtype": ("fp8", put("weight", torch.zeros(96, 32, dtype=torch.int8)), "has weight torch.int8"),
    "weights instead of codes": ("int8 row", put("weight", torch.zeros(96, 32)), "has weight torch.float32"),
    "no weight": ("int8 row", drop("weight"), "has a quantization entry but no weight"),
    "weight of four axes": (
        "fp8",
        put("weight", torch.zeros(4, 4, 2, 2).to(torch.float8_e4m3fn)),
        "only matrices are read as quantized",
    ),
    "unknown format": (
        "fp8",
        set_both("format", "float8_e3m4"),
        "its format 'float8_e3m4' is not one this version knows",
    ),
    "another format": (
        "fp8",
        set_both("format", "float8_e4m3fn_rowwise"),
        r"float8_e4m3fn_rowwise needs weight torch.float8_e4m3fn \(96, 32\), weight_scale torch.float32 \(96, 1\); the file",
    ),
    "no format": ("fp8", set_both("format", None), "its format 'None' is not one"),
    "rotation under params": (
        "int8 row",
        set_both("params", {"convrot": True, "convrot_groupsize": 256}),
        "ConvRot groups of 256 do not divide its 32 input channels",
    ),
    "per_row missing": (
        "int8 row",
        set_both("per_row", None),
        "its JSON says per_row=None and its scale's shape says True",
    ),
    "per_row without rows": (
        "int8 tensor",
        set_both("per_row", True),
        "its JSON says per_row=True and its scale's shape says None",
    ),
    "header disagrees": (
        "fp8",
        change_header(lambda layers: layers.update({LAYER: {"format": "int8_tensorwise"}})),
        "the header says .*int8_tensorwise.* and the comfy_quant tensor says .*float8",
    ),
    "header lacks a layer": (
        "fp8",
        change_header(lambda layers: layers.pop(LAYER)),
        "the header says None and the comfy_quant tensor says",
    ),
    "header has a layer more": (
        "fp8",
        change_header(lambda layers: layers.update(ghost={"format": "float8_e4m3fn"})),
        "ghost: the header says .* says None",
    ),
    "only the header knows a layer": (
        "fp8",
        drop("comfy_quant"),
        "the header says .*float8_e4m3fn.* and the comfy_quant tensor says None",
    ),
    "codes unknown to both": (
        "fp8",
        both(drop("comfy_quant", "weight_scale"), change_header(lambda layers: layers.pop(LAYER))),
        "holds codes .* but no comfy_quant tensor",
    ),
    "orphan scale": (
        "fp8",
        lambda tensors, metadata: tensors.update({"patch.weight_scale": torch.tensor(1.0)}),
        "patch: has a weight_scale but no comfy_quant",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_contract_has_its_sentence(verify, name):
    recipe, change, sentence = BREAKS[name]
    result = verify(RECIPES[recipe], change)
    assert len(result.problems) == 1
    assert re.search(sentence, result.problems[0]), result.problems
    layer = "ghost" if "ghost" in sentence else "patch" if "patch" in sentence else LAYER
    assert (
        result.problems[0].startswith(f"{layer}: ")
        and result.problems[0].endswith(".")
        and "\n" not in result.problems[0]
    )


def test_a_missing_header_is_said_once(verify):
    result = verify(RECIPES["int8 row"], lambda tensors, metadata: metadata.pop(HEADER))
    assert len(result.problems) == 1 and f"The header has no {HEADER}" in result.problems[0]


def test_a_prefixed_checkpoint_needs_both_names(verify):
    for gone in (LAYER, f"model.diffusion_model.{LAYER}"):
        result = verify(
            RECIPES["fp8"], change_header(lambda layers, gone=gone: layers.pop(gone)), prefix="model.diffusion_model."
        )
        assert [problem.split(":")[0] for problem in result.problems] == [gone]


def test_all_broken_layers_are_found(verify):
    def change(tensors, metadata):
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name] = torch.full_like(tensors[name], -1.0)

    assert len(verify(RECIPES["int8 row"], change).problems) == 6


def test_codes_under_the_name_of_plain_weights(tmp_path):
    save_file(
        {"a.weight": torch.zeros(4, 4, dtype=torch.int8), "b.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)},
        tmp_path / "a.safetensors",
    )
    problems = verify_file(tmp_path / "a.safetensors").problems
    assert sorted(problem.split(":")[0] for problem in problems) == ["a", "b"]
    assert all("ComfyUI would use them as weights" in problem for problem in problems)


def test_what_cannot_be_read_is_an_error(tmp_path, sentences):
    with sentences.raises(SourceError):
        verify_file(tmp_path / "none.safetensors")
