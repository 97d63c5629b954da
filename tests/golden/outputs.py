"""Output files of a case: what is masked, SHA-256 hashes, and the first difference of two files."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["SafetensorsOutput", "file_differences", "file_hashes"]

MASK = "<masked>"
PROVENANCE_KEY = "learned_rounding"
# The fingerprint is a hash over the version, among others.
MASKED_PROVENANCE = ("version", "fingerprint")
# Times and texts for people.
MASKED_REPORT = ("seconds", "elapsed", "eta", "reason", "recognised", "note")
# The size of the file, which depends on the length of the header.
MASKED_SUMMARY = ("bytes_out",)
# A killed process has written all layers or all but the last of those it has printed.
COUNTS_AS_FLAG = ("taken_up",)
# Solver names of version 0.1.0 in a report → those of today.
RENAMED_SOLVERS = {"sequential": "gptq"}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """A header entry; ``begin`` and ``end`` are offsets in the data section."""

    name: str
    dtype: str
    shape: list[int]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsOutput:
    """A safetensors file in two parts.

    Attributes:
        header: the JSON as lists of (key, value) pairs at the top level, so that the order of tensors counts; version and
            fingerprint are masked. The header's padding is left out.
        data: the data section.
    """

    header: list[tuple[str, Any]]
    data: bytes

    @classmethod
    def read(cls, path: Path) -> "SafetensorsOutput":
        """Parse a whole file. Raises ValueError if the header is not JSON."""
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        metadata = header.get("__metadata__", {})
        if PROVENANCE_KEY in metadata:
            metadata[PROVENANCE_KEY] = json.loads(metadata[PROVENANCE_KEY])
            metadata[PROVENANCE_KEY] |= dict.fromkeys(MASKED_PROVENANCE, MASK)
        return cls(list(header.items()), content[begin:])

    def tensors(self) -> Iterator[StoredTensor]:
        """The tensors in file order."""
        for name, entry in self.header:
            if name != "__metadata__":
                yield StoredTensor(name, entry["dtype"], entry["shape"], *entry["data_offsets"])


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of the masked header and of the data section of a safetensors file."""
    output = SafetensorsOutput.read(path)
    header = json.dumps(output.header, separators=(",", ":")).encode()
    return {"header": hashlib.sha256(header).hexdigest(), "data": hashlib.sha256(output.data).hexdigest()}


def file_differences(old: Path, new: Path) -> list[str]:
    """One line per part (header, data, report) in which two files of the same name differ."""
    if old.suffix == ".safetensors":
        return _safetensors_differences(SafetensorsOutput.read(old), SafetensorsOutput.read(new))
    if old.suffix == ".json":
        before, after = (_mask_report(json.loads(path.read_text(encoding="utf-8"))) for path in (old, new))
        before, after = (report | dict.fromkeys(MASKED_SUMMARY, MASK) for report in (before, after))
        found = _json_difference(before, after)
        return [f"report: {found}"] if found else []
    return [] if old.read_bytes() == new.read_bytes() else [f"{old.name}: contents differ"]


def _safetensors_differences(old: SafetensorsOutput, new: SafetensorsOutput) -> list[str]:
    found = []
    before, after = (json.loads(json.dumps(output.header)) for output in (old, new))
    if before != after:
        order = [[name for name, _ in header] for header in (before, after)]
        found.append(
            f"header: {_json_difference(dict(before), dict(after)) or _json_difference(*order, path='order of entries')}"
        )
    if old.data != new.data:
        found.append(f"data: {_tensor_difference(old, new)}")
    return found


def _tensor_difference(old: SafetensorsOutput, new: SafetensorsOutput) -> str:
    """Name the first tensor of ``old`` whose bytes differ, the first index, and how many elements differ."""
    others = {tensor.name: tensor for tensor in new.tensors()}
    for name, dtype, shape, begin, end in old.tensors():
        if name not in others:
            return f"{name} is only in the old file"
        other = others[name]
        if (dtype, shape) != (other.dtype, other.shape):
            return f"{name} is {dtype} {shape} in the old file and {other.dtype} {other.shape} in the new"
        before, after = old.data[begin:end], new.data[other.begin : other.end]
        if before == after:
            continue
        width = (end - begin) // max(math.prod(shape), 1)
        pairs = [torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, width) for data in (before, after)]
        changed = (pairs[0] != pairs[1]).any(dim=1).nonzero().flatten()
        first = int(changed[0])
        values = [_element(data[first * width : (first + 1) * width], dtype) for data in (before, after)]
        index = [int(part) for part in torch.unravel_index(torch.tensor(first), shape)] if shape else []
        return f"{name}{index}: {values[0]} → {values[1]}; {len(changed)} of {math.prod(shape)} elements differ"
    return f"bytes outside of tensors, or another layout: {len(old.data)} and {len(new.data)} bytes"


def _element(data: bytes, dtype: str) -> str:
    if dtype not in DTYPES:
        return data.hex()
    return (
        f"{torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).to(torch.float64).item():.9g} (0x{data[::-1].hex()})"
    )


def _mask_report(value: object) -> object:
    if isinstance(value, list):
        return [_mask_report(item) for item in value]
    if isinstance(value, str):
        return RENAMED_SOLVERS.get(value, value)
    if not isinstance(value, dict):
        return value
    return {
        RENAMED_SOLVERS.get(key, key): MASK
        if key in MASKED_REPORT
        else bool(item)
        if key in COUNTS_AS_FLAG
        else _mask_report(item)
        for key, item in value.items()
    }


def _json_difference(old: object, new: object, path: str = "") -> str | None:
    """Path and values of the first difference; None when both are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if key not in old or key not in new:
                return f"{path}/{key} is only in the {'old' if key in old else 'new'} file"
            if found := _json_difference(old[key], new[key], f"{path}/{key}"):
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        differences = (_json_difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True)))
        return next(filter(None, differences), None)
    return None if old == new else f"{path}: {old!r:.80} → {new!r:.80}"
