"""Names of outputs by their templates; which of them are refused is in test_plan_file.py."""

import os

import pytest

from learned_rounding.quant_core.errors import OutputError


def outputs(plan) -> list[str]:
    """Paths of all outputs, relative to the plan."""
    folder = plan.path.parent
    return [output.path.relative_to(folder).as_posix() for group in plan.groups for output in group.outputs]


def test_outputs_are_beside_their_sources_by_default(planned, touch):
    touch("x/a.safetensors")
    assert outputs(planned('sources = ["x/a.safetensors"]\n[recipes.int8]\n')) == ["x/a_int8.safetensors"]


OUTPUTS = {
    "out/": "out/a_int8.safetensors",
    "out/{recipe}/{source}.safetensors": "out/int8/a.safetensors",
    "{source}-{format}.sft": "a-int8_convrot.sft",
    "{{{source}}}.safetensors": "{a}.safetensors",
}


def test_outputs_are_named_by_a_template(planned, touch, subtests):
    touch("x/a.safetensors")
    for template, expected in OUTPUTS.items():
        with subtests.test(template):
            text = f'output = "{template}"\nsources = ["x/a.safetensors"]\n[recipes.int8]\nformat = "int8"\n'
            assert outputs(planned(text)) == [expected]


def test_an_output_that_is_a_link_to_its_source_is_refused(planned, touch, tmp_path, links):
    touch("a.safetensors")
    links(tmp_path / "a.safetensors", tmp_path / "a_r.safetensors")
    with pytest.raises(OutputError):
        planned('sources = ["a.safetensors"]\n[recipes.r]\n')


@pytest.fixture(params=[pytest.param("symbolic", marks=pytest.mark.posix(reason="a link needs no privilege")), "hard"])
def links(request):
    """links(file, name) gives a file a second name."""
    return os.symlink if request.param == "symbolic" else os.link
