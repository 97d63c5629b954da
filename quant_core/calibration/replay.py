"""Replay set: recorded calls of a model with all their arguments, and the file of such calls."""

import functools
import hashlib
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..cancellation import CancelCheck
from ..display import describe_cause
from ..errors import CalibrationError, OutputError
from ..output import SafetensorsWriter, header_bytes
from ..sources import SafetensorsFile, TensorInfo
from ..sources.safetensors import parse_bounded_json
from ..sources.source import CPU
from ..sources.staging import Staging, byte_views
from .arguments import Node, Path, decode_arguments, find_live_object

__all__ = ["CALLS_SUFFIX", "RecordedCall", "ReplaySet", "StoredTensor", "TensorUse", "hash_tensor"]

CALLS_SUFFIX = ".calls.safetensors"
_METADATA_KEY = "learned_rounding_calls"
_VERSION = 1


class StoredTensor(Protocol):
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
        if hash_tensor(tensor) != self.digest:
            raise CalibrationError(
                f"{self.file.path} is damaged: tensor {self.name} of the recorded calls differs from its checksum; "
                "calibrate again.",
                file=str(self.file.path),
            )
        return tensor


def hash_tensor(tensor: torch.Tensor) -> str:
    """Hash dtype, shape and bytes of a tensor on the CPU."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    for view in byte_views(tensor, Staging()):
        digest.update(view)
    return digest.hexdigest()


@dataclass(frozen=True)
class TensorUse:
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
class RecordedCall:
    """Recorded call. ``arguments``: node of (args, kwargs); ``position``: in its run, 0…1."""

    arguments: Node
    tensors: tuple[TensorUse, ...]
    position: float
    validation: bool

    @classmethod
    def parse(cls, values: dict, infos: Sequence[TensorInfo]) -> "RecordedCall":
        """Parse the JSON of a call. Raises what ``decode_arguments`` raises."""
        uses = []
        for stored, order, on_host in values["tensors"]:
            if order is not None and sorted(order) != list(range(len(infos[range(len(infos))[stored]].shape))):
                raise ValueError(f"{order} is not a permutation of the dimensions of tensor {stored}")
            uses.append(TensorUse(range(len(infos))[stored], order and tuple(order), bool(on_host)))
        position, validation = float(values["position"]), values["validation"]
        if not (0 <= position <= 1 and type(validation) is bool):
            raise ValueError(f"position {position} or validation {validation} of a call")
        args, kwargs = decode_arguments(values["arguments"], uses, CPU, lambda path: None)
        if type(args) is not tuple or type(kwargs) is not dict or not all(type(key) is str for key in kwargs):
            raise ValueError("arguments of a call are not a tuple and a dict")
        return cls(values["arguments"], tuple(uses), position, validation)


class ReplaySet:
    """Recorded calls of one model. They can be replayed in any order; tensors that are equal are stored once.

    Made by :class:`~.recorder.ReplayRecorder` and :meth:`load`. Files of its tensors are removed with the object. Thread-safe.

    Attributes:
        validation: whether each call is used for validation only; of two or more calls at least one is, and one is not.
        positions: position of each call in its run, as a fraction of the run's calls, 0…1.
        nbytes: size of the distinct tensors in bytes; ``file_bytes``: of those in files.
        fingerprint: hash of all calls.
        calibration: fingerprint of the calibration that the calls were saved with; None if they were not loaded.
    """

    def __init__(self, calls: Sequence[RecordedCall], tensors: Sequence[StoredTensor], calibration: str | None = None):
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
                    f"{path} does not contain valid calls of a model ({describe_cause(error)}); calibrate again.",
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


def _encode_calls(calls: Sequence[RecordedCall], tensors: Sequence[StoredTensor]) -> str:
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


def _parse_calls(file: SafetensorsFile) -> tuple[list[RecordedCall], list[StoredTensor]]:
    values = parse_bounded_json(file.metadata.get(_METADATA_KEY, "{}").encode())
    if values.get("version", 0) > _VERSION:
        raise CalibrationError(
            f"{file.path} was written by a newer version of this node pack; update the node pack.", file=str(file.path)
        )
    tensors = [_FileTensor(file, str(number), str(digest)) for number, digest in enumerate(values["digests"])]
    if {tensor.name for tensor in tensors} != set(file.tensors):
        raise ValueError(f"{len(tensors)} tensors are listed and {len(file.tensors)} are stored")
    calls = [RecordedCall.parse(call, [tensor.info for tensor in tensors]) for call in values["calls"]]
    if not calls:
        raise ValueError("no calls")
    return calls, list(tensors)
