"""Where tensors come from: one protocol for files and for state dicts."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["CPU", "TensorInfo", "Source", "TensorSource", "fingerprint"]

CPU = torch.device("cpu")
_PAGE = 4096
_PAGES = 16


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """Named tensors that are read one at a time.

    Attributes:
        name: what to call it in messages.
        tensors: name → :class:`TensorInfo`, in the order in which reading is cheapest.
        metadata: the header's string pairs.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """The tensor on ``device``."""


class SampledSource(Source, Protocol):
    """A source that can give a few bytes without reading whole tensors, and so has a fingerprint."""

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """``length`` bytes of the tensor's memory from byte ``offset``."""


class TensorSource:
    """A state dict as a :class:`Source`; nothing is copied."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, name: str = "state dict"
    ):
        self._tensors = tensors
        self.name = name
        self.tensors = {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        self.metadata = dict(metadata or {})

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        return self._tensors[name].to(device)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        flat = self._tensors[name].detach().contiguous().flatten().view(torch.uint8)
        return flat[offset : offset + length].cpu().numpy().tobytes()


def fingerprint(source: Source, *extra: str) -> str | None:
    """A hash that changes when the source, or any string in ``extra``, does; None unless it, or its ``origin``, is a SampledSource.

    It covers all names, dtypes, shapes and header pairs, and sixteen pages spread over each tensor: enough to
    tell one model from another and a fine-tune from its base without reading the whole file twice. Of a source that is decoded from
    another, its ``origin``, all that is read of that one.
    """
    if hasattr(source, "origin"):
        return fingerprint(source.origin, "decoded", *extra)
    if not hasattr(source, "sample"):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for text in (*extra, *(f"{k}={v}" for k, v in sorted(source.metadata.items()))):
        digest.update(text.encode() + b"\0")
    for name, info in source.tensors.items():
        digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
        last = max(0, info.nbytes - _PAGE)
        for offset in sorted({last * page // (_PAGES - 1) for page in range(_PAGES)}):
            digest.update(source.sample(name, offset, min(_PAGE, info.nbytes)))
    return digest.hexdigest()
