"""Plan files: what they mean, and that every mistake is one sentence before any work."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import learned_rounding
from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.batch.plan_file import PLAN_KEYS, RECIPE_KEYS, read_plan
from learned_rounding.quant_core.batch.report import BatchReport
from learned_rounding.quant_core.batch.source_list import SOURCE_KEYS
from learned_rounding.quant_core.errors import (
    CalibrationError,
    OutputError,
    QuantizationError,
    RecipeError,
    SourceError,
)
from learned_rounding.quant_core.recipes.option_table import OPTION_TABLE
from learned_rounding.quant_core.recipes.overriding import override_recipe

TWO = """
sources = ["a.safetensors", "b.safetensors"]
[recipes.int8]
format = "int8"
[recipes.fp8]
format = "e4m3"
rounding = "nearest"
"""


@pytest.fixture
def calibration(tmp_path):
    """calibration(name) writes a calibration file."""

    def make(name: str) -> None:
        save_file({"a.gram": torch.eye(4)}, tmp_path / name)

    return make


def outputs(plan) -> list[str]:
    """Paths of all outputs, relative to the plan."""
    folder = plan.path.parent
    return [output.path.relative_to(folder).as_posix() for group in plan.groups for output in group.outputs]


def sources(plan) -> list[str]:
    return [group.source.name for group in plan.groups]


def test_a_source_is_a_group_of_all_recipes(planned, touch):
    touch("a.safetensors", "b.safetensors")
    plan = planned(TWO)
    assert [[output.name for output in group.outputs] for group in plan.groups] == [["int8", "fp8"]] * 2


def test_recipes_are_those_of_the_same_options_of_lrq(planned, touch):
    touch("a.safetensors", "b.safetensors")
    made = {output.name: output.recipe for output in planned(TWO).groups[0].outputs}
    assert made == {
        "int8": override_recipe(Recipe(), {"format": "int8"}),
        "fp8": override_recipe(Recipe(), {"format": "fp8", "rounding": "nearest"}),
    }


def test_the_output_of_a_source_holds_before_that_of_its_recipe(planned, touch):
    touch("a.safetensors", "b.safetensors")
    text = """
        output = "plan/"
        sources = [{path = "a.safetensors", output = "source/"}, "b.safetensors"]
        [recipes.int8]
        output = "recipe/"
        """
    assert outputs(planned(text)) == ["source/a_int8.safetensors", "recipe/b_int8.safetensors"]


def test_a_recipe_may_be_for_some_sources(planned, touch):
    touch("a.safetensors", "b.safetensors")
    text = 'sources = ["*.safetensors"]\n[recipes.all]\n[recipes.some]\nsources = ["b*"]\n'
    assert outputs(planned(text)) == ["a_all.safetensors", "b_all.safetensors", "b_some.safetensors"]


def test_options_are_on_top_of_a_recipe_file(planned, touch, tmp_path):
    touch("a.safetensors")
    (tmp_path / "base.toml").write_text(Recipe(format="int8_tensorwise", seed=5).to_toml())
    plan = planned('sources = ["a.safetensors"]\n[recipes.r]\nrecipe = "base.toml"\nseed = 6\n')
    assert plan.groups[0].outputs[0].recipe.to_dict() == Recipe(format="int8_tensorwise", seed=6).to_dict() | {
        "convrot": plan.groups[0].outputs[0].recipe.format.convrot
    }


MIXED = """
calibration = "plan.calib.safetensors"
sources = ["a.safetensors", {path = "b.safetensors", calibration = "b.calib.safetensors"}]
[recipes.plain]
calibration = ""
[recipes.first]
[recipes.own]
calibration = "own.calib.safetensors"
"""


@pytest.fixture
def mixed(planned, touch, calibration):
    touch("a.safetensors", "b.safetensors")
    for name in ("plan", "own", "b"):
        calibration(f"{name}.calib.safetensors")
    return planned(MIXED)


def test_a_group_is_one_source_and_one_calibration(mixed):
    found = [(group.source.stem, group.calibration and group.calibration.name) for group in mixed.groups]
    assert found == [
        ("a", "plan.calib.safetensors"),
        ("a", "own.calib.safetensors"),
        ("b", "b.calib.safetensors"),
    ]


def test_outputs_without_a_calibration_join_the_first_group_of_their_source(mixed):
    assert [(output.name, output.calibrated) for output in mixed.groups[0].outputs] == [
        ("plain", False),
        ("first", True),
    ]


def test_the_options_of_the_plan_hold_for_all_groups(planned, touch):
    touch("a.safetensors")
    text = 'requantize = true\ngeneral = true\noverwrite = true\ndevice = "cpu"\nsources = ["a.safetensors"]\n[recipes.r]\n'
    plan = planned(text)
    (group,) = plan.groups
    assert (plan.device, group.requantize, group.general, group.outputs[0].overwrite) == ("cpu", True, True, True)


def test_overwrite_of_the_command_line_holds_for_all_outputs(plan_file, touch):
    touch("a.safetensors")
    plan = read_plan(plan_file('sources = ["a.safetensors"]\n[recipes.r]\n'), overwrite=True)
    assert plan.groups[0].outputs[0].overwrite


REPORTS = {"": "plan", 'report = "r"': "r", 'report = "sub/r.json"': "sub/r", 'report = "flux.1"': "flux.1"}


def test_the_report_is_named_after_the_plan_or_as_given(planned, touch, tmp_path, subtests):
    touch("a.safetensors")
    for line, expected in REPORTS.items():
        with subtests.test(line):
            plan = planned(f'{line}\nsources = ["a.safetensors"]\n[recipes.r]\n')
            assert plan.report_files == tuple(tmp_path / f"{expected}.{suffix}" for suffix in ("json", "md"))


A, R = 'sources = ["a.safetensors"]\n', "[recipes.r]\n"
# Text of a plan → class of the error. There are models a, b and B, a calibration, an image and a folder.
WRONG: dict[str, type[QuantizationError]] = {
    "sources = ": RecipeError,
    "a" * 20 + ".x" * 70 + " = 1": RecipeError,
    "": RecipeError,
    A: RecipeError,
    R: SourceError,
    f"sources = []\n{R}": SourceError,
    f"{A}recipes = {{}}\n": RecipeError,
    f"{A}outptu = 'x'\n{R}": RecipeError,
    f"{A}nothing_near = 'x'\n{R}": RecipeError,
    f"{A}overwrite = 1\n{R}": RecipeError,
    f"{A}output = 5\n{R}": RecipeError,
    f"sources = 'a.safetensors'\n{R}": RecipeError,
    f"{A}recipes = 'int8'\n": RecipeError,
    f"{A}recipes = {{int8 = 'int8'}}\n": RecipeError,
    f"{A}[recipes.r]\nformt = 'int8'\n": RecipeError,
    f"{A}[recipes.r]\nformat = 'int9'\n": RecipeError,
    f"{A}[recipes.r]\nformat = 8\n": RecipeError,
    f"{A}[recipes.r]\ngranularity = 8\n": RecipeError,
    f"{A}[recipes.r]\nblock_size = 'x'\n": RecipeError,
    f"{A}[recipes.r]\nkeep = 'x'\n": RecipeError,
    f"{A}[recipes.r]\nrecipe = 'none.toml'\n": RecipeError,
    f"{A}[recipes.r]\nrecipe = 'folder'\n": RecipeError,
    f"{A}[recipes.r]\nformat = 'measured'\n": RecipeError,
    f"{A}[recipes.r]\nrounding = 'sequential'\n": RecipeError,
    f"{A}[recipes.'a/b']\n": RecipeError,
    f"{A}[recipes.r]\nsources = ['b.safetensors']\n": RecipeError,
    f"{A}[recipes.r]\nsources = [1]\n": SourceError,
    f"{A}[recipes.r]\nsources = ['x*']\n": SourceError,
    f"sources = ['none.safetensors']\n{R}": SourceError,
    f"sources = ['x*']\n{R}": SourceError,
    f"sources = [1]\n{R}": SourceError,
    f"sources = [{{name = 'x'}}]\n{R}": SourceError,
    f"sources = [{{path = 'a.safetensors', nam = 'x'}}]\n{R}": RecipeError,
    f"sources = [{{path = 'a.safetensors', name = 'x/y'}}]\n{R}": RecipeError,
    f"sources = [{{path = '[ab].safetensors', name = 'x'}}]\n{R}": SourceError,
    f"sources = [\"a\\u0000*\"]\n{R}": SourceError,
    f"{A}calibration = 'none.safetensors'\n{R}": CalibrationError,
    f"{A}calibration = 'a.safetensors'\n{R}": CalibrationError,
    f"{A}calibration = 'folder'\n{R}": CalibrationError,
    f"{A}output = '{{model}}.safetensors'\n{R}": OutputError,
    f"{A}output = '{{source!r}}.safetensors'\n{R}": OutputError,
    f"{A}output = '{{source.safetensors'\n{R}": OutputError,
    f"{A}output = 'folder'\n{R}": OutputError,
    f"{A}output = 'a.safetensors'\n{R}": OutputError,
    f"{A}output = '{{source}}.safetensors'\n{R}": OutputError,
    f"{A}output = 'plan.toml'\n{R}": OutputError,
    f"{A}output = 'plan.json'\n{R}": OutputError,
    f"{A}calibration = 'c.calib.safetensors'\noutput = 'c.calib.safetensors'\n{R}": OutputError,
    f"{A}output = 'x.safetensors'\n[recipes.r]\n[recipes.s]\n": OutputError,
    f"{A}output = '{{recipe}}.safetensors'\n[recipes.r]\n[recipes.R]\n": OutputError,
    f"{A}report = 'folder/r'\noutput = 'folder/r.md'\n{R}": OutputError,
    f"{A}report = 'notes'\n{R}": OutputError,
    f"{A}report = 'settings'\n{R}": OutputError,
    f"sources = ['a.safetensors', 'a.safetensors']\n{R}": OutputError,
    f"{A}overwrite = 1\noutput = 5\n[recipes.r]\nformt = 'int8'\n": RecipeError,
}  # fmt: skip


@pytest.fixture
def folder(touch, model_file, calibration, tmp_path):
    """The files that WRONG names."""
    model_file("a.safetensors")
    touch("b.safetensors", "folder/x")
    calibration("c.calib.safetensors")
    (tmp_path / "notes.md").write_text("# Notes\n")
    (tmp_path / "settings.json").write_text('{"command": "quantize"}')
    return tmp_path


def test_another_file_is_replaced_by_a_report_where_that_is_asked_for(planned, folder):
    assert planned(f"{A}report = 'notes'\noverwrite = true\n{R}").report == folder / "notes"


def test_an_earlier_report_is_replaced(planned, folder):
    plan = planned(f"{A}{R}")
    BatchReport(plan, ["cpu"]).save()
    assert planned(f"{A}{R}").report_files == plan.report_files


def test_mistakes_are_one_sentence(planned, folder, subtests, sentences):
    for text, kind in WRONG.items():
        with subtests.test(text):
            with pytest.raises(QuantizationError) as caught:
                planned(text)
            assert isinstance(caught.value, kind)
            sentences(caught.value)


def test_a_plan_that_cannot_be_read_is_one_sentence(tmp_path, subtests, sentences):
    (tmp_path / "folder").mkdir()
    for name in ("none.toml", "folder"):
        with subtests.test(name):
            with pytest.raises(RecipeError) as caught:
                read_plan(tmp_path / name)
            sentences(caught.value)


def test_the_example_of_the_manual_is_a_plan(plan_file, touch, calibration, tmp_path):
    document = Path(learned_rounding.__file__).parent / "docs" / "batch.md"
    (example,) = re.findall(r"```toml\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    touch("fine-tunes/a.safetensors", "flux1-dev.safetensors")
    calibration("flux.calib.safetensors")
    (tmp_path / "my_recipe.toml").write_text(Recipe(format="w4a8").to_toml())
    assert outputs(read_plan(plan_file(example))) == [
        "quantized/a_int8.safetensors",
        "quantized/a_w4a8.safetensors",
        "quantized/flux1-dev_int8.safetensors",
        "quantized/flux1-dev_w4a8.safetensors",
        "quantized/flux1-dev_fp8.safetensors",
    ]


def test_the_manual_names_every_key():
    text = (Path(learned_rounding.__file__).parent / "docs" / "batch.md").read_text(encoding="utf-8")
    assert [key for key in {*PLAN_KEYS, *RECIPE_KEYS, *SOURCE_KEYS} - {"recipes"} if f"`{key}`" not in text] == []


ODD = (
    '"/"',
    '".."',
    "0",
    "-1",
    "true",
    '""',
    '"x"',
    '"*"',
    '"\\u0000"',
    "[]",
    "[1]",
    '["x"]',
    "{}",
    "{x = 1}",
    "[[]]",
    "nan",
    "2026-01-01",
)
OPTIONS = [name for options in OPTION_TABLE.values() for name in options]
PLACES = {
    "plan": (PLAN_KEYS, "{0}\n" + A + R),
    "source": (SOURCE_KEYS, 'sources = [{{path = "a.safetensors", {0}}}]\n' + R),
    "recipe": ([*RECIPE_KEYS, *OPTIONS], A + R + "{0}\n"),
}


def test_a_value_of_any_type_is_a_plan_or_one_sentence(planned, folder, subtests):
    for place, (keys, text) in PLACES.items():
        for key in keys:
            with subtests.test(place, key=key):
                for value in ODD:
                    with contextlib.suppress(QuantizationError):
                        planned(text.format(f"{key} = {value}"))


def test_the_error_names_the_plan_file_and_the_key(planned, folder):
    with pytest.raises(RecipeError) as caught:
        planned(f"{A}overwrite = 1\n{R}")
    assert (caught.value.file, caught.value.option) == (str(folder / "plan.toml"), "overwrite")


def test_a_mistake_writes_nothing(planned, folder, listing):
    before = listing()
    with pytest.raises(QuantizationError):
        planned(f"{A}output = 'new/a.safetensors'\n[recipes.r]\n[recipes.s]\n")
    assert [name for name in listing() if name != "plan.toml"] == before
