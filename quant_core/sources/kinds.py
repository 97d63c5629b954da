"""What a file is, by its first bytes: suffixes are often wrong, and failed downloads have the name of the model."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import SourceError
from .tensor_file import open_regular_file

__all__ = [
    "GGUF",
    "HEAD",
    "JSON",
    "LEGACY_PICKLE",
    "SAFETENSORS",
    "ZIP",
    "Kind",
    "find_kind",
    "read_head",
    "refuse_kind",
]

HEAD = 1024  # bytes that identify a file
_SHOWN = 60  # characters of a text file in a message


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        description: noun phrase.
        advice: what to do, end of a sentence.
        matches: whether a file that begins with these bytes, up to :data:`HEAD`, is of this kind.
    """

    description: str
    advice: str
    matches: Callable[[bytes], bool]


def _starts(*magics: bytes, offset: int = 0) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics, offset)


def _is_safetensors(head: bytes) -> bool:
    """A header length below 2^32, then a JSON object."""
    return head[4:9] == bytes(4) + b"{"


def _is_text(head: bytes) -> bool:
    """UTF-8 without control characters; the last character may be cut."""
    text = head.decode("utf-8", "replace").rstrip("\ufffd")
    return bool(text) and not re.search(r"[\x00-\x08\x0e-\x1f\x7f\ufffd]", text)


def _begins_text(pattern: bytes) -> Callable[[bytes], bool]:
    """Text that begins with ``pattern``, after white space and a byte order mark."""
    expression = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:" + pattern + rb")", re.IGNORECASE)
    return lambda head: expression.match(head) is not None and _is_text(head)


_ORIGINAL = "give the original safetensors file"
_AGAIN = "download it again"
_CONVERTIBLE = "quantize and plan read it, and other commands need a safetensors file"
_UNPACK = "unpack it and give the model in it"

SAFETENSORS = Kind("a safetensors file", "give it to a command that reads it", _is_safetensors)
GGUF = Kind("a GGUF file", _CONVERTIBLE, _starts(b"GGUF"))
ZIP = Kind("a pickled PyTorch checkpoint", _CONVERTIBLE, _starts(b"PK\x03\x04"))
LEGACY_PICKLE = Kind(
    "a pickled PyTorch checkpoint",
    _CONVERTIBLE,
    lambda head: head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05",
)
JSON = Kind(
    "a JSON file without a weight_map of tensors to files",
    "give the model itself, or the index of a sharded model",
    _begins_text(rb"[{\[]"),
)

# The first match decides. Safetensors comes first: its header length can begin with the magic bytes of another kind.
_KINDS = (
    SAFETENSORS,
    Kind("empty", _AGAIN, lambda head: not head),
    Kind("a download that is not finished: it begins with zeros", _AGAIN, lambda head: len(head) > 8 and not any(head)),
    Kind(
        "a Git LFS pointer instead of the file",
        "run 'git lfs pull' in its folder, or download the file itself",
        _starts(b"version https://git-lfs.github.com/", b"version https://hawser.github.com/"),
    ),
    Kind(
        "a web page instead of the file",
        "download the file itself, logged in where the site requires it",
        _begins_text(rb"<(?:!doctype html|!--|html|head|body|script|meta)"),
    ),
    Kind("an XML document instead of the file", _AGAIN, _begins_text(rb"<(?:\?xml|error)")),
    JSON,
    GGUF,
    Kind("a GGML file of the time before GGUF", _ORIGINAL, _starts(b"lmgg", b"fmgg", b"tjgg", b"algg")),
    ZIP,
    LEGACY_PICKLE,
    Kind("an empty zip archive", _AGAIN, _starts(b"PK\x05\x06")),
    Kind("a 7z archive", _UNPACK, _starts(b"7z\xbc\xaf\x27\x1c")),
    Kind("a RAR archive", _UNPACK, _starts(b"Rar!\x1a\x07")),
    Kind("a gzip archive", _UNPACK, _starts(b"\x1f\x8b\x08")),
    Kind("an xz archive", _UNPACK, _starts(b"\xfd7zXZ\x00")),
    Kind("a bzip2 archive", _UNPACK, _starts(b"BZh")),
    Kind("a Zstandard archive", _UNPACK, _starts(b"\x28\xb5\x2f\xfd")),
    Kind("a tar archive", _UNPACK, _starts(b"ustar", offset=257)),
    Kind("a TensorRT engine, which is compiled for one GPU", _ORIGINAL, _starts(b"ftrt", b"ptrt")),
    Kind("a TensorFlow Lite model", _ORIGINAL, _starts(b"TFL3", offset=4)),
    Kind("an HDF5 file", _ORIGINAL, _starts(b"\x89HDF\r\n\x1a\n")),
    Kind("a NumPy array", _ORIGINAL, _starts(b"\x93NUMPY")),
    Kind("an image, not a model", "give the model", _starts(b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")),
    # ir_version, then producer_name, producer_version, domain, model_version, doc_string, graph or opset_import
    Kind("an ONNX model", _ORIGINAL, lambda head: head[:1] == b"\x08" and head[1:2] < b"\x40" and head[2:3] in b"\x12\x1a\x22\x28\x32\x3a\x42"),
    Kind("a text file", _AGAIN, _is_text),
)  # fmt: skip
_UNKNOWN = Kind("another kind of file", _ORIGINAL, lambda head: True)


def find_kind(head: bytes) -> Kind:
    """The kind of a file that begins with these bytes; ``head``: its first :data:`HEAD` bytes, or all of a shorter file."""
    return next((kind for kind in _KINDS if kind.matches(head)), _UNKNOWN)


def read_head(path: Path) -> bytes:
    """The first bytes of a file. Raises SourceError if it is not a regular file or cannot be read."""
    with open_regular_file(path) as file:
        try:
            return file.read(HEAD)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}; check the disk.", file=str(path)) from error


def refuse_kind(path: Path, head: bytes) -> SourceError:
    """The error for a file of a kind that is not read here."""
    kind = find_kind(head)
    if kind is _UNKNOWN:
        return SourceError(
            f"{path} is not a safetensors file but {kind.description}; give a .safetensors file.", file=str(path)
        )
    begin = ""
    if kind.matches is _is_text:
        begin = f" ({' '.join(head.decode('utf-8', 'replace').split())[:_SHOWN]!r})"
    return SourceError(f"{path} is {kind.description}{begin}; {kind.advice}.", file=str(path))
