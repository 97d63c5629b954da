"""Tensor lists as text: collapsed lines stand for exactly their tensors, and the lists are those of ComfyUI's classes."""

import pytest

from learned_rounding.tests.architectures import Tensor, architectures, read
from learned_rounding.tests.architectures.lists import collapse, expand, rebuild, version


def test_a_line_stands_for_the_product_of_its_numbers():
    (*names,) = dict(expand(["linear+ blocks.{0-1,7}.mlp.{0,2}.weight 8x4"]))
    assert names[:4] == [
        "blocks.0.mlp.0.weight",
        "blocks.0.mlp.0.bias",
        "blocks.0.mlp.2.weight",
        "blocks.0.mlp.2.bias",
    ]
    assert len(names) == 12


def test_a_number_without_a_shape_is_a_scalar():
    assert dict(expand(["parameter step"])) == {"step": Tensor("parameter", ())}


def test_collapsed_tensors_expand_to_themselves(subtests):
    for name in architectures()[::8]:
        with subtests.test(name):
            assert dict(expand(collapse(read(name)))) == read(name)


def test_lists_are_what_comfyui_makes(host):
    """Where the ComfyUI is here that the lists are from."""
    if host.version != version("flux"):
        pytest.skip(f"the lists are from ComfyUI {version('flux')}")
    _, made, missing = rebuild(host)
    assert missing == []
    assert set(made) == {name for name in architectures() if version(name) == host.version}
    assert [name for name, tensors in made.items() if tensors != read(name)] == []
