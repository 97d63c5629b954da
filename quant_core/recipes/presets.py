"""Presets: keep lists per model family, as data in ``presets/*.toml``.

A preset file has

* ``title``, and ``aliases``: other names of the preset;
* ``detect``: lists of marks; all marks of one list must match, and ``absent``: marks that must not match. A mark is a tensor
  name and optionally its shape, ``cap_embedder.1.weight 3840x*``. A preset without ``detect`` is used only by its name;
* ``blocks``: pattern of the layers that the preset covers, by default none; the plan reports layers to quantize that it
  does not cover;
* ``encoders``: text encoders of a checkpoint of this family that ComfyUI reads quantized, by the names of their parts (an
  empty name: the checkpoint has one text encoder, without a name); their rules are those of the preset that recognizes them;
* ``[[keep]]`` and ``[[remove]]``: rules of ``pattern`` and ``reason``, optionally ``cannot`` or ``table``, see :class:`Rule`;
* ``[[eight_bits]]``: rules for layers that take INT8 in formats of fewer bits;
* ``include``: presets whose rules come first.

A mark matches a whole name, a pattern the beginning of a name, both after the prefix of a checkpoint
(``model.diffusion_model.`` …); so neither matches a nested layer of another model by chance.
The general rule is ``_common.toml``, which applies to every model, and ``_general.toml``, which applies to models without a
preset.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UnknownNameError
from ..sources import TensorInfo
from .toml import tomllib

__all__ = [
    "ALIASES",
    "AUTO",
    "COMMON",
    "GENERAL",
    "NONE",
    "PRESETS",
    "START",
    "STARTS",
    "Mark",
    "Preset",
    "Rule",
    "find_preset",
    "matching_presets",
    "recognize_preset",
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
)  # name prefixes of the model in a checkpoint
_WORDS = r"\w+", r"\w{1,64}"  # in a pattern, and as it is searched for: in time linear in the length of a name
_PREFIXES = ("", *STARTS)
START = f"^(?:{'|'.join(map(re.escape, STARTS))})?"


@dataclass(frozen=True)
class Mark:
    """A tensor that identifies a family: its name, and its shape if that matters (None for any side)."""

    name: str
    shape: tuple[int | None, ...] | None

    @classmethod
    def parse(cls, text: str) -> "Mark":
        """From ``name`` or ``name 3840x*``."""
        name, _, shape = text.partition(" ")
        return cls(name, tuple(None if side == "*" else int(side) for side in shape.split("x")) if shape else None)

    def matches(self, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether one of the tensors has this name and shape."""
        found = (tensors[prefix + self.name] for prefix in _PREFIXES if prefix + self.name in tensors)
        return any(self.shape is None or _fits(info.shape, self.shape) for info in found)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    sides = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(each in (None, side) for side, each in sides)


@dataclass(frozen=True)
class Rule:
    """Tensors to keep or to remove, by the beginning of their names.

    Attributes:
        text: the pattern as in the preset file.
        pattern: the compiled pattern, for full tensor names.
        cannot: ComfyUI does not read such layers quantized, so no layer rule of the user overrides this rule.
        table: an embedding; ComfyUI reads its own formats there, not the formats that need this node pack.
    """

    text: str
    pattern: re.Pattern[str]
    reason: str
    cannot: bool = False
    table: bool = False

    @classmethod
    def parse(cls, rule: Mapping[str, Any]) -> "Rule":
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
    eight_bits: tuple[Rule, ...]
    blocks: re.Pattern[str]
    detect: tuple[tuple[Mark, ...], ...]
    absent: tuple[Mark, ...]
    encoders: tuple[str, ...]

    def matches(self, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the tensors are those of a model of this family."""
        found = any(all(mark.matches(tensors) for mark in marks) for marks in self.detect)
        return found and not any(mark.matches(tensors) for mark in self.absent)

    def covers_any(self, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the preset recognizes the tensors or covers one of their weights."""
        covered = (name for name, info in tensors.items() if len(info.shape) > 1 and self.blocks.search(name))
        return self.matches(tensors) or next(covered, None) is not None


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(f"{START}(?:{text.replace(*_WORDS)})")


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
        eight_bits=rules("eight_bits"),
        blocks=_pattern(data.get("blocks", "(?!)")),
        detect=tuple(tuple(map(Mark.parse, marks)) for marks in data.get("detect", ())),
        absent=tuple(map(Mark.parse, data.get("absent", ()))),
        encoders=tuple(data.get("encoders", ())),
    )


COMMON, GENERAL = _load("_common"), _load("_general")
PRESETS: Mapping[str, Preset] = {path.stem: _load(path.stem) for path in sorted(_FOLDER.glob("[!_]*.toml"))}
ALIASES: Mapping[str, Preset] = {alias: preset for preset in PRESETS.values() for alias in preset.aliases}


def find_preset(name: str) -> Preset:
    """The preset of that name or alias; :class:`UnknownNameError` for an unknown one."""
    known = {**PRESETS, **ALIASES}
    if name not in known:
        raise UnknownNameError("preset", name, (*known, AUTO, NONE))
    return known[name]


def matching_presets(tensors: Mapping[str, TensorInfo]) -> list[Preset]:
    """All presets whose marks are among these tensors."""
    return [preset for preset in PRESETS.values() if preset.matches(tensors)]


def recognize_preset(tensors: Mapping[str, TensorInfo]) -> Preset | None:
    """The preset of the family that these tensors belong to; None if none or several match."""
    matching = matching_presets(tensors)
    return matching[0] if len(matching) == 1 else None
