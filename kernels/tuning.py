"""Measure the fastest implementation or launch configuration once, and cache the result in the user's cache folder.

A result holds for a GPU, torch version, Triton version and GEMM shape. The number of tokens is rounded up, so that
another prompt length does not start a new measurement.
"""

import functools
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = [
    "CACHE_VARIABLE",
    "cache_file",
    "fastest",
    "fastest_backend",
    "measure_milliseconds",
    "package_version",
    "replace_json",
    "shape_key",
]

log = logging.getLogger(__name__)

CACHE_VARIABLE = "LEARNED_ROUNDING_CACHE"
LARGEST_BUCKET = 16384


def cache_file() -> Path:
    """Path of the measurement cache: in the folder that ``CACHE_VARIABLE`` names, else in the user's cache folder."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder) / "kernels.json"
    parent = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME")  # the first is set on Windows only
    return (Path(parent) if parent else Path.home() / ".cache") / "learned_rounding" / "kernels.json"


@functools.cache
def _describe_machine(device: torch.device) -> str:
    """GPU name and library versions, as part of a cache key."""
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {package_version('triton')}"


def package_version(name: str) -> str:
    """Version of an installed package; "none" where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


@functools.cache
def _load_cache(file: Path) -> dict[str, object]:
    """Read the cache file once per process; an unreadable file counts as empty and is rewritten by the next result."""
    return _read_cache(file)


def _read_cache(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _store_result(file: Path, key: str, value: object) -> None:
    """Add a result to the cache file; entries that other processes have written meanwhile are kept."""
    cache = _load_cache(file)
    cache.update(_read_cache(file))
    cache[key] = value
    try:
        replace_json(file, dict(sorted(cache.items())), indent=0)
    except OSError as error:
        log.warning(
            "Cannot write kernel measurements to %s: %s; set %s to a writable folder, or every process repeats them.",
            file,
            error,
            CACHE_VARIABLE,
        )


def replace_json(file: Path, value: object, *, indent: int) -> None:
    """Write a value as JSON, replacing the file atomically; its folder is made if it does not exist.

    Raises:
        OSError: the file cannot be written, or another process has it open, on Windows. It is left as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as target:
        json.dump(value, target, indent=indent)
    try:
        os.replace(target.name, file)
    except OSError:
        os.unlink(target.name)
        raise


def bucket(rows: int) -> int:
    """Number of tokens in a cache key, rounded up: to a power of two from 16 on, from 1024 on to a quarter of one.

    The first number of tokens that comes up is measured, for all of its bucket; ``LARGEST_BUCKET`` is the last one.
    """
    power = 1 << max(rows - 1, 0).bit_length()
    step = power // 8 if power > 1024 else power
    return min(max(-(-rows // step) * step, 16), LARGEST_BUCKET)


def shape_key(kind: str, x: torch.Tensor, qdata: torch.Tensor, *details) -> str:
    """Cache key of a measurement: what is compared, machine, GEMM shape, dtypes and further details."""
    rows, (columns, inner) = bucket(x.shape[0]), qdata.shape
    parts = (kind, _describe_machine(x.device), f"{rows}x{columns}x{inner}", x.dtype, qdata.dtype, *details)
    return "; ".join(map(str, parts))


def measure_milliseconds(call: Callable[[], object], runs: int = 20) -> float:
    """Median time of ``runs`` consecutive calls in ms, after three warm-up calls.

    It is the time on the device or that on the host, whichever is longer: a model whose host is late waits for it.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    times = sorted(start.elapsed_time(stop) for start, stop in itertools.pairwise(marks))
    return times[runs // 2]


def fastest(key: str, names: Sequence[str], run: Callable[[str], object]) -> str:
    """Return the name whose ``run(name)`` takes the least time; the result is cached under ``key``.

    A run that raises is skipped; the result is not cached if it ran out of memory, which it may not do another time. During
    CUDA graph capture nothing can be measured, and the first name is returned.
    """
    file = cache_file()
    cached = _load_cache(file).get(key)
    if isinstance(cached, str) and cached in names:
        return cached
    if len(names) == 1 or torch.cuda.is_current_stream_capturing():
        return names[0]
    times, complete = {}, True
    for name in names:
        try:
            times[name] = measure_milliseconds(lambda name=name: run(name))
        except torch.OutOfMemoryError:
            complete = False
        except Exception as error:  # out of shared memory, or a product that this torch does not have
            log.debug("%s cannot run %s: %s", key, name, error)
    if not times:
        return names[0]
    best = min(times, key=lambda name: times[name])
    log.info("Measured %s: %s.", key, ", ".join(f"{name} {time:.3f} ms" for name, time in times.items()))
    if complete:
        _store_result(file, key, best)
    return best


def fastest_backend(names, entries, arguments) -> str:
    """Return the fastest implementation among ``names`` for a linear layer; never "autotuned" or "reference"."""
    names = [name for name in names if name not in ("autotuned", "reference")]
    x, qdata, _, _, block_size, rotate_by, out_dtype = arguments
    prepare = functools.cache(lambda name: entries[name].load()(*arguments))
    key = shape_key("layer", x, qdata, block_size, rotate_by, out_dtype)
    return fastest(key, names, lambda name: prepare(name)(*arguments[:4]))
