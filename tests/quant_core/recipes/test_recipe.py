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
from learned_rounding.quant_core.recipes import make_plan
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


@settings(derandomize=True, deadline=None, max_examples=40)
@given(recipes())
@example(Recipe(keep=("\x7f\x00\x1f\u2028\"'\\\\\U0001f600",)))
@example(Recipe(layer_config='{"a\\\\.b": {"format": "int8", "convrot": true}}'))
@example(Recipe(format="nvfp4", rounding="sequential", card="8.9"))
@example(Recipe(format="nvfp4", rounding="reconstructed", card="8.9"))
@example(Recipe(format="w4a4", linear_dtype="int4"))
def test_files_and_dictionaries_give_the_recipe_back(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_json_is_one_line():
    assert "\n" not in Recipe(keep=("a\nb",)).to_json()


# Cards


def test_a_rounding_that_runs_the_model_has_a_card(subtests):
    for rounding in ["sequential", "reconstructed"]:
        with subtests.test(rounding=rounding):
            recipe = Recipe(format="nvfp4", rounding=rounding, card="8.9")
            assert recipe.find_capability(torch.device("cpu")) == (8, 9)


def test_a_rounding_that_runs_the_model_has_no_target_time(subtests):
    for rounding in ["sequential", "reconstructed"]:
        with subtests.test(rounding=rounding), pytest.raises(RecipeError):
            Recipe(format="nvfp4", rounding=rounding, target_time=0.5)


def test_card_is_that_of_the_run_by_default():
    assert Recipe(format="nvfp4", rounding="sequential").find_capability(torch.device("cpu")) is None


def test_card_without_effect_or_unknown_is_refused(subtests, sentences):
    for options in [{"rounding": "calibrated", "card": "8.9"}, {"rounding": "sequential", "card": "5.0"}]:
        with subtests.test(options=options), sentences.raises(RecipeError):
            Recipe(format="nvfp4", **options)


# Written recipes

# Fields that are written where they are given.
LATER = {"bits": 6, "linear_dtype": "int4", "card": "8.9", "target_time": 0.5, "smoothing": True, "beam_width": 2}


def test_written_recipes_name_every_field_of_their_time():
    recipe = Recipe(format="int8_tensorwise", convrot=False, keep=(r"\.0\.", 'a"b'), seed=7)
    assert recipe.to_dict() == {
        "rounding": "auto",
        **dict.fromkeys(name for name in OPTIONS if name not in LATER),
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


def test_every_field_is_written_or_written_where_it_is_given():
    configs = [field.name for config in (FormatConfig, RoundingConfig) for field in dataclasses.fields(config)]
    own = {field.name for field in dataclasses.fields(Recipe)}
    assert Recipe().to_dict().keys() | LATER.keys() == {*configs, *own} - {"name"}


def test_later_fields_are_written_where_they_are_given(subtests):
    for field, recipe in [
        ("bits", Recipe(format="w6a8")),
        ("linear_dtype", Recipe(format="w4a4", linear_dtype="int4")),
        ("card", Recipe(format="measured", card="8.9")),
        ("target_time", Recipe(format="measured", target_time=0.5)),
        ("smoothing", Recipe(format="nvfp4", smoothing=True)),
        ("beam_width", Recipe(format="nvfp4", rounding="calibrated", beam_width=2)),
    ]:
        with subtests.test(field=field, recipe=recipe):
            assert recipe.to_dict()[field] == LATER[field]


def test_a_file_without_a_rotation_has_none():
    """A file of version 0.1.0 has no line for a rotation that is off."""
    assert Recipe.from_toml('format = "int8_tensorwise"') == Recipe(format="int8_tensorwise", convrot=False)


def test_recipe_files_keep_their_rotation(subtests):
    for text, convrot in [
        ('format = "int8_tensorwise"\ngranularity = "row"', None),
        ('format = "int8_tensorwise"\nconvrot = 64', 64),
        ('format = "int8"', True),
        ('format = "int8"\nconvrot = false', None),
        ('format = "int8"\nconvrot = "auto"', "auto"),
    ]:
        with subtests.test(text=text, convrot=convrot):
            recipe = Recipe.from_toml(text)
            assert recipe.format.convrot == convrot
            assert Recipe.from_toml(recipe.to_toml()) == recipe
            assert Recipe.from_json(recipe.to_json()) == recipe
            assert Recipe(**recipe.to_dict()) == recipe


def test_missing_fields_take_their_defaults():
    assert Recipe.from_json("{}") == Recipe()


def test_the_default_format_is_fp8_per_tensor():
    assert Recipe().format == FormatConfig("float8_e4m3fn", "tensor")


WRITTEN_BY_0_1_0 = """{"rounding": "nearest", "optimizer": null, "num_iter": null, "lr": null, "lr_schedule": null,
"early_stop": null, "top_p": null, "min_k": null, "max_k": null, "full_matrix": null, "weight_cost": null, "damping": null,
"sweeps": null, "bias_correction": null, "calib_samples": null, "format": "int8_tensorwise", "granularity": "row",
"block_size": null, "convrot": true, "preset": "auto", "keep": ["a"], "heur": false, "full_precision_matmul": false,
"seed": 7, "target_size": null, "target_error": null, "block_formats": false, "layer_config": "{\\"x\\": \\"fp8\\"}"}"""


def test_recipes_in_files_of_0_1_0_are_read():
    assert Recipe.from_json(WRITTEN_BY_0_1_0) == Recipe(
        format="int8_tensorwise", convrot=True, rounding="nearest", keep=("a",), seed=7, layer_config='{"x": "fp8"}'
    )


def test_recipes_of_files_of_0_1_0_are_written_as_they_were():
    assert Recipe.from_json(WRITTEN_BY_0_1_0).to_dict() == json.loads(WRITTEN_BY_0_1_0)


def test_unknown_fields_are_refused(subtests, sentences):
    for read, text in [(Recipe.from_json, '{"format": "float8_e4m3fn", "width": 8}'), (Recipe.from_toml, "width = 8")]:
        with subtests.test(read=read, text=text), sentences.raises(RecipeError):
            read(text)


DAMAGED = {
    "open JSON": (Recipe.from_json, "{"),
    "empty JSON": (Recipe.from_json, ""),
    "a list": (Recipe.from_json, "[1]"),
    "null": (Recipe.from_json, "null"),
    "deep": (Recipe.from_json, "[" * 100_000),
    "open TOML": (Recipe.from_toml, "format = "),
    "a key twice": (Recipe.from_toml, "seed = 1\nseed = 2"),
    "decimal": (Recipe.from_toml, "seed = " + "9" * 5000),
    "hexadecimal": (Recipe.from_toml, "seed = 0x" + "f" * 9000),
    "a table": (Recipe.from_toml, "[format]\na = 1"),
}


def test_damaged_text_is_refused_in_one_sentence(subtests, sentences):
    for kind, (read, text) in DAMAGED.items():
        with subtests.test(kind):
            with sentences.raises(RecipeError) as caught:
                read(text)
            assert "\n" not in str(caught.value)


LENGTH = 10**6 + 1
LONG = {
    "dotted key": (Recipe.from_toml, "a." * 64 + "b = 1"),
    "long TOML": (Recipe.from_toml, "#" * LENGTH),
    "long JSON": (Recipe.from_json, " " * LENGTH),
    "deep JSON": (Recipe.from_json, "[" * (LENGTH - 2)),
    "long layer config": (lambda text: Recipe(layer_config=text), "[" * LENGTH),
    "long preset": (lambda text: Recipe(preset=text), "flux" * LENGTH),
    "long format": (lambda text: Recipe(format=text), "int8" * LENGTH),
    "long rounding": (lambda text: Recipe(rounding=text), "nearest" * LENGTH),
    "many patterns": (lambda text: Recipe(keep=text.split(",")), "," * LENGTH),
    "long value": (lambda text: Recipe(heur=text), "x" * LENGTH),
    "long key": (lambda text: Recipe(**{text: 1}), "x" * LENGTH),
}


def test_texts_that_would_take_long_are_refused(subtests, sentences):
    """The time of the search for a similar name is quadratic in its length."""
    for kind, (read, text) in LONG.items():
        with subtests.test(kind):
            with sentences.raises(RecipeError) as error:
                read(text)
            assert len(str(error.value)) <= 2000


# Values


def test_equal_recipes_have_equal_hashes():
    assert hash(Recipe(keep=["a"])) == hash(Recipe(keep=("a",)))


def test_patterns_may_be_a_list():
    assert Recipe(keep=["a"]) == Recipe(keep=("a",))


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().seed = 1


def test_bad_types_are_refused_by_name(subtests, sentences):
    for field, value in [
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
    ]:
        with subtests.test(field, value=value), sentences.raises(RecipeError):
            Recipe(**{field: value})


def test_seeds_that_no_generator_takes_are_refused(subtests, sentences):
    for seed in [2**64, 2**70, -(2**63) - 1]:
        with subtests.test(seed=seed), sentences.raises(RecipeError):
            Recipe(seed=seed)


def test_unknown_names_suggest_the_nearest(subtests, sentences):
    for values in (
        {"format": "float8_e4m3"},
        {"format": "int8_tensorwise", "granularity": "rows"},
        {"rounding": "nearst"},
        {"preset": "fluks"},
    ):
        with subtests.test(**values), sentences.raises(UnknownNameError):
            Recipe(**values)


def test_full_precision_matmul_contradicts_int8(subtests, sentences):
    """ComfyUI ignores the key there, and an option that does nothing is refused."""
    for granularity in [None, "row", "tensor"]:
        with subtests.test(granularity=granularity), sentences.raises(RecipeError):
            Recipe(format="int8_tensorwise", granularity=granularity, full_precision_matmul=True)


def test_full_precision_matmul_is_in_the_layer_json_of_fp8():
    config = Recipe(full_precision_matmul=True).format.codec.config
    assert config == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


def test_a_granularity_the_format_lacks_is_refused(sentences):
    with sentences.raises(RecipeError):
        Recipe(granularity="row")


def test_keep_patterns_must_be_regular_expressions(subtests, sentences):
    for pattern in ["(", "[a", "*x", "a{2,1}"]:
        with subtests.test(pattern=pattern), sentences.raises(RecipeError):
            Recipe(keep=("norm", pattern))


def test_options_without_effect_are_refused(subtests, sentences):
    for values in (
        {"convrot": True},
        {"convrot": "yes", "format": "int8_tensorwise"},
        {"convrot": 32, "format": "int8_tensorwise"},
        {"convrot": 2.0, "format": "int8_tensorwise"},
        {"block_size": 64},
        {"block_size": True, "format": "int8_blockwise"},
        {"rounding": "nearest", "top_p": 0.1},
        {"rounding": 3},
    ):
        with subtests.test(str(values)), sentences.raises(RecipeError):
            Recipe(**values)


def test_measured_formats_leave_no_room_for_rules(sentences):
    with sentences.raises(RecipeError):
        Recipe(format="measured", layer_config='{"x": "int8"}')


def test_a_field_that_does_not_exist_is_refused_by_the_constructor(subtests, sentences):
    for field in ["width", "self", "name", "options"]:
        with subtests.test(field=field), sentences.raises(RecipeError):
            Recipe(**{field: 1})


# The two configurations


def test_labels_tell_outputs_apart(subtests):
    for recipe, label in [
        (Recipe(), "float8_e4m3fn"),
        (Recipe(format="int8_tensorwise", convrot=False), "int8"),
        (Recipe(format="int8_tensorwise", granularity="tensor"), "int8_tensor"),
        (Recipe(format="int8_tensorwise", convrot="auto"), "int8_convrot"),
        (Recipe(format="int8_blockwise"), "int8_blockwise"),
        (Recipe(format="float8_e4m3fn_rowwise", rounding="principal"), "float8_e4m3fn_rowwise"),
    ]:
        with subtests.test(label):
            assert recipe.format.label == label


def test_a_layer_gets_everything_that_concerns_it():
    recipe = Recipe(format="int8_tensorwise", convrot=64, rounding="principal", top_p=0.5, keep=("x",), seed=3)
    layer = Layer(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)))
    made = quantize_layer(layer, recipe.format.codecs(128), recipe.rounding, seed=recipe.seed)
    assert made.codec == recipe.format.codec
    assert made.solution.solver == "gptq"


@pytest.fixture
def flat():
    return Recipe(format="int8_tensorwise", convrot=True, rounding="principal", top_p=0.1, preset="flux")


def test_flat_options_of_the_format_are_in_its_configuration(flat):
    assert flat.format == FormatConfig("int8_tensorwise", "row", convrot=True)


def test_flat_options_of_the_rounding_are_in_its_configuration(flat):
    assert flat.rounding == RoundingConfig("principal", top_p=0.1)


def test_configurations_may_be_given_themselves(flat):
    assert Recipe(flat.format, flat.rounding, preset="flux") == flat


def test_flat_options_override_those_of_a_given_configuration(flat):
    changed = Recipe(flat.format, flat.rounding, convrot=64, top_p=0.2, preset="flux")
    assert changed.format.convrot == 64
    assert changed.rounding.top_p == 0.2


def test_replace_keeps_the_configurations(flat):
    assert dataclasses.replace(flat, seed=3).format == flat.format


def test_a_recipe_hands_its_fields_on_to_the_plan(layer_names, header_source):
    source = header_source(layer_names("flux"))
    recipe = Recipe(preset="none", keep=("linear2",), heur=True)
    plan = recipe.plan(source)
    assert plan == make_plan(source, preset="none", rules=recipe.rules, heur=True)
    assert plan.decisions != Recipe(preset="none").plan(source).decisions
