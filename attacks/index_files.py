"""Hostile indexes of sharded models."""

import json

from .attack import DEEP_JSON, Attack

__all__ = ["INDEXES"]


def _index(*files: str) -> bytes:
    return json.dumps({"weight_map": {f"t{number}.weight": file for number, file in enumerate(files)}}).encode()


INDEXES = {
    "index_parent_folder": Attack(
        "x.safetensors.index.json", _index("../secret.safetensors"), "index that refers to the parent folder"
    ),
    "index_absolute": Attack("x.safetensors.index.json", _index("/etc/passwd"), "index that refers to a system file"),
    "index_windows": Attack(
        "x.safetensors.index.json",
        _index("..\\secret.safetensors"),
        "index that refers to the parent folder with a backslash",
    ),
    "index_itself": Attack(
        "x.safetensors.index.json", _index("x.safetensors.index.json"), "index that refers to itself as a shard"
    ),
    "index_null": Attack("x.safetensors.index.json", _index("a\0b"), "null character in the name of a shard"),
    "index_deep": Attack("x.safetensors.index.json", b'{"weight_map":' + DEEP_JSON, "index nested 100,000 levels deep"),
    "index_large": Attack(
        "x.safetensors.index.json",
        lambda folder: b'{"weight_map":[' + b"{}," * 7_000_000 + b"0]}",
        "index of seven million values",
    ),
    "index_lists": Attack(
        "x.safetensors.index.json",
        lambda folder: b'{"weight_map":[' + (b"[" * 900 + b"]" * 900 + b",") * 8_000 + b"0]}",
        "the same with fewer commas",
    ),
    "index_many": Attack(
        "x.safetensors.index.json",
        lambda folder: _index(*(f"{index}.safetensors" for index in range(50_000))),
        "index of 50,000 shards",
    ),
}
