"""Presets: keep lists per model family, as data in ``presets/*.toml``.

A preset file has

* ``title``, and ``aliases``: other names of the preset;
* ``detect``: lists of marks, one of which must be there whole, and ``absent``: marks that must not be. A mark is a tensor's name and
  perhaps its shape, ``cap_embedder.1.weight 3840x*``. Without ``detect`` a preset is taken only by its name;
* ``blocks``: the layers that make up the model; a layer to quantize elsewhere is unknown to the preset, and the plan says so;
* ``encoders``: text encoders in which ComfyUI looks for quantized layers when they lie in a checkpoint beside such a model, by
  the names of their parts; their rules are those of the preset that recognises them;
* ``[[keep]]`` and ``[[remove]]``: rules of ``pattern`` and ``reason``, and perhaps ``cannot`` or ``table``, see :class:`Rule`;
* ``include``: presets whose rules come first.

A mark is the whole name and a pattern a regular expression for its beginning, both less what a checkpoint puts before the
names of its model (``model.diffusion_model.`` …); so neither can hit a layer deeper in another model by chance.
``_common.toml`` holds for every model, ``_general.toml`` beside it for those that no preset is for: both are the general rule.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import UnknownNameError
from ..sources import TensorInfo
from .toml import tomllib

__all__ = [
    "ALIASES",
    "AUTO",
    "NONE",
    "COMMON",
    "GENERAL",
    "PRESETS",
    "STARTS",
    "Mark",
    "Preset",
    "Rule",
    "find_preset",
    "recognise",
]

AUTO = "auto"
NONE = "none"
_FOLDER = Path(__file__).parent / "presets"
STARTS = (
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "model.",
    "net.",
)  # before the names of a checkpoint's model
_PREFIXES = ("", *STARTS)
_START = f"^(?:{'|'.join(map(re.escape, STARTS))})?"


@dataclass(frozen=True)
class Mark:
    """A tensor by which a family is known: its name, and its shape if that matters (None for any side)."""

    name: str
    shape: tuple[int | None, ...] | None

    @classmethod
    def parse(cls, text: str) -> "Mark":
        """From ``name`` or ``name 3840x*``."""
        name, _, shape = text.partition(" ")
        return cls(name, tuple(None if side == "*" else int(side) for side in shape.split("x")) if shape else None)

    def there(self, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the tensors have it."""
        found = (tensors[prefix + self.name] for prefix in _PREFIXES if prefix + self.name in tensors)
        return any(self.shape is None or self._has_shape(info.shape) for info in found)

    def _has_shape(self, shape: tuple[int, ...]) -> bool:
        sides = zip(shape, self.shape, strict=False)
        return len(shape) == len(self.shape) and all(wanted in (None, side) for side, wanted in sides)


@dataclass(frozen=True)
class Rule:
    """Tensors by the beginning of their names, and why they are kept or removed.

    Attributes:
        text: the pattern as the preset has it.
        pattern: to be searched in full tensor names.
        cannot: ComfyUI does not read such layers quantized, so that no rule of a user's own may ask for it.
        table: an embedding, which ComfyUI looks rows up in: it reads formats of its own there, and none of ours.
    """

    text: str
    pattern: re.Pattern[str]
    reason: str
    cannot: bool = False
    table: bool = False

    @classmethod
    def parse(cls, rule: Mapping[str, object]) -> "Rule":
        """From an entry of a preset file."""
        flags = {key: value for key, value in rule.items() if key != "pattern"}
        return cls(rule["pattern"], _pattern(rule["pattern"]), **flags)


@dataclass(frozen=True)
class Preset:
    """Rules for one model family; see the module's docstring."""

    name: str
    title: str
    aliases: tuple[str, ...]
    keep: tuple[Rule, ...]
    remove: tuple[Rule, ...]
    blocks: re.Pattern[str]
    detect: tuple[tuple[Mark, ...], ...]
    absent: tuple[Mark, ...]
    encoders: tuple[str, ...]

    def fits(self, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the tensors are those of this family."""
        found = any(all(mark.there(tensors) for mark in marks) for marks in self.detect)
        return found and not any(mark.there(tensors) for mark in self.absent)


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(f"{_START}(?:{text})")


@cache
def _load(name: str) -> Preset:
    data = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    included = [_load(other) for other in data.get("include", ())]

    def rules(kind: str) -> tuple[Rule, ...]:
        own = tuple(map(Rule.parse, data.get(kind, ())))
        return tuple(rule for preset in included for rule in getattr(preset, kind)) + own

    return Preset(
        name=name,
        title=data["title"],
        aliases=tuple(data.get("aliases", ())),
        keep=rules("keep"),
        remove=rules("remove"),
        blocks=_pattern(data.get("blocks", "")),
        detect=tuple(tuple(map(Mark.parse, marks)) for marks in data.get("detect", ())),
        absent=tuple(map(Mark.parse, data.get("absent", ()))),
        encoders=tuple(data.get("encoders", ())),
    )


COMMON, GENERAL = _load("_common"), _load("_general")
PRESETS: Mapping[str, Preset] = {path.stem: _load(path.stem) for path in sorted(_FOLDER.glob("[!_]*.toml"))}
ALIASES: Mapping[str, Preset] = {alias: preset for preset in PRESETS.values() for alias in preset.aliases}


def find_preset(name: str) -> Preset:
    """The preset of that name or alias, or :class:`UnknownNameError` with the nearest known one."""
    known = {**PRESETS, **ALIASES}
    if name not in known:
        raise UnknownNameError("preset", name, (*known, AUTO, NONE))
    return known[name]


def recognise(tensors: Mapping[str, TensorInfo]) -> Preset | None:
    """The one preset whose family these tensors belong to; None when none or several fit."""
    fitting = [preset for preset in PRESETS.values() if preset.fits(tensors)]
    return fitting[0] if len(fitting) == 1 else None
