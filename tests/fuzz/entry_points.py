"""All that reads what others made. A door may refuse by one of our errors; anything else is a fault."""

import atexit
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from learned_rounding.benchmarks.memory import peak_memory
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.calibration import CalibrationFile
from learned_rounding.quant_core.convert.dequantize import DecodedSource
from learned_rounding.quant_core.convert.migrate import migrate_file
from learned_rounding.quant_core.errors import QuantizationError
from learned_rounding.quant_core.formats.layer_json import layer_configs
from learned_rounding.quant_core.output import inspect_file, verify_file
from learned_rounding.quant_core.recipes.layers import parse_rules
from learned_rounding.quant_core.sources import SafetensorsFile, open_source

__all__ = ["FILES", "TEXTS", "bounded", "refused", "tried_all"]

OUT = "out.safetensors"
MEMORY, SECONDS = 300 << 20, 60  # what reading may take at most, of memory and of a processor
NEAREST = Recipe(rounding="nearest", preset="none")


def _out(path: Path) -> Path:
    return path.parent / "out" / OUT


def _quantize(path: Path) -> None:
    quantize_file(path, _out(path), NEAREST, device="cpu", overwrite=True)


def _requantize(path: Path) -> None:
    with open_source(path) as source:
        quantize_file(DecodedSource(source), _out(path), NEAREST, device="cpu", overwrite=True)


def _calibration(path: Path) -> None:
    with CalibrationFile(path) as statistics:
        for layer in [*statistics.layers, "a"]:
            known = statistics.layer_statistics(layer)
            if known is not None:
                _ = known.hessian, statistics.tokens(layer), statistics.sensitivity(layer)


@functools.cache
def _models() -> Path:
    """A folder with a sound model, and one in old scaled FP8, for calibrations of a layer "a" of 16 × 16."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    weight = torch.arange(256.0).view(16, 16)
    save_file({"a.weight": weight, "a.bias": torch.zeros(16)}, Path(folder.name) / "model.safetensors")
    old = {
        "a.weight": weight.to(torch.float8_e4m3fn),
        "a.scale_weight": torch.ones(()),
        "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
    }
    save_file(old, Path(folder.name) / "old.safetensors")
    return Path(folder.name)


def _calibrated(format: str) -> Callable[[Path], None]:
    def quantize(path: Path) -> None:
        with CalibrationFile(path) as statistics:
            recipe = Recipe(format=format, preset="none")
            quantize_file(
                _models() / "model.safetensors",
                _out(path),
                recipe,
                calibration=statistics,
                device="cpu",
                overwrite=True,
            )

    return quantize


def _migrate_calibrated(path: Path) -> None:
    with CalibrationFile(path) as statistics:
        migrate_file(_models() / "old.safetensors", _out(path), calibration=statistics, overwrite=True)


FILES: dict[str, Callable[[Path], object]] = {
    "inspect": inspect_file,
    "verify": verify_file,
    "plan": lambda path: _planned(path),
    "quantize": _quantize,
    "requantize": _requantize,
    "migrate": lambda path: migrate_file(path, _out(path), overwrite=True),
    "calibration": _calibration,
    "quantize with it, INT8": _calibrated("int8_tensorwise"),
    "quantize with it, FP8": _calibrated("float8_e4m3fn"),
    "quantize with it, measured": _calibrated("measured"),
    "migrate with it": _migrate_calibrated,
}
TEXTS: dict[str, Callable[[str], object]] = {
    "layer config": lambda text: parse_rules((), text),
    "keep pattern": lambda text: parse_rules([text], ""),
    "recipe in JSON": Recipe.from_json,
    "recipe in TOML": Recipe.from_toml,
}


def _planned(path: Path) -> None:
    with open_source(path) as source:
        NEAREST.plan(source)


def refused(door: Callable, thing: object) -> QuantizationError | None:
    """Our error that the door refuses it with; None where it takes it."""
    try:
        door(thing)
    except QuantizationError as error:
        assert str(error).strip() and len(str(error)) < 300_000
        return error
    return None


@contextmanager
def bounded() -> Iterator[None]:
    """What happens inside takes little memory of any kind, torch's too, and little time of the processor."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    began, before = time.process_time(), peak_memory()
    yield
    assert peak_memory() - before < MEMORY
    assert time.process_time() - began < SECONDS


def _check_problems(path: Path, problems: list[str]) -> None:
    """Problems concern only layers that were copied from the source, such as FP8 weights without a scale."""
    with SafetensorsFile(path) as made:
        quantized = set().union(*layer_configs(made))
    for problem in problems:
        assert ": " in problem and not any(problem.startswith(f"{layer}: ") for layer in quantized), problem


def tried_all(path: Path) -> dict[str, QuantizationError | None]:
    """What each door says of a file; afterwards nothing but a finished, sound output lies beside it."""
    beside, made, said = set(path.parent.iterdir()), _out(path), {}
    for name, door in FILES.items():
        said[name] = refused(door, path)
        if made.parent.exists():
            assert [entry.name for entry in made.parent.iterdir()] == [OUT] and said[name] is None
            problems = verify_file(made).problems
            if name.startswith("quantize"):
                _check_problems(made, problems)
            made.unlink()
            made.parent.rmdir()
    assert set(path.parent.iterdir()) == beside
    return said
