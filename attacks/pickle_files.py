"""Hostile PyTorch checkpoints."""

import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from .attack import CANARY, Attack

__all__ = ["PICKLES"]

_BILLION_LAUGHS = b"K\x01" + b"2\x86" * 60  # a pair of twice the same pair of …: 2⁶⁰ numbers in 122 bytes


class _CreateCanary:
    """Object whose pickle creates the canary file when it is loaded."""

    def __init__(self, folder: Path):
        self._path = str(folder / CANARY)

    def __reduce__(self):
        return open, (self._path, "w")


def _save_with(make: Callable[[], torch.Tensor], name: str = "x.weight") -> Callable[[Path], bytes]:
    """Save a valid weight and the tensor of ``make`` with torch."""

    def save(folder: Path) -> bytes:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save({"a.weight": torch.zeros(8, 8), name: make()}, buffer)
        return buffer.getvalue()

    return save


def _zip(pickled: bytes, others: zipfile.ZipFile | None = None) -> Callable[[Path], bytes]:
    """Build an archive of torch with that pickle, and the files of ``others``."""
    files = {name: others.read(name) for name in others.namelist()} if others else {}

    def save(folder: Path) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in (files | {"archive/data.pkl": pickled}).items():
                archive.writestr(name, content)
        return buffer.getvalue()

    return save


def _declare_storage(count: int) -> Callable[[Path], bytes]:
    """Save a 3 × 3 tensor whose storage declares ``count`` values."""

    def save(folder: Path) -> bytes:
        content = _save_with(lambda: torch.zeros(3, 3))(folder)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            pickled = archive.read("archive/data.pkl")
            size = b"K\x09"  # nine values
            assert pickled.count(size + b"t") == 1
            return _zip(pickled.replace(size + b"t", pickle.dumps(count, 2)[2:-1] + b"t"), archive)(folder)

    return save


def _pickle_of(count: int) -> bytes:
    """Return the pickle of torch for one weight of ``count`` values."""
    buffer = io.BytesIO()
    torch.save({"a.weight": torch.zeros(1)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl").replace(b"K\x01", pickle.dumps(count, 2)[2:-1])


def _compressed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", _pickle_of(2**28))
        with archive.open("archive/data/0", "w") as file:
            for _ in range(64):
                file.write(bytes(1 << 24))
    return buffer.getvalue()


def _legacy(weights: bytes, keys: bytes) -> bytes:
    """Build a file of torch before 1.6 from the pickles of the weights and of the storage keys, with an empty storage."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    start = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system))
    return start + weights + keys + bytes(8)


PICKLES = {
    "pickle_code": Attack(
        "x.ckpt",
        lambda folder: pickle.dumps({"a.weight": _CreateCanary(folder)}),
        "pickle that executes code when it is loaded",
    ),
    "pickle_as_safetensors": Attack(
        "x.safetensors", lambda folder: pickle.dumps(_CreateCanary(folder)), "the same with the suffix .safetensors"
    ),
    "pickle_truncated": Attack(
        "x.pt", lambda folder: pickle.dumps({"a.weight": _CreateCanary(folder)})[:20], "first half of a pickle"
    ),
    "pickle_expanded": Attack(
        "x.pt",
        _save_with(lambda: torch.zeros(1).expand(200_000, 200_000)),
        "one value expanded to a tensor of 4 × 10¹⁰",
    ),
    "pickle_negative": Attack("x.pt", _declare_storage(-1), "storage of negative size"),
    "pickle_beyond": Attack("x.pt", _declare_storage(2**40), "storage of 2⁴⁰ values in a file of a few bytes"),
    "pickle_meta": Attack("x.pt", _save_with(lambda: torch.empty(4, 4, device="meta")), "meta tensor without values"),
    "pickle_quantized": Attack(
        "x.pt",
        _save_with(lambda: torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8)),
        "tensor of torch.quantize_per_tensor",
    ),
    "pickle_nested": Attack(
        "x.pt", _save_with(lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])), "nested tensor"
    ),
    "pickle_sparse": Attack("x.pt", _save_with(lambda: torch.eye(4).to_sparse_csr()), "sparse tensor"),
    "pickle_surrogate": Attack(
        "x.pt",
        _save_with(lambda: torch.zeros(4, 4), "\ud800"),
        "unpaired surrogate in a tensor name, which cannot be encoded as UTF-8",
    ),
    "pickle_reserved_name": Attack(
        "x.pt",
        _save_with(lambda: torch.zeros(4, 4), "__metadata__"),
        "tensor with the name of the safetensors metadata entry",
    ),
    "pickle_compressed": Attack("x.pt", _compressed, "archive of 1 MB that decompresses to 1 GB"),
    "pickle_memo": Attack("x.pt", _zip(b"\x80\x02}r\xff\xff\xff\x7f."), "memo index of two billion"),
    "pickle_deep": Attack(
        "x.pt", _zip(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), "lists nested 100,000 levels deep"
    ),
    "pickle_laughs": Attack(
        "x.pt", _zip(b"\x80\x02}(" + _BILLION_LAUGHS + b"N" + b"u."), "dictionary key that takes 2⁶⁰ steps to hash"
    ),
    "pickle_name_laughs": Attack(
        "x.pt", _zip(b"\x80\x02" + _BILLION_LAUGHS + b"2\x93."), "global name that takes 2⁶⁰ steps to format"
    ),
    "pickle_key_laughs": Attack(
        "x.pt",
        _zip(
            b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
            + _BILLION_LAUGHS
            + b"X\x03\x00\x00\x00cpuK\x01tQ."
        ),
        "the same as the key of a storage",
    ),
    "pickle_storage_laughs": Attack(
        "x.pt",
        _zip(
            b"\x80\x02(X\x07\x00\x00\x00storage" + _BILLION_LAUGHS + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ."
        ),
        "the same as the type of a storage",
    ),
    "pickle_dtype_laughs": Attack(
        "x.pt",
        _zip(b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n(NK\x00))NN" + _BILLION_LAUGHS + b"tR."),
        "the same as the dtype of a tensor",
    ),
    "pickle_legacy_laughs": Attack(
        "x.pt",
        _legacy(b"\x80\x02}.", b"\x80\x02](" + _BILLION_LAUGHS + b"e."),
        "the same as a storage key in the legacy format",
    ),
    "pickle_repeated_argument": Attack(
        "x.pt",
        _zip(
            b"\x80\x02ccollections\nOrderedDict\nq\x00]("
            + b"NN\x86" * 100_000
            + b"e\x85q\x01"
            + b"h\x00h\x01R0" * 100_000
            + b"N."
        ),
        "100,000 dictionaries from one list of 100,000 pairs",
    ),
    "pickle_nested_calls": Attack(
        "x.pt",
        _zip(
            b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00(ctorch\nSize\nN)Ntq\x01"
            + b"(h\x00Nh\x01Ntq\x01" * 300
            + b"h\x00h\x01R0" * 500_000
            + b"N."
        ),
        "500,000 calls, each nested 300 levels deep",
    ),
    "pickle_long_storage": Attack(
        "x.pt",
        _zip(
            b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01"
            + b"N" * 500_000
            + b"tq\x00"
            + b"h\x00Q0" * 500_000
            + b"N."
        ),
        "500,000 references to a storage described by 500,000 values",
    ),
    "zip_empty": Attack("x.pt", b"PK\x05\x06" + bytes(18), "empty archive as a checkpoint"),
    "pickle_lists": Attack("x.pt", _zip(b"\x80\x02(" + b"]" * ((3 << 20) - 9) + b"l."), "three million empty lists"),
    "pickle_long_name": Attack(
        "x.pt",
        _zip(
            b"\x80\x04X\x40\x42\x0f\x00"
            + b"torch." * 166_666
            + b"torc\x94"
            + b"X\x01\x00\x00\x00a\x9400"
            + b"h\x00h\x01\x930" * 300_000
            + b"N."
        ),
        "300,000 references to a global with a name of a million characters",
    ),
    "pickle_bytearray": Attack(
        "x.pt", _zip(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."), "bytearray that declares 1 TB"
    ),
    "pickle_cycle": Attack(
        "x.pt",
        _zip(b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."),
        "checkpoint that contains itself as its state dict",
    ),
    "pickle_same_table": Attack(
        "x.pt",
        _zip(
            b"\x80\x02}(X\x01\x00\x00\x00a}("
            + b"".join(struct.pack("<cI5sc", b"X", 5, b"%05d" % number, b"N") for number in range(90_000))
            + b"uq\x01"
            + b"".join(struct.pack("<cI5s2s", b"X", 5, b"%05d" % number, b"h\x01") for number in range(90_000))
            + b"u."
        ),
        "90,000 references to a table of 90,000 values as possible state dicts",
    ),
}
