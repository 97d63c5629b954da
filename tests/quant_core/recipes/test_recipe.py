"""A recipe: what it accepts, what it refuses, and that it survives being written down."""

import dataclasses
import json
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from learned_rounding.quant_core import FORMATS, PRESETS, Recipe
from learned_rounding.quant_core.errors import RecipeError, UnknownNameError
from learned_rounding.quant_core.formats import FormatConfig
from learned_rounding.quant_core.layer import Layer
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.rounding import OPTIONS, ROUNDINGS, RoundingConfig

# Each option with a value that is not its default, by the roundings it can go with.
LEARNED = {
    "auto": {"bias_correction": "none"},
    "nearest": {"bias_correction": "synthetic", "calib_samples": 7},
    "stochastic": {},
    "principal": {
        "top_p": 0.125,
        "min_k": 3,
        "max_k": 9,
        "full_matrix": True,
        "weight_cost": 0.5,
        "optimizer": "radam",
    },
    "calibrated": {"damping": 0.25, "num_iter": 9, "lr": 0.5, "lr_schedule": "plateau", "early_stop": 0},
    "sequential": {"damping": 0.25, "sweeps": 2},
    "reconstructed": {"damping": 0.25, "sweeps": 2, "optimizer": "prodigy", "num_iter": 9},
}


@st.composite
def recipes(draw) -> Recipe:
    entry = draw(st.sampled_from(list(FORMATS.values())))
    granularity = draw(st.sampled_from(list(entry.granularities)))
    rounding = draw(st.sampled_from(list(ROUNDINGS)))
    rotated = (entry.name, granularity) == ("int8_tensorwise", "row")
    given = draw(st.lists(st.sampled_from(list(LEARNED[rounding]) or ["bias_correction"]), unique=True))
    options = {name: LEARNED[rounding].get(name, "none") for name in given}
    if "calib_samples" in options:
        options["bias_correction"] = "synthetic"
    return Recipe(
        rounding=rounding,
        **options,
        format=entry.name,
        granularity=granularity,
        block_size=draw(st.sampled_from([None, 8, 256])) if granularity == "block" else None,
        convrot=draw(st.sampled_from([None, False, True, 16, "auto"])) if rotated else None,
        preset=draw(st.sampled_from(["auto", "none", *PRESETS])),
        keep=tuple(map(re.escape, draw(st.lists(st.text(max_size=12), max_size=3)))),
        heur=draw(st.booleans()),
        full_precision_matmul=entry.full_precision_matmul != "never" and draw(st.booleans()),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(recipes())
@example(Recipe(keep=("\x7f\x00\x1f\u2028\"'\\\\\U0001f600",)))
def test_json_and_toml_give_the_recipe_back(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert "\n" not in recipe.to_json()


@pytest.mark.parametrize("rounding", ["sequential", "reconstructed"])
def test_a_rounding_that_runs_the_model_has_a_card(rounding):
    recipe = Recipe(format="nvfp4", rounding=rounding, card="8.9")
    assert recipe.find_capability(torch.device("cpu")) == (8, 9)
    assert Recipe.from_json(recipe.to_json()) == recipe == Recipe.from_toml(recipe.to_toml())
    with pytest.raises(RecipeError):
        Recipe(format="nvfp4", rounding=rounding, target_time=0.5)


@pytest.mark.parametrize("rounding", ["sequential", "reconstructed"])
def test_card_of_a_rounding_that_runs_the_model_is_that_of_the_run_by_default(rounding):
    recipe = Recipe(format="nvfp4", rounding=rounding)
    assert recipe.find_capability(torch.device("cpu")) is None
    assert "card" not in recipe.to_dict()


@pytest.mark.parametrize(
    "options", [{"rounding": "calibrated", "card": "8.9"}, {"rounding": "sequential", "card": "5.0"}]
)
def test_card_without_effect_or_unknown_is_refused(options, sentences):
    with sentences.raises(RecipeError):
        Recipe(format="nvfp4", **options)


def test_written_recipes_name_every_field():
    recipe = Recipe(format="int8_tensorwise", convrot=False, keep=(r"\.0\.", 'a"b'), seed=7)
    assert recipe.to_dict() == {
        "rounding": "auto",
        **dict.fromkeys(name for name in OPTIONS if name not in ("smoothing", "beam_width")),
        "format": "int8_tensorwise",
        "granularity": "row",
        "block_size": None,
        "convrot": None,
        "preset": "auto",
        "keep": [r"\.0\.", 'a"b'],
        "heur": False,
        "full_precision_matmul": False,
        "seed": 7,
        "target_size": None,
        "target_error": None,
        "block_formats": False,
        "layer_config": "",
    }
    configs = [field.name for config in (FormatConfig, RoundingConfig) for field in dataclasses.fields(config)]
    own = {field.name for field in dataclasses.fields(Recipe)}
    assert set(recipe.to_dict()) == {*configs, *own} - {
        "name",
        "bits",
        "linear_dtype",
        "card",
        "target_time",
        "smoothing",
        "beam_width",
    }
    assert Recipe(format="w6a8").to_dict()["bits"] == 6
    assert Recipe(format="nvfp4", smoothing=True).to_dict()["smoothing"] is True
    assert Recipe.from_toml(Recipe(format="w4a4", linear_dtype="int4").to_toml()).format.linear_dtype == "int4"


def test_missing_fields_take_their_defaults():
    assert Recipe.from_toml('format = "int8_tensorwise"') == Recipe(format="int8_tensorwise", convrot=False)
    assert Recipe.from_json("{}") == Recipe() == Recipe(format="float8_e4m3fn", granularity="tensor")


def test_recipes_are_values():
    assert Recipe(keep=["a"]) == Recipe(keep=("a",)) and hash(Recipe()) == hash(Recipe())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().seed = 1


@pytest.mark.parametrize(
    "read, text", [(Recipe.from_json, '{"format": "float8_e4m3fn", "width": 8}'), (Recipe.from_toml, "width = 8")]
)
def test_unknown_fields_are_refused(read, text, sentences):
    with sentences.raises(RecipeError):
        read(text)


@pytest.mark.parametrize(
    "field, value",
    [
        ("format", 8),
        ("format", None),
        ("format", ["float8_e4m3fn"]),
        ("granularity", 1),
        ("granularity", True),
        ("rounding", None),
        ("preset", None),
        ("preset", 3),
        ("keep", "norm"),
        ("keep", [1]),
        ("keep", None),
        ("keep", {"a": 1}),
        ("heur", 1),
        ("heur", "yes"),
        ("heur", None),
        ("full_precision_matmul", 0),
        ("seed", True),
        ("seed", 1.0),
        ("seed", "0"),
        ("seed", None),
    ],
)
def test_bad_types_are_refused_by_name(field, value, sentences):
    with sentences.raises(RecipeError):
        Recipe(**{field: value})


@pytest.mark.parametrize("seed", [2**64, 2**70, -(2**63) - 1])
def test_seeds_that_no_generator_takes_are_refused(seed, sentences):
    with sentences.raises(RecipeError):
        Recipe(seed=seed)


@pytest.mark.parametrize(
    "values, kind, near",
    [
        ({"format": "float8_e4m3"}, "format", "float8_e4m3fn"),
        ({"format": "int8_tensorwise", "granularity": "rows"}, "granularity", "row"),
        ({"rounding": "nearst"}, "rounding", "nearest"),
        ({"preset": "fluks"}, "preset", "flux"),
    ],
)
def test_unknown_names_suggest_the_nearest(values, kind, near, sentences):
    with sentences.raises(UnknownNameError):
        Recipe(**values)


@pytest.mark.parametrize("granularity", [None, "row", "tensor"])
def test_full_precision_matmul_contradicts_int8(granularity, sentences):
    """ComfyUI ignores the key there, and an option that does nothing is refused."""
    with sentences.raises(RecipeError):
        Recipe(format="int8_tensorwise", granularity=granularity, full_precision_matmul=True)
    config = Recipe(full_precision_matmul=True).format.codec.config
    assert config == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


def test_a_granularity_the_format_lacks_is_refused(sentences):
    with sentences.raises(RecipeError):
        Recipe(granularity="row")


@pytest.mark.parametrize("pattern", ["(", "[a", "*x", "a{2,1}"])
def test_keep_patterns_must_be_regular_expressions(pattern, sentences):
    with sentences.raises(RecipeError) as caught:
        Recipe(keep=("norm", pattern))
    assert pattern in str(caught.value)


@pytest.mark.parametrize(
    "read, text",
    [
        (Recipe.from_json, "{"),
        (Recipe.from_json, ""),
        (Recipe.from_json, "[1]"),
        (Recipe.from_json, "null"),
        pytest.param(Recipe.from_json, "[" * 100_000, id="deep"),
        (Recipe.from_toml, "format = "),
        (Recipe.from_toml, "seed = 1\nseed = 2"),
        pytest.param(Recipe.from_toml, "seed = " + "9" * 5000, id="decimal"),
        pytest.param(Recipe.from_toml, "seed = 0x" + "f" * 9000, id="hexadecimal"),
        (Recipe.from_toml, "[format]\na = 1"),
    ],
)
def test_damaged_text_is_refused_in_one_sentence(read, text, sentences):
    with sentences.raises(RecipeError) as caught:
        read(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "recipe, label",
    [
        (Recipe(), "float8_e4m3fn"),
        (Recipe(format="int8_tensorwise", convrot=False), "int8"),
        (Recipe(format="int8_tensorwise", granularity="tensor"), "int8_tensor"),
        (Recipe(format="int8_tensorwise", convrot="auto"), "int8_convrot"),
        (Recipe(format="int8_blockwise"), "int8_blockwise"),
        (Recipe(format="float8_e4m3fn_rowwise", rounding="principal"), "float8_e4m3fn_rowwise"),
    ],
)
def test_labels_tell_outputs_apart(recipe, label):
    assert recipe.format.label == label


@pytest.mark.parametrize(
    "values",
    [
        {"convrot": True},
        {"convrot": "yes", "format": "int8_tensorwise"},
        {"convrot": 32, "format": "int8_tensorwise"},
        {"convrot": 2.0, "format": "int8_tensorwise"},
        {"block_size": 64},
        {"block_size": True, "format": "int8_blockwise"},
        {"rounding": "nearest", "top_p": 0.1},
        {"rounding": 3},
    ],
)
def test_options_without_effect_are_refused(values, sentences):
    with sentences.raises(RecipeError):
        Recipe(**values)


def test_a_layer_gets_everything_that_concerns_it():
    recipe = Recipe(format="int8_tensorwise", convrot=64, rounding="principal", top_p=0.5, keep=("x",), seed=3)
    layer = Layer(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)))
    made = quantize_layer(layer, recipe.format.codecs(128), recipe.rounding, seed=recipe.seed)
    assert made.codec == recipe.format.codec and made.solution.solver == "gptq"


def test_flat_options_are_distributed_to_both_configurations():
    recipe = Recipe(format="int8_tensorwise", convrot=True, rounding="principal", top_p=0.1, preset="flux")
    assert recipe.format == FormatConfig("int8_tensorwise", "row", convrot=True)
    assert recipe.rounding == RoundingConfig("principal", top_p=0.1)
    assert recipe == Recipe(recipe.format, recipe.rounding, preset="flux")
    assert Recipe(recipe.format, recipe.rounding, convrot=64, top_p=0.2, preset="flux") == Recipe(
        format="int8_tensorwise", convrot=64, rounding="principal", top_p=0.2, preset="flux"
    )
    assert dataclasses.replace(recipe, seed=3).format == recipe.format


@pytest.mark.parametrize("field", ["width", "self", "name", "options"])
def test_a_field_that_does_not_exist_is_refused_by_the_constructor(field, sentences):
    with sentences.raises(RecipeError):
        Recipe(**{field: 1})


WRITTEN_BY_0_1_0 = """{"rounding": "nearest", "optimizer": null, "num_iter": null, "lr": null, "lr_schedule": null,
"early_stop": null, "top_p": null, "min_k": null, "max_k": null, "full_matrix": null, "weight_cost": null, "damping": null,
"sweeps": null, "bias_correction": null, "calib_samples": null, "format": "int8_tensorwise", "granularity": "row",
"block_size": null, "convrot": true, "preset": "auto", "keep": ["a"], "heur": false, "full_precision_matmul": false,
"seed": 7, "target_size": null, "target_error": null, "block_formats": false, "layer_config": "{\\"x\\": \\"fp8\\"}"}"""


def test_recipes_in_files_of_0_1_0_are_read():
    recipe = Recipe.from_json(WRITTEN_BY_0_1_0)
    assert recipe == Recipe(
        format="int8_tensorwise", convrot=True, rounding="nearest", keep=("a",), seed=7, layer_config='{"x": "fp8"}'
    )
    assert recipe.to_dict() == json.loads(WRITTEN_BY_0_1_0)


LONG = 10**6 + 1


@pytest.mark.parametrize(
    "read, text",
    [
        (Recipe.from_toml, "a." * 64 + "b = 1"),
        (Recipe.from_toml, "[" + '"a" . ' * 64 + "b]"),
        (Recipe.from_toml, "x = {" + "'a.b'\t." * 64 + "b = 1}"),
        (Recipe.from_toml, "#" * LONG),
        (Recipe.from_json, " " * LONG),
        (Recipe.from_json, "[" * (LONG - 2)),
        (lambda text: Recipe(layer_config=text), "[" * LONG),
        (lambda text: Recipe(preset=text), "flux" * LONG),
        (lambda text: Recipe(format=text), "int8" * LONG),
        (lambda text: Recipe(rounding=text), "nearest" * LONG),
        (lambda text: Recipe(keep=text.split(",")), "," * LONG),
        (lambda text: Recipe(heur=text), "x" * LONG),
        (lambda text: Recipe(**{text: 1}), "x" * LONG),
    ],
    ids=[
        *(
            "dotted key",
            "dotted table",
            "dotted key in a table",
            "long TOML",
            "long JSON",
            "deep JSON",
            "long layer config",
        ),
        *("long preset", "long format", "long rounding", "many patterns", "long value", "long key"),
    ],
)
def test_texts_that_would_take_long_are_refused(sentences, read, text):
    """The time of the TOML reader is quadratic in the parts of a key, that of the search for a similar name in its length."""
    with sentences.raises(RecipeError) as error:
        read(text)
    assert len(str(error.value)) <= 2000


def test_names_of_layers_in_toml_are_no_dotted_keys():
    names = [f"double_blocks.{index}.img_attn.qkv.norm.weight" for index in range(100)]
    assert Recipe.from_toml(f"keep = {names}").keep == tuple(names)
