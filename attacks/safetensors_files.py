"""Hostile safetensors files: headers, names and weights."""

import json
import struct

from .attack import DEEP_JSON, Attack

__all__ = ["SAFETENSORS", "header_entry", "one_tensor", "safetensors", "tensors_file"]


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file; ``header``: a JSON value or raw bytes; ``length``: the declared header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one_tensor(entry: object, data: bytes = b"", name: str = "a.weight", **metadata: str) -> bytes:
    """Return a file with one header entry."""
    return safetensors({"__metadata__": metadata, name: entry} if metadata else {name: entry}, data)


def tensors_file(tensors: dict[str, tuple[str, list, bytes]], **metadata: str) -> bytes:
    """Return a file of tensors: name → (dtype, shape, bytes)."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, shape, values) in tensors.items():
        header[name] = header_entry(dtype, shape, len(data), len(data) + len(values))
        data += values
    return safetensors(header, data)


F32_ENTRY = header_entry("F32", [8, 8], 0, 256)

SAFETENSORS = {
    "length_beyond_file": Attack(
        "x.safetensors",
        safetensors({}, length=2**40),
        "header length beyond the end of the file, to force a large allocation",
    ),
    "length_of_64_bits": Attack(
        "x.safetensors", safetensors({}, length=2**64 - 1), "header length of 2⁶⁴ - 1, to overflow a sum"
    ),
    "length_zero": Attack("x.safetensors", safetensors({}, length=0), "empty header"),
    "header_deep": Attack(
        "x.safetensors", safetensors(b'{"a":' + DEEP_JSON), "JSON nested 100,000 levels deep, to exhaust the stack"
    ),
    "header_lists": Attack(
        "x.safetensors",
        lambda folder: safetensors(b'{"a":[' + (b"[" * 900 + b"]" * 900 + b",") * 8_000 + b"0]}"),
        "seven million JSON lists separated by few commas",
    ),
    "header_list": Attack("x.safetensors", safetensors(b'{"a.weight":[1,2]}'), "header entry that is not an object"),
    "header_not_utf8": Attack("x.safetensors", safetensors(b'{"\xff":1}'), "tensor name that is not UTF-8"),
    "header_surrogate": Attack(
        "x.safetensors",
        one_tensor(F32_ENTRY, bytes(256), "a\ud800.weight"),
        "unpaired surrogate in a tensor name, which cannot be encoded as UTF-8",
    ),
    "header_huge_number": Attack(
        "x.safetensors",
        safetensors(b'{"a.weight":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
        "dimension of 5,000 digits",
    ),
    "metadata_number": Attack(
        "x.safetensors", safetensors({"__metadata__": {"a": 1}}), "metadata value that is not a string"
    ),
    "name_twice": Attack(
        "x.safetensors",
        safetensors(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        "duplicate tensor name, which two readers resolve differently",
    ),
    "many_entries": Attack(
        "x.safetensors",
        safetensors(b'{"a":{}' + b"".join(b',"%d":{}' % index for index in range(20_000)) + b"}"),
        "20,000 empty header entries",
    ),
    "offsets_overlap": Attack(
        "x.safetensors",
        safetensors({"a": header_entry("U8", [8], 0, 8), "b": header_entry("U8", [8], 4, 12)}, bytes(12)),
        "two tensors that share bytes",
    ),
    "offsets_hole": Attack(
        "x.safetensors",
        safetensors({"a": header_entry("U8", [4], 0, 4), "b": header_entry("U8", [4], 8, 12)}, bytes(12)),
        "unused bytes between two tensors",
    ),
    "offsets_beyond": Attack(
        "x.safetensors",
        one_tensor(header_entry("U8", [2**40], 0, 2**40), bytes(8)),
        "tensor of 1 TB in a file of a few bytes",
    ),
    "offsets_negative": Attack(
        "x.safetensors", one_tensor(header_entry("U8", [8], -8, 0), bytes(8)), "negative data offset"
    ),
    "offsets_float": Attack(
        "x.safetensors", one_tensor(header_entry("U8", [8], 0.0, 8.0), bytes(8)), "data offsets that are not integers"
    ),
    "shape_overflow": Attack(
        "x.safetensors",
        one_tensor(header_entry("U8", [2**32, 2**32, 0], 0, 0)),
        "dimensions whose product overflows 64 bits before a zero",
    ),
    "shape_overflow_second": Attack(
        "x.safetensors",
        tensors_file({"a.weight": ("F32", [8, 8], bytes(256)), "b.weight": ("F32", [2**32, 2**32, 0], b"")}),
        "the same next to a valid weight",
    ),
    "shape_product": Attack(
        "x.safetensors", one_tensor(header_entry("U8", [2**63, 2], 0, 0)), "dimensions whose product is 0 modulo 2⁶⁴"
    ),
    "shape_rank": Attack(
        "x.safetensors", one_tensor(header_entry("U8", [1] * 10_000, 0, 1), b"x"), "10,000 dimensions"
    ),
    "shape_bool": Attack("x.safetensors", one_tensor(header_entry("U8", [True], 0, 1), b"x"), "true as a dimension"),
    "data_trailing": Attack(
        "x.safetensors",
        one_tensor(header_entry("U8", [1], 0, 1), b"x" * 1000),
        "data after the last tensor, to hide a second file",
    ),
    "name_path": Attack(
        "x.safetensors", one_tensor(F32_ENTRY, bytes(256), "../../etc/passwd.weight"), "path as a tensor name"
    ),
    "name_empty": Attack("x.safetensors", one_tensor(F32_ENTRY, bytes(256), ""), "empty tensor name"),
    "name_control": Attack(
        "x.safetensors",
        one_tensor(F32_ENTRY, bytes(256), "\x1b[2J\r\n\0.weight"),
        "terminal control characters in a tensor name",
    ),
    "name_long": Attack(
        "x.safetensors",
        one_tensor(F32_ENTRY, bytes(256), "blocks." * 20_000 + "weight"),
        "tensor name of 140,000 characters, to slow down pattern matching",
    ),
    "name_longest": Attack(
        "x.safetensors",
        one_tensor(F32_ENTRY, bytes(256), "\0." * 499 + "a.weight"),
        "tensor name of the greatest length, of control characters that are printed escaped",
    ),
    "many_tensors": Attack(
        "x.safetensors",
        lambda folder: safetensors({f"a.{index}.weight": header_entry("F32", [0, 8], 0, 0) for index in range(20_000)}),
        "20,000 empty tensors",
    ),
    "metadata_large": Attack(
        "x.safetensors",
        lambda folder: one_tensor(F32_ENTRY, bytes(256), note="x" * 30_000_000),
        "metadata value of 30 MB",
    ),
    "metadata_many": Attack(
        "x.safetensors",
        lambda folder: one_tensor(F32_ENTRY, bytes(256), **{f"key {index}": "" for index in range(50_000)}),
        "50,000 metadata keys",
    ),
    "weights_nan": Attack(
        "x.safetensors", one_tensor(F32_ENTRY, struct.pack("<f", float("nan")) * 64), "weights of NaN only"
    ),
    "weights_huge": Attack(
        "x.safetensors", one_tensor(F32_ENTRY, struct.pack("<f", 3e38) * 64), "weights close to the maximum of float32"
    ),
    "dtype_below_a_byte": Attack(
        "x.safetensors", one_tensor(header_entry("F4", [8, 8], 0, 32), bytes(32)), "tensor of dtype F4"
    ),
    "shard_alone": Attack(
        "x-00001-of-00002.safetensors", one_tensor(F32_ENTRY, bytes(256)), "one of two shards, without the other one"
    ),
}
