"""A plan as text: groups of tensors, sizes, and what is not known before the run."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_tensors
from learned_rounding.quant_core.cli.plan_text import plan_lines, tensor_sizes
from learned_rounding.quant_core.recipes.plan import Decision
from learned_rounding.quant_core.sources import TensorSource


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


def test_a_dry_run_writes_nothing(lrq, model_file, listing, sentences):
    source = model_file()
    code, out, err = lrq("quantize", "-i", source, "--dry-run")
    assert code == 0
    assert err == []
    assert listing() == ["model.safetensors"]
    sentences(out)
    assert lrq("quantize", "-i", source, "--dry_run")[1] == out
    assert lrq("plan", "-i", source)[1] == out


def test_plan_groups_tensors_by_pattern_and_verbose_lists_them(lrq, model_file, sentences):
    source = model_file()
    sentences(lrq("plan", source, "--int8", "--simple")[1], lrq("plan", source, "--int8", "--simple", "--verbose")[1])


def test_one_long_name_does_not_widen_all_lines_of_a_plan(lrq, model_file):
    name = f"blocks.0.{'x' * 900}.weight"
    source = model_file("long.safetensors", {name: torch.zeros(32, 32), "blocks.1.a.weight": torch.zeros(32, 32)})
    lines = lrq("plan", source, "--int8", "--simple")[1].splitlines()
    assert any("blocks.1.a.weight" in line and len(line) < 150 for line in lines)


def test_plan_groups_layers_whose_format_is_chosen_later(lrq, model_file, sentences):
    sentences(lrq("plan", model_file(), "--format", "measured")[1])


@pytest.fixture
def planned(model):
    """planned(recipe fields) → source, recipe and plan of the made-up model."""

    def make(**fields):
        source, recipe = TensorSource(model()), Recipe(rounding="nearest", **fields)
        return source, recipe, recipe.plan(source)

    return make


def test_sizes_of_tensors_are_those_in_the_file(planned, model):
    source, recipe, plan = planned(format="int8_tensorwise", convrot=False)
    made = quantize_tensors(model(), recipe).tensors
    sizes = tensor_sizes(source, recipe, plan)
    assert sizes.keys() == source.tensors.keys()
    assert sum(sizes.values()) == sum(tensor.nbytes for tensor in made.values())


def test_removed_tensors_have_no_size(planned):
    source, recipe, plan = planned()
    name = "blocks.0.norm.weight"
    removed = replace(plan, decisions={**plan.decisions, name: Decision("remove", "not used")})
    assert tensor_sizes(source, recipe, removed)[name] == 0


def test_sizes_are_not_known_where_the_format_is_chosen_during_the_run(planned):
    source, recipe, plan = planned(format="measured")
    sizes = tensor_sizes(source, recipe, plan)
    assert {name for name, size in sizes.items() if size is None} == set(plan.names("quantize"))


def test_names_that_differ_in_numbers_only_are_one_line(planned):
    grouped, listed = (plan_lines(*planned(), verbose=verbose) for verbose in (False, True))
    assert sum("mlp.0.weight" in line for line in listed) == 2
    assert sum(".mlp." in line for line in grouped) < sum(".mlp." in line for line in listed)
    assert any("×2" in line for line in grouped)
    assert grouped[-1] == listed[-1]
