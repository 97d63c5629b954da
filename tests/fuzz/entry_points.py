"""Entry points that read untrusted files and texts. Each accepts its input or raises a QuantizationError; anything else is a fault."""

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

__all__ = ["FILES", "TEXTS", "limit_resources", "refusal", "try_all"]

OUT = "out.safetensors"
MEMORY, SECONDS = 300 << 20, 60  # limits of peak memory in bytes and of CPU time in s
NEAREST = Recipe(rounding="nearest", preset="none")


def _output_path(path: Path) -> Path:
    return path.parent / "out" / OUT


def _quantize(path: Path) -> None:
    quantize_file(path, _output_path(path), NEAREST, device="cpu", overwrite=True)


def _requantize(path: Path) -> None:
    with open_source(path) as source:
        quantize_file(DecodedSource(source), _output_path(path), NEAREST, device="cpu", overwrite=True)


def _read_calibration(path: Path) -> None:
    with CalibrationFile(path) as calibration:
        for layer in [*calibration.layers, "a"]:
            statistics = calibration.layer_statistics(layer)
            if statistics is not None:
                _ = statistics.hessian, calibration.tokens(layer), calibration.sensitivity(layer)


@functools.cache
def _make_models() -> Path:
    """Folder with an unquantized model and one in the older scaled FP8 layout; their layer "a" is 16 × 16."""
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


def _quantize_calibrated(format: str) -> Callable[[Path], None]:
    def quantize(path: Path) -> None:
        with CalibrationFile(path) as calibration:
            recipe = Recipe(format=format, preset="none")
            quantize_file(
                _make_models() / "model.safetensors",
                _output_path(path),
                recipe,
                calibration=calibration,
                device="cpu",
                overwrite=True,
            )

    return quantize


def _migrate_calibrated(path: Path) -> None:
    with CalibrationFile(path) as calibration:
        migrate_file(_make_models() / "old.safetensors", _output_path(path), calibration=calibration, overwrite=True)


def _plan(path: Path) -> None:
    with open_source(path) as source:
        NEAREST.plan(source)


FILES: dict[str, Callable[[Path], object]] = {
    "inspect": inspect_file,
    "verify": verify_file,
    "plan": _plan,
    "quantize": _quantize,
    "requantize": _requantize,
    "migrate": lambda path: migrate_file(path, _output_path(path), overwrite=True),
    "calibration": _read_calibration,
    "quantize with it, INT8": _quantize_calibrated("int8_tensorwise"),
    "quantize with it, FP8": _quantize_calibrated("float8_e4m3fn"),
    "quantize with it, measured": _quantize_calibrated("measured"),
    "migrate with it": _migrate_calibrated,
}
TEXTS: dict[str, Callable[[str], object]] = {
    "layer config": lambda text: parse_rules((), text),
    "keep pattern": lambda text: parse_rules([text], ""),
    "recipe in JSON": Recipe.from_json,
    "recipe in TOML": Recipe.from_toml,
}


def refusal(entry_point: Callable, value: object) -> QuantizationError | None:
    """Return the error with which the entry point refuses ``value``; None if it accepts it."""
    try:
        entry_point(value)
    except QuantizationError as error:
        assert str(error).strip()
        assert len(str(error)) <= 2000
        return error
    return None


@contextmanager
def limit_resources() -> Iterator[None]:
    """Check that the block stays below the limits of resident memory, including torch's, and of CPU time."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    start, before = time.process_time(), peak_memory()
    yield
    assert peak_memory() - before < MEMORY
    assert time.process_time() - start < SECONDS


def _check_problems(path: Path, problems: list[str]) -> None:
    """Check that problems concern only layers copied from the source, such as FP8 weights without a scale."""
    with SafetensorsFile(path) as output:
        quantized = set().union(*layer_configs(output))
    for problem in problems:
        assert ": " in problem, problem
        assert not any(problem.startswith(f"{layer}: ") for layer in quantized), problem


def try_all(path: Path) -> dict[str, QuantizationError | None]:
    """Pass a file to every entry point; returns the error of each, None if it accepts the file.

    Checks that an output exists only if the file was accepted, that it is valid, and that no other file is written.
    """
    before, output, errors = set(path.parent.iterdir()), _output_path(path), {}
    for name, entry_point in FILES.items():
        errors[name] = refusal(entry_point, path)
        if output.parent.exists():
            assert [entry.name for entry in output.parent.iterdir()] == [OUT]
            assert errors[name] is None
            problems = verify_file(output).problems
            if name.startswith("quantize"):
                _check_problems(output, problems)
            output.unlink()
            output.parent.rmdir()
    assert set(path.parent.iterdir()) == before
    return errors
