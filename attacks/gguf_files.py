"""Hostile GGUF files."""

import struct

from .attack import Attack

__all__ = ["GGUF"]


def _gguf(sides: tuple[int, ...], offset: int, kind: int = 0, **pairs: bytes) -> bytes:
    """Build a file of one tensor in 256 bytes; ``sides``: innermost first; ``pairs``: metadata key → type and value."""
    entry = struct.pack("<Q", 8) + b"a.weight" + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)
    metadata = b"".join(struct.pack("<Q", len(key)) + key.encode() + value for key, value in pairs.items())
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs)) + metadata + entry
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + bytes(256)


GGUF = {
    "gguf_counts": Attack("x.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "header that declares 2⁶⁰ tensors"),
    "gguf_string": Attack("x.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "metadata key of 2⁶² characters"),
    "gguf_beyond": Attack("x.gguf", _gguf((2**40,), 0), "tensor of terabytes in a file of a few bytes"),
    "gguf_overflow": Attack("x.gguf", _gguf((2**40, 2**40, 2**40), 0), "dimensions whose product overflows"),
    "gguf_offset": Attack("x.gguf", _gguf((8, 8), 2**63), "tensor at offset 2⁶³"),
    "gguf_rank": Attack(
        "x.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<I", 2**31), "two billion dimensions"
    ),
    "gguf_type": Attack("x.gguf", _gguf((8, 8), 0, 77), "unknown quantization type"),
    "gguf_alignment": Attack(
        "x.gguf",
        _gguf((8, 8), 0, **{"general.alignment": struct.pack("<If", 6, 32.0)}),
        "alignment that is not an integer",
    ),
    "gguf_shape_float": Attack(
        "x.gguf",
        _gguf((8, 8), 0, **{"comfy.gguf.orig_shape.a.weight": struct.pack("<IIQ2d", 9, 12, 2, 0.5, 128.0)}),
        "fractional dimension",
    ),
    "gguf_shape_bool": Attack(
        "x.gguf",
        _gguf((1, 1), 0, **{"comfy.gguf.orig_shape.a.weight": struct.pack("<IIQ2?", 9, 7, 2, True, True)}),
        "true as a dimension",
    ),
    "gguf_magic": Attack("x.gguf", b"GGUF", "file of the magic bytes only"),
    "gguf_entries": Attack(
        "x.gguf",
        b"GGUF" + struct.pack("<IQQ", 3, 1_000_000, 0) + (bytes(8) + struct.pack("<IIQ", 0, 0, 0)) * 1_000_000,
        "a million tensors",
    ),
    "gguf_strings": Attack(
        "x.gguf",
        lambda folder: _gguf((8, 8), 2**40, words=struct.pack("<IIQ", 9, 8, 1_000_000) + bytes(8) * 1_000_000),
        "array of a million empty strings",
    ),
    "gguf_nested": Attack(
        "x.gguf", _gguf((8, 8), 0, words=struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000), "nested arrays"
    ),
    "gguf_numbers": Attack(
        "x.gguf",
        lambda folder: _gguf((8, 8), 2**40, words=struct.pack("<IIQ", 9, 0, 90_000_000) + bytes(90_000_000)),
        "array of 90 million numbers",
    ),
    "gguf_part_text": Attack(
        "x.gguf",
        _gguf(
            (8, 8), 0, **{"split.count": struct.pack("<IQ", 8, 1) + b"9", "split.no": struct.pack("<IQ", 8, 1) + b"1"}
        ),
        "number of a part that is a string",
    ),
    "gguf_part_name": Attack("x-00001-of-99999.gguf", _gguf((8, 8), 0), "part of a model of 99,999 files"),
    "gguf_metadata": Attack(
        "x.gguf",
        lambda folder: _gguf((8, 8), 0, config=struct.pack("<IQ", 8, 90_000_000) + b"\x01" * 90_000_000),
        "metadata of 90 MB, which JSON escapes to 540 MB",
    ),
}
