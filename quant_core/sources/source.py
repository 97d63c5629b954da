"""Protocols of tensor sources, and their fingerprint."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["CPU", "SampledSource", "Source", "TensorInfo", "fingerprint", "is_computed"]

CPU = torch.device("cpu")
_SAMPLE_BYTES = 4096
_SAMPLES = 16  # per tensor


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor that is not loaded."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """Named tensors that are read one at a time.

    Attributes:
        name: display name for messages.
        tensors: name → :class:`TensorInfo`, in the cheapest order for reading.
        metadata: string pairs of the file header.
    """

    name: str

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Load one tensor onto ``device``."""
        ...


def is_computed(source: Source) -> bool:
    """Whether the bytes of a tensor may depend on the device that it is read to: those of a source with ``computed``, and of
    sources that are read from one, their ``origin``."""
    origin = getattr(source, "origin", None)
    return getattr(source, "computed", False) or (origin is not None and is_computed(origin))


class SampledSource(Source, Protocol):
    """Source that reads a few bytes without loading whole tensors, and therefore has a fingerprint."""

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of a tensor, starting at byte ``offset`` of its contiguous memory."""
        ...


def fingerprint(source: Source, *extra: str) -> str | None:
    """Hash a source and the strings in ``extra``; None for a source that cannot be sampled.

    The hash covers all names, dtypes, shapes, header metadata and sixteen pages of 4 KiB, evenly spaced over each tensor. This
    distinguishes a fine-tune from its base model without reading the whole file. A source that is decoded from another one (its
    ``origin``) has the fingerprint of that one, marked as decoded.
    """
    origin = getattr(source, "origin", None)
    if origin is not None:
        return fingerprint(origin, "decoded", *extra)
    sample = getattr(source, "sample", None)
    if sample is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for text in (*extra, *(f"{key}={value}" for key, value in sorted(source.metadata.items()))):
        digest.update(text.encode() + b"\0")
    for name, info in source.tensors.items():
        digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
        last = max(0, info.nbytes - _SAMPLE_BYTES)
        for offset in sorted({last * index // (_SAMPLES - 1) for index in range(_SAMPLES)}):
            digest.update(sample(name, offset, min(_SAMPLE_BYTES, info.nbytes)))
    return digest.hexdigest()
