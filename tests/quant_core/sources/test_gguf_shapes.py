"""Dimensions that GGUF files lose, for the tensors of every diffusion model that ComfyUI knows."""

import re
from collections.abc import Iterable

import gguf
import numpy
import pytest

from learned_rounding.quant_core.sources import open_source
from learned_rounding.quant_core.sources.gguf_shapes import restore_shape
from learned_rounding.tests.architectures import architectures, read
from learned_rounding.tests.architectures.collect import DIFFUSION
from learned_rounding.tests.gguf_files import save_gguf

NEVER_IN_GGUF = {"depth_anything_3", "rt_detr", "sam3", "sam31", "triposplat"}


def without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As ggml counts dimensions, at least one."""
    first = next((place for place, side in enumerate(shape[:-1]) if side != 1), max(len(shape) - 1, 0))
    return shape[first:]


LATER_MODULE = re.compile(r"\.([1-9]|\d\d+)\.")  # of a list


def tensors_of(names: Iterable[str]) -> set[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the tensors of these models, in lists of modules those of the first."""
    tensors = ((tensor, entry.shape) for name in names for tensor, entry in read(name).items())
    return {(tensor, shape) for tensor, shape in tensors if not LATER_MODULE.search(tensor)}


@pytest.fixture(scope="module")
def stored_tensors():
    """Of the models that there are GGUF files of."""
    return tensors_of(name for name in architectures() if name in DIFFUSION and name not in NEVER_IN_GGUF)


def test_shapes_that_are_whole_stay():
    tensors = tensors_of(architectures())
    assert [(tensor, shape) for tensor, shape in tensors if restore_shape(tensor, shape) != shape] == []


def test_leading_dimensions_of_1_come_back(subtests, stored_tensors):
    for prefix in ["", "model.diffusion_model."]:
        with subtests.test(prefix=prefix):
            lost = [(name, shape) for name, shape in stored_tensors if without_leading_ones(shape) != shape]
            assert lost
            assert [
                name for name, shape in lost if restore_shape(prefix + name, without_leading_ones(shape)) != shape
            ] == []


def test_no_other_tensor_gets_dimensions(stored_tensors):
    others = [(name, shape) for name, shape in stored_tensors if without_leading_ones(shape) == shape]
    assert [name for name, shape in others if restore_shape(name, shape) != shape] == []


@pytest.fixture
def pad_tokens(tmp_path):
    """A GGUF of Z-Image with tensors of 3840 values."""
    writer = gguf.GGUFWriter(tmp_path / "z.gguf", "lumina2")
    for name in ("x_pad_token", "cap_pad_token", "cap_embedder.0.weight"):
        writer.add_tensor(name, numpy.arange(3840, dtype=numpy.float32))
    save_gguf(writer)
    with open_source(tmp_path / "z.gguf") as source:
        yield source


def test_pad_tokens_of_z_image_have_the_shape_of_comfyuis_model(pad_tokens):
    assert {name: info.shape for name, info in pad_tokens.tensors.items()} == {
        "x_pad_token": (1, 3840),
        "cap_pad_token": (1, 3840),
        "cap_embedder.0.weight": (3840,),
    }


def test_pad_tokens_of_z_image_have_their_values(pad_tokens):
    assert pad_tokens.read("x_pad_token").tolist() == [list(range(3840))]
