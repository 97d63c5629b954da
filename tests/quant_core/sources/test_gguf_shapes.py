"""Dimensions that GGUF files lose, for the tensors of every diffusion model that ComfyUI knows."""

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


@pytest.mark.parametrize("name", architectures())
def test_shapes_come_back(name):
    for tensor, (_, shape) in read(name).items():
        assert restore_shape(tensor, shape) == shape
        if name in DIFFUSION and name not in NEVER_IN_GGUF:
            assert restore_shape(tensor, without_leading_ones(shape)) == shape
            prefixed = f"model.diffusion_model.{tensor}"
            assert restore_shape(prefixed, without_leading_ones(shape)) == shape


def test_pad_tokens_of_z_image_are_read_in_the_shape_of_comfyuis_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "z.gguf", "lumina2")
    values = numpy.arange(3840, dtype=numpy.float32)
    for name in ("x_pad_token", "cap_pad_token", "cap_embedder.0.weight"):
        writer.add_tensor(name, values)
    save_gguf(writer)
    with open_source(tmp_path / "z.gguf") as source:
        assert {name: info.shape for name, info in source.tensors.items()} == {
            "x_pad_token": (1, 3840),
            "cap_pad_token": (1, 3840),
            "cap_embedder.0.weight": (3840,),
        }
        assert (source.read("x_pad_token").numpy() == values).all()
