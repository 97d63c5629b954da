"""Sources of a plan: paths and patterns. Outputs and calibrations that patterns leave out are in test_plan_file.py too."""

import pytest
import torch
from safetensors.torch import save_file


def outputs(plan) -> list[str]:
    """Paths of all outputs, relative to the plan."""
    folder = plan.path.parent
    return [output.path.relative_to(folder).as_posix() for group in plan.groups for output in group.outputs]


def sources(plan) -> list[str]:
    return [group.source.name for group in plan.groups]


def test_patterns_are_sorted(planned, touch):
    touch("c.safetensors", "a.gguf", "b.safetensors", "notes.txt")
    assert sources(planned('sources = ["*"]\n[recipes.r]\n')) == ["a.gguf", "b.safetensors", "c.safetensors"]


def test_a_pattern_finds_no_calibration(planned, touch, tmp_path):
    touch("a.safetensors")
    for name in ("c.safetensors", "other.calib.safetensors"):
        save_file({"a.gram": torch.eye(4)}, tmp_path / name)
    text = 'calibration = "c.safetensors"\nsources = ["*.safetensors"]\n[recipes.r]\n'
    assert sources(planned(text)) == ["a.safetensors"]


def test_a_pattern_finds_no_output_of_the_plan(planned, touch):
    touch("a.safetensors", "a_r.safetensors", "z.safetensors", "z_r.safetensors")
    assert sources(planned('sources = ["*.safetensors"]\n[recipes.r]\n')) == ["a.safetensors", "z.safetensors"]


def test_outputs_that_sort_before_their_sources_are_no_sources(planned, touch):
    touch("z.safetensors", "a-z.safetensors")
    text = 'output = "a-{source}.safetensors"\nsources = ["*.safetensors"]\n[recipes.r]\n'
    assert sources(planned(text)) == ["z.safetensors"]


def test_a_pattern_finds_a_model_of_several_files_once(planned, touch):
    touch("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")
    assert outputs(planned('sources = ["*.safetensors"]\n[recipes.r]\n')) == ["m_r.safetensors"]


def test_a_source_that_is_named_is_not_found_again(planned, touch):
    touch("a.safetensors", "b.safetensors")
    text = 'sources = ["*.safetensors", {path = "a.safetensors", name = "first"}]\n[recipes.r]\n'
    assert outputs(planned(text)) == ["b_r.safetensors", "first_r.safetensors"]


def test_a_name_with_brackets_is_a_path_where_the_file_exists(planned, touch):
    touch("a[1].safetensors")
    assert sources(planned('sources = ["a[1].safetensors"]\n[recipes.r]\n')) == ["a[1].safetensors"]


def test_the_size_of_a_group_is_that_of_all_files_of_its_source(planned, tmp_path):
    for index in (1, 2):
        (tmp_path / f"m-0000{index}-of-00002.safetensors").write_bytes(bytes(10 * index))
    assert planned('sources = ["m-00001-of-00002.safetensors"]\n[recipes.r]\n').groups[0].size == 30


@pytest.mark.parametrize("path", ["folder", "folder/"])
def test_a_folder_is_a_source_of_its_name(planned, touch, path):
    touch("folder/m-00001-of-00002.safetensors", "folder/m-00002-of-00002.safetensors")
    assert outputs(planned(f'sources = ["{path}"]\n[recipes.r]\n')) == ["folder_r.safetensors"]


def test_patterns_search_folders(planned, touch):
    touch("x/a.safetensors", "x/y/b.safetensors")
    assert sources(planned('sources = ["**/*.safetensors"]\n[recipes.r]\n')) == ["a.safetensors", "b.safetensors"]
