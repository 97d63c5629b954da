"""What was measured once on this machine, and is remembered in a file of the user's cache folder.

Times depend on the card, on torch and Triton, and on the shape of a product; the number of tokens counts as the next
power of two, so that another prompt length measures nothing anew.
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

__all__ = ["CACHE_VARIABLE", "cache_file", "fastest", "fastest_backend", "shape_key"]

log = logging.getLogger(__name__)

CACHE_VARIABLE = "LEARNED_ROUNDING_CACHE"
LARGEST_BUCKET = 16384


def cache_file() -> Path:
    """Where measurements are kept: a folder of the environment's choice, else that of the user's caches."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder) / "kernels.json"
    parent = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return (Path(parent) if parent else Path.home() / ".cache") / "learned_rounding" / "kernels.json"


@functools.cache
def _machine(device: torch.device) -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton}"


@functools.cache
def _remembered(file: Path) -> dict[str, object]:
    """What the file holds; an unreadable one holds nothing, measuring again repairs it."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(file: Path, key: str, value: object) -> None:
    """Add to the file what it does not hold yet; others may have written meanwhile."""
    known = _remembered(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        on_disk = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError):
        on_disk = {}
    known.update(on_disk if isinstance(on_disk, dict) else {})
    known[key] = value
    try:
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as target:
            json.dump(known, target, indent=0, sort_keys=True)
        os.replace(target.name, file)
    except OSError as error:
        log.warning("Kernel measurements cannot be kept in %s: %s.", file, error)


def bucket(rows: int) -> int:
    """The number of tokens a measurement is made for: the next power of two, from 16 on."""
    return min(max(1 << (rows - 1).bit_length(), 16), LARGEST_BUCKET)


def shape_key(what: str, x: torch.Tensor, codes: torch.Tensor, *details) -> str:
    """The name of a measurement: what was compared, on which machine, for which product."""
    rows, (columns, inner) = bucket(x.shape[0]), codes.shape
    parts = (what, _machine(x.device), f"{rows}x{columns}x{inner}", x.dtype, codes.dtype, *details)
    return "; ".join(map(str, parts))


def _milliseconds(call: Callable[[], object], runs: int = 10) -> float:
    """The median of a few runs on the device, after two that are not counted.

    The device first idles for ten milliseconds, in which the runs queue up: their launches do not count.
    """
    for _ in range(2):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    torch.cuda._sleep(20_000_000)
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    times = sorted(start.elapsed_time(stop) for start, stop in itertools.pairwise(marks))
    return times[runs // 2]


def fastest(key: str, names: Sequence[str], run: Callable[[str], object]) -> str:
    """The name whose ``run(name)`` takes least time; remembered under ``key``.

    A run that the card has no room for drops out. While a CUDA graph is captured nothing can be measured: the first name.
    """
    file = cache_file()
    known = _remembered(file).get(key)
    if known in names:
        return known
    if len(names) == 1 or torch.cuda.is_current_stream_capturing():
        return names[0]
    times = {}
    for name in names:
        try:
            times[name] = _milliseconds(lambda name=name: run(name))
        except Exception as error:  # out of shared memory, or a product this torch does not have: another one will do
            log.debug("%s cannot run %s: %s", key, name, error)
    if not times:
        return names[0]
    best = min(times, key=times.get)
    log.info("Measured %s: %s.", key, ", ".join(f"{name} {time:.3f} ms" for name, time in times.items()))
    _remember(file, key, best)
    return best


def fastest_backend(names, entries, arguments) -> str:
    """The fastest of the implementations ``names`` for a linear layer with these arguments; autotuning is never chosen."""
    names = [name for name in names if name not in ("autotuned", "reference")]
    x, codes, _, bias, block_size, rotate_by, out_dtype = arguments
    key = shape_key("backend", x, codes, block_size, rotate_by, out_dtype)
    return fastest(key, names, lambda name: entries[name].load()(*arguments))
