"""Weights of a MODEL are read from the file that ComfyUI loaded where they are its bytes, else from memory."""

import mmap
import os
from ctypes import addressof, c_uint8

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources.staging import Staging
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    import comfy.utils

    from learned_rounding.nodes.host import file_slices

pytestmark = pytest.mark.usefixtures("in_comfyui")

CHUNK = 1000  # bytes of one read


class MappedFile:
    """ModelMMAP of comfy_aimdo, whose library requires a GPU."""

    def __init__(self, path: str):
        self._file = open(path, "rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._bytes = (c_uint8 * len(self._map)).from_buffer(self._map)

    def get(self) -> int:
        return addressof(self._bytes)

    def get_file_handle(self) -> int:
        return self._file.fileno()


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"weight": torch.randn(96, 64, generator=generator).bfloat16(), "bias": torch.ones(96).bfloat16()}


def load_layer(path) -> torch.nn.Linear:
    """A layer that ComfyUI's loader makes of a file with dynamic VRAM: its weights are the mapped file."""
    import comfy_aimdo.model_mmap

    save_file(weights(), path)
    comfy_aimdo.model_mmap.ModelMMAP = MappedFile
    layer = torch.nn.Linear(64, 96, dtype=torch.bfloat16, device="meta")
    layer.load_state_dict(comfy.utils.load_safetensors(str(path))[0], assign=True)
    return layer


def read(reader, weight: torch.Tensor) -> torch.Tensor:
    """All bytes of a weight, in parts."""
    buffer = bytearray(weight.nbytes)
    for offset in range(0, len(buffer), CHUNK):
        reader(memoryview(buffer)[offset : offset + CHUNK], offset)
    return torch.frombuffer(buffer, dtype=weight.dtype).view(weight.shape)


def keeps_places() -> bool:
    """Whether ComfyUI keeps the place of a weight in its file."""
    return hasattr(comfy.utils, "load_safetensors")


@pytest.fixture
def layer(tmp_path):
    if not keeps_places():
        pytest.skip("this ComfyUI does not keep the place of a weight in its file")
    return load_layer(tmp_path / "layer.safetensors")


def test_comfyui_keeps_places_since_0_33(host):
    assert keeps_places() is (host.version != "0.3.75")


def test_transposed_weight_is_read_from_memory():
    weight = torch.randn(40, 30).bfloat16().t()
    assert torch.equal(read(file_slices._memory_reader(weight), weight), weight)


def test_weight_is_read_from_its_file(layer):
    assert torch.equal(read(file_slices._file_reader(layer.weight), layer.weight), weights()["weight"])


def test_tensors_that_are_not_the_bytes_of_the_file_are_not_read_from_it(layer, subtests):
    weight = layer.state_dict()["weight"]
    others = {"part": weight[1:], "transposed": weight.t(), "first rows": weight[:2], "changed": weight * 2}
    for name, other in others.items():
        with subtests.test(name):
            assert file_slices._file_reader(other) is None


def test_weight_of_a_replaced_file_is_read_from_the_loaded_one(layer, tmp_path):
    path, new = tmp_path / "layer.safetensors", tmp_path / "new.safetensors"
    reader = file_slices._file_reader(layer.weight)
    save_file({name: tensor * 2 for name, tensor in weights().items()}, new)
    os.rename(path, tmp_path / "old.safetensors")
    os.rename(new, path)
    assert torch.equal(read(reader, layer.weight), weights()["weight"])


def test_truncated_file_is_an_error(layer, tmp_path, sentences):
    reader = file_slices._file_reader(layer.weight)
    path = tmp_path / "layer.safetensors"
    os.rename(path, tmp_path / "old.safetensors")
    os.truncate(tmp_path / "old.safetensors", 1000)
    with sentences.raises(SourceError):
        read(reader, layer.weight)


@pytest.mark.gpu
def test_weights_arrive_on_the_gpu_unchanged(tmp_path, subtests):
    large = torch.randn(5000, 5001, generator=torch.Generator().manual_seed(1))
    cases = {
        "memory": weights()["weight"],
        "large": large,
        "transposed": large.t(),
        "pinned": large.pin_memory(),
        "GPU": large.cuda(),
    }
    if keeps_places():
        cases["file"] = load_layer(tmp_path / "layer.safetensors").weight
    staging, device = Staging(), torch.device("cuda", 0)
    for name, weight in cases.items():
        with subtests.test(name):
            assert torch.equal(file_slices.load_weight(weight, device, staging).cpu(), weight.cpu())
