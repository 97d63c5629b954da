"""Recorder of a model's calls: a seeded sample with bounded memory, taken while the model runs."""

import contextlib
import heapq
import math
import os
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import OutputError
from ..file_system import remove_file
from ..sources import TensorInfo
from ..sources.source import CPU
from ..sources.staging import Staging, byte_views
from . import arguments
from .arguments import ArgumentEncoder, Node
from .replay import RecordedCall, ReplaySet, TensorUse, hash_tensor

__all__ = ["ReplayRecorder"]

_GOLDEN = (math.sqrt(5) - 1) / 2
_VALIDATION_PERIOD = 4  # one call in four, where no complete run is used for validation


class _HeldTensor:
    """Tensor in memory or, if ``path`` is given, in a memory-mapped file that is removed with this object."""

    def __init__(self, tensor: torch.Tensor, digest: str, path: Path | None):
        self.info, self.digest, self.in_file = TensorInfo(tensor.dtype, tuple(tensor.shape)), digest, path is not None
        self._tensors = [tensor if path is None else _write_mapped(tensor, path)]
        if path is not None:
            weakref.finalize(self, _unmap_and_remove, self._tensors, path)

    def read(self) -> torch.Tensor:
        return self._tensors[0]


def _write_mapped(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """Write a tensor on the CPU to a new file and map the file."""
    try:
        with open(path, "xb") as file:
            for view in byte_views(tensor, Staging()):
                file.write(view)
    except OSError as error:
        remove_file(path)
        raise OutputError(
            f"Recorded calls of the model cannot be written to {path.parent}: {error.strerror or error}; free some "
            "space, or record fewer calls."
        ) from error
    mapped = torch.from_file(str(path), shared=True, size=tensor.nbytes, dtype=torch.uint8)
    return mapped.view(tensor.dtype).view(tensor.shape)


def _unmap_and_remove(tensors: list[torch.Tensor], path: Path) -> None:
    tensors.clear()  # Windows removes no mapped file
    remove_file(path)


@dataclass(frozen=True)
class _SampledCall:
    """Call in the sample of a recorder; ``uses``: (stored tensor, order, on_host) by number of the tensor."""

    run: int
    index: int  # in its run
    arguments: Node
    uses: tuple[tuple[_HeldTensor, tuple[int, ...] | None, bool], ...]


class ReplayRecorder:
    """Record a sample of a model's calls while it runs.

    Call n of all runs has the key frac(u + n·φ), where φ is the golden ratio and u is drawn with ``seed``. The calls with
    the least keys are kept: a sample of fixed size in one pass, at nearly equal distances over runs, steps and guidance
    branches. Tensors are copied to memory up to ``ram_bytes``, then to memory-mapped files. Objects other than containers,
    tensors and plain values are not kept, see :mod:`.arguments`.

    Attributes:
        limited: whether fewer calls are kept because of ``max_bytes``.

    Args:
        calls: largest number of calls to keep.
        folder: existing folder for the files.
        ram_bytes: memory for tensors, in bytes.
        max_bytes: limit of all tensors, in bytes; fewer calls are kept where it is reached.
        ignored: paths of entries in dict arguments, from the name of the keyword argument on, that are not recorded.
    """

    def __init__(
        self,
        calls: int,
        *,
        seed: int,
        folder: Path,
        ram_bytes: int,
        max_bytes: float = math.inf,
        ignored: Collection[arguments.Path] = (),
    ):
        self._limit, self._seed, self._folder = calls, seed, Path(folder)
        self._ram_bytes, self._max_bytes = ram_bytes, max_bytes
        self._ignored = [(1, *path) for path in ignored]
        self._offset = torch.rand(1, generator=self._generator(), dtype=torch.float64).item()
        self._sampled: list[tuple[float, _SampledCall]] = []  # heap by falling key
        self._stored: weakref.WeakValueDictionary[str, _HeldTensor] = weakref.WeakValueDictionary()
        self._runs: list[tuple[int, bool | None]] = []  # (calls, validation) of each run
        self._calls = 0
        self.limited = False

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed)

    @contextlib.contextmanager
    def watching(self, model: torch.nn.Module, validation: bool | None = None) -> Iterator[None]:
        """Record calls of ``model`` in this context, as one run; ``validation``: as for :meth:`.Collector.watching`."""
        self._runs.append((0, validation))
        handle = model.register_forward_pre_hook(self._hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _hook(self, model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        key = (self._offset + self._calls * _GOLDEN) % 1
        (index, validation), run = self._runs[-1], len(self._runs) - 1
        self._runs[-1], self._calls = (index + 1, validation), self._calls + 1
        if len(self._sampled) == self._limit:
            if not self._limit or key >= -self._sampled[0][0]:
                return
            heapq.heappop(self._sampled)
        heapq.heappush(self._sampled, (-key, self._sample(run, index, args, kwargs)))
        while self._count_bytes(in_file=False) + self._count_bytes(in_file=True) > self._max_bytes:
            heapq.heappop(self._sampled)
            self._limit, self.limited = len(self._sampled), True

    @torch.inference_mode(False)
    @torch.no_grad()
    def _sample(self, run: int, index: int, args: tuple, kwargs: dict) -> _SampledCall:
        encoder = ArgumentEncoder(self._ignored)
        node = encoder.encode((args, kwargs))
        uses = tuple((*self._store(tensor), encoder.on_host(tensor.device)) for tensor in encoder.tensors)
        return _SampledCall(run, index, node, uses)

    def _store(self, tensor: torch.Tensor) -> tuple[_HeldTensor, tuple[int, ...] | None]:
        """Store a tensor whose content is not stored yet; returns it and the order of its dimensions in memory."""
        order = None
        if not tensor.is_contiguous():
            order = tuple(sorted(range(tensor.ndim), key=lambda dimension: -tensor.stride(dimension)))
            tensor = tensor.permute(order)
        copy = tensor.detach().contiguous().to(CPU, copy=True)
        digest = hash_tensor(copy)
        found = self._stored.get(digest)
        if found is None:
            in_ram = not copy.numel() or copy.nbytes + self._count_bytes(in_file=False) <= self._ram_bytes
            path = None if in_ram else self._folder / f"learned_rounding_calls_{os.urandom(6).hex()}"
            found = self._stored[digest] = _HeldTensor(copy, digest, path)
        return found, order

    def _count_bytes(self, *, in_file: bool) -> int:
        return sum(held.info.nbytes for held in list(self._stored.values()) if held.in_file is in_file)

    def result(self) -> ReplaySet | None:
        """Return the recorded calls in their order; None if there are none. The recorder is not used afterwards."""
        sampled = sorted((call for _, call in self._sampled), key=lambda call: (call.run, call.index))
        if not sampled:
            return None
        tensors = list(dict.fromkeys(held for call in sampled for held, _, _ in call.uses))
        numbers = {held: number for number, held in enumerate(tensors)}
        calls = [
            RecordedCall(
                call.arguments,
                tuple(TensorUse(numbers[held], order, on_host) for held, order, on_host in call.uses),
                call.index / self._runs[call.run][0],
                validation,
            )
            for call, validation in zip(sampled, self._choose_validation(sampled), strict=True)
        ]
        return ReplaySet(calls, tensors)

    def _choose_validation(self, sampled: Sequence[_SampledCall]) -> list[bool]:
        """Whether each call is for validation: as its run is, or one in four; both kinds occur if there are two calls."""
        given = [self._runs[call.run][1] for call in sampled]
        order = torch.randperm(len(sampled), generator=self._generator()).tolist()
        free = [index for index in order if given[index] is None]
        chosen = set(free[: max(1, len(free) // _VALIDATION_PERIOD)]) if len(sampled) > 1 else set()
        flags = [index in chosen if value is None else value for index, value in enumerate(given)]
        if len(flags) > 1 and len(set(flags)) == 1:
            flags[order[0]] = not flags[order[0]]
        return flags
