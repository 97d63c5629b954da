"""Replay set: a sample of a model's calls with all their arguments, recorded while the model runs."""

import contextlib
import functools
import hashlib
import heapq
import json
import math
import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Protocol

import torch

from ..cancellation import CancelCheck
from ..errors import CalibrationError, OutputError
from ..output import SafetensorsWriter, header_bytes
from ..sources import SafetensorsFile, TensorInfo
from ..sources.safetensors import parse_bounded_json
from ..sources.source import CPU
from ..sources.staging import Staging, byte_views
from .arguments import ArgumentEncoder, Node, Path, decode_arguments, find_live_object

__all__ = ["CALLS_SUFFIX", "ReplayRecorder", "ReplaySet"]

CALLS_SUFFIX = ".calls.safetensors"
_METADATA_KEY = "learned_rounding_calls"
_VERSION = 1
_GOLDEN = (math.sqrt(5) - 1) / 2
_VALIDATION_PERIOD = 4  # one call in four, where no complete run is used for validation


class _StoredTensor(Protocol):
    """Contiguous tensor of recorded calls.

    Attributes:
        digest: hash of dtype, shape and bytes.
        in_file: whether it is in a file rather than in memory.
    """

    @property
    def info(self) -> TensorInfo: ...

    @property
    def digest(self) -> str: ...

    @property
    def in_file(self) -> bool: ...

    def read(self) -> torch.Tensor: ...


class _HeldTensor:
    """Tensor in memory or, if ``path`` is given, in a memory-mapped file that is removed with this object."""

    def __init__(self, tensor: torch.Tensor, digest: str, path: FilePath | None):
        self.info, self.digest, self.in_file = TensorInfo(tensor.dtype, tuple(tensor.shape)), digest, path is not None
        self._tensor = tensor
        if path is not None:
            self._tensor = _write_mapped(tensor, path)
            weakref.finalize(self, _remove, path)

    def read(self) -> torch.Tensor:
        return self._tensor


@dataclass(frozen=True)
class _FileTensor:
    """Tensor in an open file, read and checked at each use."""

    file: SafetensorsFile
    name: str
    digest: str
    in_file = True

    @property
    def info(self) -> TensorInfo:
        return self.file.tensors[self.name]

    def read(self) -> torch.Tensor:
        tensor = self.file.read(self.name)
        if _hash_tensor(tensor) != self.digest:
            raise CalibrationError(
                f"{self.file.path} is damaged: tensor {self.name} of the recorded calls differs from its checksum; "
                "calibrate again.",
                file=str(self.file.path),
            )
        return tensor


def _hash_tensor(tensor: torch.Tensor) -> str:
    """Hash dtype, shape and bytes of a tensor on the CPU."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    for view in byte_views(tensor, Staging()):
        digest.update(view)
    return digest.hexdigest()


def _write_mapped(tensor: torch.Tensor, path: FilePath) -> torch.Tensor:
    """Write a tensor on the CPU to a new file and map the file."""
    try:
        with open(path, "xb") as file:
            for view in byte_views(tensor, Staging()):
                file.write(view)
    except OSError as error:
        _remove(path)
        raise OutputError(
            f"Recorded calls of the model cannot be written to {path.parent}: {error.strerror or error}; free some "
            "space, or record fewer calls."
        ) from error
    mapped = torch.from_file(str(path), shared=True, size=tensor.nbytes, dtype=torch.uint8)
    return mapped.view(tensor.dtype).view(tensor.shape)


def _remove(path: FilePath) -> None:
    with contextlib.suppress(OSError):  # Windows: a mapped file stays until the folder is emptied
        path.unlink()


@dataclass(frozen=True)
class _TensorUse:
    """Use of a stored tensor by one call.

    Attributes:
        stored: number of the stored tensor.
        order: the tensor is the inverse permutation of the stored one, which keeps its strides; None if contiguous.
        on_host: it stays on the CPU if the model is on another device.
    """

    stored: int
    order: tuple[int, ...] | None
    on_host: bool


@dataclass(frozen=True)
class _Call:
    """Recorded call. ``arguments``: node of (args, kwargs); ``position``: in its run, 0…1."""

    arguments: Node
    tensors: tuple[_TensorUse, ...]
    position: float
    validation: bool

    @classmethod
    def parse(cls, values: dict, infos: Sequence[TensorInfo]) -> "_Call":
        """Parse the JSON of a call. Raises what ``decode_arguments`` raises."""
        uses = []
        for stored, order, on_host in values["tensors"]:
            if order is not None and sorted(order) != list(range(len(infos[range(len(infos))[stored]].shape))):
                raise ValueError(f"{order} is not a permutation of the dimensions of tensor {stored}")
            uses.append(_TensorUse(range(len(infos))[stored], order and tuple(order), bool(on_host)))
        position, validation = float(values["position"]), values["validation"]
        if not (0 <= position <= 1 and type(validation) is bool):
            raise ValueError(f"position {position} or validation {validation} of a call")
        args, kwargs = decode_arguments(values["arguments"], uses, CPU, lambda path: None)
        if type(args) is not tuple or type(kwargs) is not dict or not all(type(key) is str for key in kwargs):
            raise ValueError("arguments of a call are not a tuple and a dict")
        return cls(values["arguments"], tuple(uses), position, validation)


class ReplaySet:
    """Recorded calls of one model. They can be replayed in any order; tensors that are equal are stored once.

    Made by :class:`ReplayRecorder` and :meth:`load`. Files of its tensors are removed with the object. Thread-safe.

    Attributes:
        validation: whether each call is used for validation only; of two or more calls at least one is, and one is not.
        positions: position of each call in its run, as a fraction of the run's calls, 0…1.
        nbytes: size of the distinct tensors in bytes; ``file_bytes``: of those in files.
        fingerprint: hash of all calls.
        calibration: fingerprint of the calibration that the calls were saved with; None if they were not loaded.
    """

    def __init__(self, calls: Sequence[_Call], tensors: Sequence[_StoredTensor], calibration: str | None = None):
        self._calls, self._tensors, self.calibration = tuple(calls), tuple(tensors), calibration
        self.validation = tuple(call.validation for call in calls)
        self.positions = tuple(call.position for call in calls)
        self.nbytes = sum(tensor.info.nbytes for tensor in tensors)
        self.file_bytes = sum(tensor.info.nbytes for tensor in tensors if tensor.in_file)
        self._description = _encode_calls(calls, tensors)
        self.fingerprint = hashlib.blake2b(self._description.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._calls)

    def arguments(
        self, index: int, device: torch.device, live: Mapping[str, object] | None = None
    ) -> tuple[tuple, dict[str, object]]:
        """Return (args, kwargs) of a call, in new containers and new tensors on ``device``.

        Args:
            device: device of the model. Tensors that were on the CPU beside a model on another device stay on the CPU.
            live: keyword arguments of a call of the model as it is now. Objects that are not recorded, such as patches,
                are taken from the same place in it.

        Raises:
            CalibrationError: ``live`` lacks an object that the recorded call had.
            SourceError: a file that the calls were loaded from was changed or cannot be read.
        """
        call, used = self._calls[index], []
        for use in call.tensors:
            tensor = self._tensors[use.stored].read().to(CPU if use.on_host else device, copy=True)
            used.append(tensor if use.order is None else tensor.permute(_invert(use.order)))
        args, kwargs = decode_arguments(call.arguments, used, device, functools.partial(_find_live, live or {}))
        return args, kwargs

    def save(self, path: str | os.PathLike, calibration: str = "", check: CancelCheck = lambda: None) -> int:
        """Write all calls to a new safetensors file; returns its size in bytes.

        ``calibration``: fingerprint of the calibration that the calls belong to. ``check``: called for each tensor; raise
        in it to cancel, which leaves no file.

        Raises:
            OutputError: the file exists with other content or cannot be written, or a dtype has no name in safetensors.
        """
        metadata = {_METADATA_KEY: self._description, "calibration": calibration}
        infos = [(str(number), tensor.info) for number, tensor in enumerate(self._tensors)]
        try:
            reserve = header_bytes(infos, metadata)
        except KeyError as error:
            raise OutputError(f"Recorded calls cannot be saved: safetensors has no dtype {error.args[0]}.") from None
        with SafetensorsWriter(path, reserve, overwrite=False, check=check) as writer:
            for number, tensor in enumerate(self._tensors):
                check()
                writer.add(str(number), tensor.read())
            return writer.finish(metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ReplaySet":
        """Open the calls of a file; tensors are read at each use.

        Raises:
            SourceError: the file is missing or is not a valid safetensors file.
            CalibrationError: it contains no calls, was written by a newer version, or is not valid.
        """
        file = SafetensorsFile(path)
        try:
            calls, tensors = _parse_calls(file)
        except BaseException as error:
            file.close()
            if isinstance(error, (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)):
                raise CalibrationError(
                    f"{path} does not contain valid calls of a model ({type(error).__name__}: {error}); calibrate again.",
                    file=str(path),
                ) from None
            raise
        loaded = cls(calls, tensors, file.metadata.get("calibration"))
        weakref.finalize(loaded, file.close)
        return loaded


def _invert(order: Sequence[int]) -> list[int]:
    return [order.index(dimension) for dimension in range(len(order))]


def _find_live(live: Mapping[str, object], path: Path) -> object:
    _, *inner = path  # 0: positional arguments, 1: keyword arguments
    try:
        return find_live_object(live, tuple(inner))
    except LookupError:
        raise CalibrationError(
            f"The recorded calls need {' → '.join(map(str, inner))}, which the model no longer has; connect the MODEL that "
            "was calibrated, or calibrate again."
        ) from None


def _encode_calls(calls: Sequence[_Call], tensors: Sequence[_StoredTensor]) -> str:
    """Describe calls in JSON; equal calls have the same description."""
    listed = [
        {
            "arguments": call.arguments,
            "tensors": [[use.stored, use.order and list(use.order), use.on_host] for use in call.tensors],
            "position": call.position,
            "validation": call.validation,
        }
        for call in calls
    ]
    description = {"version": _VERSION, "calls": listed, "digests": [tensor.digest for tensor in tensors]}
    return json.dumps(description, separators=(",", ":"))


def _parse_calls(file: SafetensorsFile) -> tuple[list[_Call], list[_StoredTensor]]:
    values = parse_bounded_json(file.metadata.get(_METADATA_KEY, "{}").encode())
    if values.get("version", 0) > _VERSION:
        raise CalibrationError(
            f"{file.path} was written by a newer version of this node pack; update the node pack.", file=str(file.path)
        )
    tensors = [_FileTensor(file, str(number), str(digest)) for number, digest in enumerate(values["digests"])]
    if {tensor.name for tensor in tensors} != set(file.tensors):
        raise ValueError(f"{len(tensors)} tensors are listed and {len(file.tensors)} are stored")
    calls = [_Call.parse(call, [tensor.info for tensor in tensors]) for call in values["calls"]]
    if not calls:
        raise ValueError("no calls")
    return calls, list(tensors)


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
        folder: FilePath,
        ram_bytes: int,
        max_bytes: float = math.inf,
        ignored: Collection[Path] = (),
    ):
        self._limit, self._seed, self._folder = calls, seed, FilePath(folder)
        self._ram_bytes, self._max_bytes = ram_bytes, max_bytes
        self._ignored = [(1, *path) for path in ignored]
        self._offset = torch.rand(1, generator=self._generator(), dtype=torch.float64).item()
        self._sampled: list[tuple[float, _SampledCall]] = []  # heap by falling key
        self._stored: weakref.WeakValueDictionary[str, _HeldTensor] = weakref.WeakValueDictionary()
        self._runs: list[tuple[int, bool | None]] = []  # (calls, validation) of each run
        self._calls = 0

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
            self._limit = len(self._sampled)

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
        digest = _hash_tensor(copy)
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
            _Call(
                call.arguments,
                tuple(_TensorUse(numbers[held], order, on_host) for held, order, on_host in call.uses),
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
