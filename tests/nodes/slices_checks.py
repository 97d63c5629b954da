"""Checks of in_process.py: weights of a model that are slices of the file that ComfyUI loaded."""

import mmap
import os
from ctypes import addressof, c_uint8
from pathlib import Path

import comfy.utils
import folder_paths
import torch
from pack.nodes.host import file_slices
from pack.quant_core.errors import SourceError
from pack.quant_core.sources.staging import Staging
from safetensors.torch import save_file

PATH = Path(folder_paths.base_path) / "layer.safetensors"
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


def loaded_layer() -> torch.nn.Linear:
    """A layer that ComfyUI's loader makes of a file with dynamic VRAM: its weights are the mapped file."""
    import comfy_aimdo.model_mmap

    save_file(weights(), PATH)
    comfy_aimdo.model_mmap.ModelMMAP = MappedFile
    layer = torch.nn.Linear(64, 96, dtype=torch.bfloat16, device="meta")
    layer.load_state_dict(comfy.utils.load_safetensors(str(PATH))[0], assign=True)
    return layer


def read(reader, weight: torch.Tensor) -> torch.Tensor:
    """All bytes of a weight, in parts."""
    buffer = bytearray(weight.nbytes)
    for offset in range(0, len(buffer), CHUNK):
        reader(memoryview(buffer)[offset : offset + CHUNK], offset)
    return torch.frombuffer(buffer, dtype=weight.dtype).view(weight.shape)


def readers() -> dict:
    """Which weights are read from the file, and what is read after the file was replaced or truncated."""
    expected, memory = weights()["weight"], torch.randn(40, 30).bfloat16().t()
    found = {"memory": torch.equal(read(file_slices._memory_reader(memory), memory), memory)}
    if not hasattr(comfy.utils, "load_safetensors"):
        return found
    layer = loaded_layer()
    weight = layer.state_dict()["weight"]
    reader = file_slices._file_reader(weight)
    found["file"] = torch.equal(read(reader, weight), expected)
    others = {"part": weight[1:], "transposed": weight.t(), "first rows": weight[:2], "changed": weight * 2}
    found["read from memory"] = [name for name, other in others.items() if file_slices._file_reader(other) is None]
    save_file({name: tensor * 2 for name, tensor in weights().items()}, PATH.with_name("new.safetensors"))
    os.rename(PATH, moved := PATH.with_name("old.safetensors"))
    os.rename(PATH.with_name("new.safetensors"), PATH)
    found["replaced"] = torch.equal(read(reader, weight), expected)
    os.truncate(moved, 1000)
    try:
        read(reader, weight)
    except SourceError as error:
        found["truncated"] = str(error)
    return found


def gpu() -> dict:
    """Weights on a GPU, read from the file and copied from memory."""
    staging, device, expected = Staging(), torch.device("cuda", 0), weights()["weight"]
    large = torch.randn(5000, 5001, generator=torch.Generator().manual_seed(1))
    cases = {
        "memory": expected,
        "large": large,
        "transposed": large.t(),
        "pinned": large.pin_memory(),
        "GPU": large.cuda(),
    }
    if hasattr(comfy.utils, "load_safetensors"):
        cases["file"] = loaded_layer().weight
    return {
        name: torch.equal(file_slices.load_weight(weight, device, staging).cpu(), weight.cpu())
        for name, weight in cases.items()
    }


CHECKS = {"slices_readers": readers, "slices_gpu": gpu}
