"""The plan: one decision for every tensor of a source, made from names and shapes alone."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..cancellation import CancelCheck
from ..display import human_bytes
from ..errors import AlreadyQuantizedError, NothingToQuantizeError
from ..formats import FORMATS
from ..formats.detect import BITSANDBYTES, quantized_formats
from ..formats.scales import BLOCK_SIZE
from ..sources import Source, TensorInfo
from .layers import FormatChoice, LayerRule, finding, most_specific
from .presets import AUTO, COMMON, GENERAL, NONE, Preset, Rule, find_preset, recognise
from .refused import refusal
from .rules import eligibility, heuristic

__all__ = ["Choice", "Decision", "Plan", "make_plan"]

_OUTLINE = 6  # points

_BESIDE = " Beside it {}, which ComfyUI reads quantized from 0.33 on; keep layers ^{} for older ones."
_ENCODER = re.compile(r"text_encoders\.(?P<part>[^.]+)\.transformer\.")


@dataclass(frozen=True)
class Choice:
    """What formats were chosen from by measurement.

    Attributes:
        curve: (bytes of the file, expected error of the model's output, relative), from the smallest possible to every layer in full.
        chosen: the point that was taken.
        sensitive: errors are those of the model's output; otherwise the root mean square of its layers' outputs.
    """

    curve: tuple[tuple[int, float], ...]
    chosen: tuple[int, float]
    sensitive: bool

    def __str__(self) -> str:
        """For people: the chosen point, and where the others lie."""
        what = "the model's output" if self.sensitive else "the layers' outputs (sensitivities were not measured)"
        (size, error), (least, worst) = self.chosen, self.curve[0]
        return (
            f"error of {what} {error:.4f} expected at {human_bytes(size)}; the smallest possible: {worst:.4f} at "
            f"{human_bytes(least)}"
        )

    @property
    def outline(self) -> str:
        """The curve for people, in a few points from the smallest to the largest file."""
        step = max(1, (len(self.curve) - 1) // (_OUTLINE - 1))
        return ", ".join(f"{human_bytes(size)} {error:.4f}" for size, error in self.curve[::step])


@dataclass(frozen=True)
class Decision:
    """What becomes of one tensor, and why (empty where it is quantized as all are); ``format``: its own, None for the recipe's."""

    action: Literal["quantize", "keep", "remove"]
    reason: str = ""
    format: FormatChoice | None = None


@dataclass(frozen=True)
class Plan:
    """Decisions for all tensors of a source.

    Attributes:
        decisions: tensor name → :class:`Decision`, in the order of the source.
        preset: the preset used, None for the general rule alone.
        detected: the preset was recognised, not named by the user.
        choice: what formats were chosen from, where they were measured.
        encoders: beginning of the names of a text encoder inside a checkpoint → its preset.
        idle: rules of the user's own that find no layer.
    """

    decisions: dict[str, Decision]
    preset: Preset | None
    detected: bool
    choice: Choice | None = None
    encoders: Mapping[str, Preset] = field(default_factory=dict)
    idle: tuple[LayerRule, ...] = ()

    @property
    def explanation(self) -> str:
        """What the keep list is, how sure that is, and which rules of the user's own find nothing, in a few sentences."""
        idle = (
            f" No layer has a name that is found by: {', '.join(rule.reason for rule in self.idle)}."
            if self.idle
            else ""
        )
        return self._family + idle

    @property
    def _family(self) -> str:
        if self.preset:
            beside = "".join(_BESIDE.format(preset.title, start) for start, preset in self.encoders.items())
            return f"{'Recognised as' if self.detected else 'Preset'} {self.preset.title}.{beside} {self._sureness}"
        if self.detected:
            return "No preset recognises these layer names: the general rule alone decides."
        return "The general rule alone decides."

    @property
    def _sureness(self) -> str:
        layers = list(self.names("quantize"))
        unknown = []
        for name in layers:
            start = _encoder(name)
            if not self.encoders.get(start, self.preset).blocks.search(name.removeprefix(start)):
                unknown.append(name)
        if unknown:
            return f"Less sure: it does not know {len(unknown)} of the {len(layers)} layers to quantize, such as {unknown[0]}."
        return f"It knows all {len(layers)} layers to quantize."

    def names(self, action: str) -> Iterator[str]:
        """Names of the tensors with that decision."""
        return (name for name, decision in self.decisions.items() if decision.action == action)

    def output_names(self) -> Iterator[str]:
        """Names of the tensors that are not removed."""
        return (name for name, decision in self.decisions.items() if decision.action != "remove")


def _encoder(name: str) -> str:
    """The beginning of the names of the text encoder in a checkpoint that a tensor belongs to; empty for others."""
    found = _ENCODER.match(name)
    return found[0] if found else ""


def _encoders(tensors: Mapping[str, TensorInfo], family: Preset) -> dict[str, Preset]:
    """Beginning of names → preset, of the text encoders beside a model of that family that ComfyUI reads quantized."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if (found := _ENCODER.match(name)) and found["part"] in family.encoders:
            parts.setdefault(found[0], {})[name.removeprefix(found[0])] = info
    known = {start: recognise(part) for start, part in parts.items()}
    return {start: preset for start, preset in known.items() if preset}


def _found(rules: Iterable[Rule], name: str) -> str | None:
    return next((rule.reason for rule in rules if rule.pattern.search(name)), None)


def _impossible(rules: Iterable[Rule], name: str, format: FormatChoice | None) -> str | None:
    """Why ComfyUI would not read the layer quantized, or not in that format."""
    if reason := _found((rule for rule in rules if rule.cannot), name):
        return reason
    ours = format is not None and FORMATS[format.format].stock_since is None
    return (
        f"embedding: ComfyUI reads no {format.format} there"
        if ours and _found((rule for rule in rules if rule.table), name)
        else None
    )


def _decide(
    name: str, info: TensorInfo, start: str, preset: Preset | None, own: Sequence[LayerRule], heur: int | None
) -> Decision:
    """``start``: what presets do not see of the name. ``own``: the user's rules that find it."""
    seen = name.removeprefix(start)
    if preset and (reason := _found(preset.remove, seen)):
        return Decision("remove", reason)
    if reason := eligibility(name, info):
        return Decision("keep", reason)
    rules = (*COMMON.keep, *(preset or GENERAL).keep)
    rule = most_specific(own, name)
    if reason := _impossible(rules, seen, rule and rule.format):
        return Decision("keep", reason)
    if rule:
        return Decision("quantize" if rule.format else "keep", rule.reason, rule.format)
    kept = _found(rules, seen) or (heur and heuristic(info, heur))
    return Decision("keep", kept) if kept else Decision("quantize")


def _choose(choice: str | Preset, source: Source) -> Preset | None:
    if isinstance(choice, Preset):
        return choice
    if choice == AUTO:
        return recognise(source.tensors)
    return None if choice == NONE else find_preset(choice)


def make_plan(
    source: Source,
    *,
    preset: str | Preset = AUTO,
    rules: Iterable[LayerRule] = (),
    heur: bool = False,
    block_size: int = BLOCK_SIZE,
    check: CancelCheck | None = None,
) -> Plan:
    """Decide for every tensor of ``source``; small tensors may be read, weights are not.

    ``preset``, ``heur`` and the ``block_size`` that it goes by are those of a :class:`~.recipe.Recipe`. ``rules``: of the user's own; where one holds for a
    layer neither preset nor ``heur`` has a say, unless ComfyUI could not read what it asks for. ``check`` raises to cancel.

    Raises:
        AlreadyQuantizedError: the source holds codes already.
        NothingToQuantizeError: no layer would be quantized, or ComfyUI would load none of them.
    """
    if formats := quantized_formats(source):
        decode = "" if BITSANDBYTES in formats else ", or have it decoded first (requantize)"
        raise AlreadyQuantizedError(
            f"{source.name} is quantized already ({', '.join(formats)}); quantizing codes again would ruin the model, "
            f"so give its full-precision original{decode}."
        )
    if reason := refusal(source.tensors):
        raise NothingToQuantizeError(f"{source.name} is {reason}.")
    family = _choose(preset, source)
    encoders = _encoders(source.tensors, family) if family else {}
    decisions, own, block = {}, tuple(dict.fromkeys(rules)), block_size if heur else None
    found = finding(own, (name for name, info in source.tensors.items() if eligibility(name, info) is None), check)
    for name, info in source.tensors.items():
        start = _encoder(name)
        decisions[name] = _decide(
            name, info, start if start in encoders else "", encoders.get(start, family), found.get(name, ()), block
        )
    used = {rule for name, its_rules in found.items() if decisions[name].action != "remove" for rule in its_rules}
    idle = tuple(rule for rule in own if rule not in used)
    plan = Plan(decisions, family, detected=preset == AUTO, encoders=encoders, idle=idle)
    if next(plan.names("quantize"), None) is None:
        reasons = sorted({decision.reason for decision in decisions.values()})
        raise NothingToQuantizeError(
            f"{source.name} has no layer to quantize: all {len(decisions)} tensors are kept ({'; '.join(reasons[:4]) or 'there are none'})."
        )
    return plan
