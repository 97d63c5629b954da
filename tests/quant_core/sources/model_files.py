"""Files of small models in every format that is read."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

from learned_rounding.tests.gguf_files import save_gguf

__all__ = ["SAVE", "save_as_gguf"]


def save_as_gguf(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    code: str = "F32",
    pairs: Iterable[tuple] = (),
) -> Path:
    """Write a GGUF with the matrices coded as ``code`` where whole blocks fit, the rest as float32.

    ``pairs``: (method of the writer, its arguments …) for each key-value pair.
    """
    writer = gguf.GGUFWriter(path, "flux")
    for write, *arguments in pairs:
        getattr(writer, write)(*arguments)
    block, _ = gguf.GGML_QUANT_SIZES[Type[code]]
    for name, tensor in tensors.items():
        kind = Type[code] if tensor.ndim == 2 and tensor.shape[-1] % block == 0 else Type.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    save_gguf(writer)
    return path


# Name of a format → function that writes tensors into a file of it.
SAVE: Mapping[str, Callable[[Mapping[str, torch.Tensor], Path], object]] = {
    "safetensors": save_file,
    "pickle": torch.save,
    "legacy pickle": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "GGUF": lambda tensors, path: save_as_gguf(tensors, path, "BF16"),
}
