"""Times of linear layers on a card: measured here and cached, or measured on another machine by ``lrq bench --json``.

Every card has one JSON file in the folder ``cards`` of the cache folder (:func:`~learned_rounding.kernels.tuning.cache_file`).
That of this machine's card holds for the versions of torch, Triton, comfy-kitchen and this package that it was measured with.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...kernels.tuning import cache_file, measure_milliseconds, package_version, replace_json
from ..display import describe_cause
from ..errors import QuantizationError, RecipeError
from ..formats import Codec
from ..formats.cards import parse_card
from ..version import VERSION
from .kitchen_layers import kitchen_version
from .layer_time import TOKENS, Timer, measure_layer

__all__ = ["UNQUANTIZED", "CardTimes", "add_card", "cards_folder", "find_card", "present_card"]

log = logging.getLogger(__name__)

UNQUANTIZED = "bfloat16"  # in place of a codec

Shape = tuple[int, int]
"""(out, in) of a weight."""


@dataclass
class CardTimes:
    """Times of layers on one card.

    Attributes:
        card: name of the GPU.
        capability: compute capability, as "8.9".
        versions: of the software that was measured.
        tokens: of a call.
        times: (codec as text or :data:`UNQUANTIZED`, shape of the weight) → ms; None: nothing there runs such a layer.
        measure: measures what ``times`` lacks; None for a card of another machine.
    """

    card: str
    capability: str
    versions: dict[str, str]
    tokens: int = TOKENS
    times: dict[tuple[str, Shape], float | None] = field(default_factory=dict)
    measure: Callable[[Codec | None, Shape], float | None] | None = None

    def find(self, codec: Codec | None, shape: Shape) -> float | None:
        """Time in ms of a layer in this format; None where it is not measured. A new measurement is written to the cache."""
        key = UNQUANTIZED if codec is None else str(codec), shape
        if key not in self.times and self.measure is not None:
            self.times[key] = self.measure(codec, shape)
            _save(self)
        return self.times.get(key)

    def to_dict(self) -> dict[str, object]:
        """What ``lrq bench --json`` prints; ratios are those to bfloat16."""
        return {
            "card": self.card,
            "capability": self.capability,
            "versions": self.versions,
            "tokens": self.tokens,
            "layers": [
                {
                    "format": name,
                    "out": shape[0],
                    "in": shape[1],
                    "milliseconds": time,
                    "ratio": self._ratio(time, shape),
                }
                for (name, shape), time in self.times.items()
            ],
        }

    def _ratio(self, time: float | None, shape: Shape) -> float | None:
        whole = self.times.get((UNQUANTIZED, shape))
        return round(time / whole, 4) if time and whole else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CardTimes":
        """Inverse of :meth:`to_dict`. Raises ValueError, KeyError or TypeError for anything else."""
        parse_card(values["capability"])
        times = {
            (str(layer["format"]), (int(layer["out"]), int(layer["in"]))): _positive(layer["milliseconds"])
            for layer in values["layers"]
        }
        versions = {str(name): str(text) for name, text in values["versions"].items()}
        return cls(str(values["card"]), values["capability"], versions, int(values["tokens"]), times)


def _positive(milliseconds: Any) -> float | None:
    if milliseconds is None:
        return None
    if isinstance(milliseconds, bool) or not 0 < float(milliseconds) < float("inf"):
        raise ValueError(f"a time of {milliseconds!r} ms")
    return float(milliseconds)


def cards_folder() -> Path:
    """The folder of the JSON files, which may not exist."""
    return cache_file().parent / "cards"


def add_card(file: Path) -> CardTimes:
    """Copy the measurements of another machine, which ``lrq bench --json`` printed, into the folder.

    Raises:
        QuantizationError: the file cannot be read, or the folder not be written.
    """
    times = _load(file)
    if error := _write(times):
        raise QuantizationError(f"The measurements cannot be written to {cards_folder()}: {error.strerror or error}.")
    return times


def present_card(device: torch.device, timer: Timer = measure_milliseconds) -> CardTimes:
    """Times on a GPU of this machine: those of the cache, and a function that measures the others."""
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    times = CardTimes(name, f"{major}.{minor}", _find_versions())
    path = _path(times)
    for known in _load_all([path] if path.exists() else []):
        if (known.versions, known.tokens) == (times.versions, times.tokens):
            times = known
    times.measure = partial(measure_layer, device=device, capability=(major, minor), timer=timer)
    return times


def find_card(card: str | None, device: torch.device, *, measure: bool) -> CardTimes | None:
    """Times on the card that a model is for, see :class:`~..recipes.Recipe`; None where there are none.

    Args:
        card: compute capability; None for that of ``device``.
        measure: measure what is missing if it is the card of ``device``; otherwise only the cache is read.

    Raises:
        RecipeError: nothing is measured and nothing can be, or several cards of that capability are; only with ``measure``.
    """
    if device.type == "cuda" and (card is None or parse_card(card) == torch.cuda.get_device_capability(device)):
        times = present_card(device)
        if not measure:
            times.measure = None
        return times
    found = [times for times in _load_all(sorted(cards_folder().glob("*.json"))) if times.capability == card]
    if len(found) == 1:
        return found[0]
    if not measure:
        return None
    if card is None:
        raise RecipeError(
            "target_time needs the times of a card, and this run has no GPU; name a card that was added with lrq bench --add, "
            "or leave it out.",
            option="target_time",
        )
    if not found:
        raise RecipeError(
            f"target_time needs the times of a card of SM {card}, which is not this machine's and was not measured: run lrq "
            "bench --json on such a card and add the file here with lrq bench --add, or leave target_time out.",
            option="target_time",
        )
    names = " and ".join(sorted(times.card for times in found))
    raise RecipeError(
        f"target_time does not know which card of SM {card} is meant, {names}; keep the file of one in {cards_folder()}.",
        option="target_time",
    )


def _find_versions() -> dict[str, str]:
    return {
        "learned_rounding": VERSION,
        "torch": torch.__version__,
        "comfy-kitchen": kitchen_version() or "none",
        "triton": package_version("triton"),
    }


def _path(times: CardTimes) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", times.card.lower()).strip("-") or "card"
    return cards_folder() / f"{name}.json"


def _load_all(paths: Iterable[Path]) -> Iterator[CardTimes]:
    """The files that can be read; the log names the others."""
    for path in paths:
        try:
            yield _load(path)
        except QuantizationError as error:
            log.warning("%s", error)


def _load(path: Path) -> CardTimes:
    """Raises QuantizationError where the file is not one of ``lrq bench --json``."""
    try:
        return CardTimes.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise QuantizationError(
            f"The measurements {path} cannot be read: {error.strerror or error}.", file=str(path)
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QuantizationError(
            f"{path} does not contain the measurements that lrq bench --json prints ({describe_cause(error)}); make it "
            "again, or remove it.",
            file=str(path),
        ) from error


def _save(times: CardTimes) -> None:
    if error := _write(times):
        log.warning("Cannot write measurements of layers to %s: %s; every run repeats them.", cards_folder(), error)


def _write(times: CardTimes) -> OSError | None:
    """Replace the card's file atomically; returns the error if that fails."""
    try:
        replace_json(_path(times), times.to_dict(), indent=1)
    except OSError as error:
        return error
    return None
