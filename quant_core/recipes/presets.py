"""Presets: keep lists per model family, as data in ``presets/*.toml``.

A preset file has ``title``; ``detect``, a list of lists of tensor names, one of which must be there whole (with or
without a checkpoint's prefix); ``absent``, names that must not be; ``include``, other presets whose rules come
first; and ``[[keep]]`` / ``[[remove]]`` rules of ``pattern`` (regular expression, searched in the full tensor
name) and ``reason``. ``common.toml`` is the general rule and holds for every model.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import UnknownNameError
from .toml import tomllib

__all__ = ["AUTO", "NONE", "COMMON", "PRESETS", "Preset", "Rule", "find_preset", "recognise"]

AUTO = "auto"
NONE = "none"
_FOLDER = Path(__file__).parent / "presets"
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")


@dataclass(frozen=True)
class Rule:
    """A pattern searched in full tensor names, and why what it finds is kept or removed."""

    pattern: re.Pattern[str]
    reason: str


@dataclass(frozen=True)
class Preset:
    """Rules for one model family; see the module's docstring."""

    name: str
    title: str
    keep: tuple[Rule, ...]
    remove: tuple[Rule, ...]
    detect: tuple[tuple[str, ...], ...]
    absent: tuple[str, ...]

    def fits(self, names: Iterable[str]) -> bool:
        """Whether the tensor names are those of this family."""
        names = set(names)

        def there(key: str) -> bool:
            return any(prefix + key in names for prefix in _PREFIXES)

        return any(all(map(there, keys)) for keys in self.detect) and not any(map(there, self.absent))


@cache
def _load(name: str) -> Preset:
    data = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    included = [_load(other) for other in data.get("include", ())]

    def rules(kind: str) -> tuple[Rule, ...]:
        own = tuple(Rule(re.compile(rule["pattern"]), rule["reason"]) for rule in data.get(kind, ()))
        return tuple(rule for preset in included for rule in getattr(preset, kind)) + own

    return Preset(
        name=name,
        title=data["title"],
        keep=rules("keep"),
        remove=rules("remove"),
        detect=tuple(map(tuple, data.get("detect", ()))),
        absent=tuple(data.get("absent", ())),
    )


COMMON = _load("common")
PRESETS: Mapping[str, Preset] = {
    path.stem: _load(path.stem)
    for path in sorted(_FOLDER.glob("*.toml"))
    if path.stem != COMMON.name and _load(path.stem).detect
}


def find_preset(name: str) -> Preset:
    """The preset of that name, or :class:`UnknownNameError` with the nearest known one."""
    if name not in PRESETS:
        raise UnknownNameError("preset", name, (*PRESETS, AUTO, NONE))
    return PRESETS[name]


def recognise(names: Iterable[str]) -> Preset | None:
    """The one preset whose family these tensor names belong to; None when none or several fit."""
    names = set(names)
    fitting = [preset for preset in PRESETS.values() if preset.fits(names)]
    return fitting[0] if len(fitting) == 1 else None
