"""All that reads what others made. A door may refuse by one of our errors; anything else is a fault."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.calibration import CalibrationFile
from learned_rounding.quant_core.checkpoints import inspect_file, open_source, verify_file
from learned_rounding.quant_core.errors import QuantizationError
from learned_rounding.quant_core.migrate import migrate_file
from learned_rounding.quant_core.recipes.layers import layer_rules
from learned_rounding.quant_core.requantize import DecodedSource

__all__ = ["FILES", "TEXTS", "refused", "tried_all"]

OUT = "out.safetensors"
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
            known = statistics.inputs(layer)
            if known is not None:
                _ = known.gram, statistics.tokens(layer), statistics.sensitivity_of(layer)


FILES: dict[str, Callable[[Path], object]] = {
    "inspect": inspect_file,
    "verify": verify_file,
    "plan": lambda path: _planned(path),
    "quantize": _quantize,
    "requantize": _requantize,
    "migrate": lambda path: migrate_file(path, _out(path), overwrite=True),
    "calibration": _calibration,
}
TEXTS: dict[str, Callable[[str], object]] = {
    "layer config": lambda text: layer_rules((), text),
    "keep pattern": lambda text: layer_rules([text], ""),
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


def tried_all(path: Path) -> dict[str, QuantizationError | None]:
    """What each door says of a file; afterwards nothing but a finished output lies beside it."""
    beside = set(path.parent.iterdir())
    said = {name: refused(door, path) for name, door in FILES.items()}
    made = _out(path)
    if made.parent.exists():
        assert {entry.name for entry in made.parent.iterdir()} <= {OUT}
        if made.exists():
            verify_file(made)
            made.unlink()
        made.parent.rmdir()
    assert set(path.parent.iterdir()) == beside
    with contextlib.suppress(QuantizationError):
        open_source(path).close()
    return said
