"""Each way to break the contract has its own sentence, and a good file has none."""

import json

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
    "per_row missing": (
        "int8 row",
        set_both("per_row", None),
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
    "orphan scale": (
        "fp8",
        lambda tensors, metadata: tensors.update({"patch.weight_scale": torch.tensor(1.0)}),
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_contract_has_its_sentence(verify, name, sentences):
    recipe, change = BREAKS[name]
    (problem,) = verify(RECIPES[recipe], change).problems
    sentences(problem)
    assert problem.startswith(("blocks.", "ghost: ", "patch: ")) and "\n" not in problem


def test_a_missing_header_is_said_once(verify, sentences):
    (problem,) = verify(RECIPES["int8 row"], lambda tensors, metadata: metadata.pop(HEADER)).problems
    sentences(problem)


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


def test_codes_under_the_name_of_plain_weights(tmp_path, sentences):
    save_file(
        {"a.weight": torch.zeros(4, 4, dtype=torch.int8), "b.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)},
        tmp_path / "a.safetensors",
    )
    problems = verify_file(tmp_path / "a.safetensors").problems
    assert sorted(problem.split(":")[0] for problem in problems) == ["a", "b"]
    sentences(problems)


def test_what_cannot_be_read_is_an_error(tmp_path, sentences):
    with sentences.raises(SourceError):
        verify_file(tmp_path / "none.safetensors")
