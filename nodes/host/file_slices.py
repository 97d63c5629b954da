"""Weights of a model as bytes: of the file that ComfyUI loaded, where ComfyUI keeps the place of a weight in it, else of memory."""

import os
from collections.abc import Callable

import numpy
import torch

from ...quant_core.errors import SourceError
from ...quant_core.sources.staging import Staging

__all__ = ["load_weight"]

_ATTRIBUTE = "_comfy_tensor_file_slice"  # of a storage: ComfyUI's TensorFileSlice, in releases with dynamic VRAM
ReadInto = Callable[[memoryview, int], None]


def load_weight(weight: torch.Tensor, device: torch.device, staging: Staging) -> torch.Tensor:
    """``weight`` on ``device``. Pageable memory, which mapped files are too, is copied to a GPU through ``staging``.

    Raises:
        SourceError: the file of the weight was truncated since it was loaded, or cannot be read.
    """
    if device.type != "cuda" or weight.device.type != "cpu" or weight.is_pinned():
        return weight.to(device)
    loaded = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    staging.fill(loaded.flatten().view(torch.uint8), _file_reader(weight) or _memory_reader(weight))
    return loaded


def _file_reader(weight: torch.Tensor) -> ReadInto | None:
    """Reads the bytes of a weight from the file that ComfyUI holds open and maps; None where they are not all of a known slice.

    ComfyUI copies weights to a GPU from the same open file, so this is what it samples with: a file that was replaced since
    is still read as it was loaded, and a changed one as it is now. The mapping is read-only, so weights that were changed
    since are in other storages.
    """
    place = getattr(weight.untyped_storage(), _ATTRIBUTE, None)
    file = getattr(place, "file_ref", None)
    if place is None or file is None or not hasattr(os, "preadv"):
        return None
    if place.size != weight.nbytes or weight.storage_offset() or not weight.is_contiguous():
        return None
    descriptor = file if isinstance(file, int) else file.fileno()

    def read_into(view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], place.offset + offset + done)
            except OSError as error:
                raise SourceError(
                    f"The file of the MODEL cannot be read: {error.strerror}; check the disk, and load the model again."
                ) from error
            if not count:
                raise SourceError("The file of the MODEL was truncated after it was loaded; load the model again.")
            done += count

    return read_into


def _memory_reader(weight: torch.Tensor) -> ReadInto:
    """Reads the bytes of a weight from memory."""
    data = weight.detach().contiguous().flatten().view(torch.uint8).numpy()

    def read_into(view: memoryview, offset: int) -> None:
        # Unlike an assignment to the view, this lets other threads run.
        numpy.copyto(numpy.frombuffer(view, numpy.uint8), data[offset : offset + len(view)])

    return read_into
