"""Results of compilations between runs, so that an unchanged kernel is not compiled again.

One JSON file per SM in the cache folder of the kernels: {key: result}. A key has everything that a result depends on. Only
results of finished compilations are stored, and they are checked in every run as new ones are: a configuration that does
not compile has no entry, and one that spills fails from its entry as well.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from learned_rounding.kernels.tuning import cache_file, replace_json

__all__ = ["CompileCache", "compile_cache_file", "make_key"]

FIELDS = {"registers": int, "spilled": int, "shared": int, "products": list}  # of a result


def compile_cache_file(sm: int) -> Path:
    """Path of the results of one SM."""
    return cache_file().parent / "compiled" / f"sm{sm}.json"


def make_key(*parts: object) -> str:
    """Key of what a result depends on: source of the kernel, configuration, compiler and its version."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class CompileCache:
    """The results of a file; those that a run does not ask for are dropped when it is saved.

    Args:
        file: may be missing or damaged.
    """

    def __init__(self, file: Path):
        self.file, self.hits, self._used = file, 0, {}
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = {}
        self._stored = stored if isinstance(stored, dict) else {}

    def find(self, key: str, compile: Callable[[], dict]) -> dict:
        """The stored result, or that of ``compile()``. What it raises is not stored."""
        result = self._stored.get(key)
        if _is_result(result):
            self.hits += 1
        else:
            result = compile()
        self._used[key] = result
        return result

    def save(self) -> None:
        """Replace the file by the results of this run."""
        replace_json(self.file, self._used, indent=0)


def _is_result(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == FIELDS.keys()
        and all(type(value[name]) is kind for name, kind in FIELDS.items())
    )
