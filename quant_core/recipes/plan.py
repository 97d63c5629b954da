"""The plan: one decision for every tensor of a source, made from names and shapes alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from ..checkpoints import Source, TensorInfo
from ..checkpoints.inspect import BITSANDBYTES, quantized_formats
from ..errors import AlreadyQuantizedError, NothingToQuantizeError
from ..report import Choice
from .layers import FormatChoice, LayerRule, most_specific
from .presets import AUTO, COMMON, NONE, Preset, Rule, find_preset, recognise
from .refused import refusal
from .rules import eligibility, heuristic

__all__ = ["Decision", "Plan", "make_plan"]


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
    """

    decisions: dict[str, Decision]
    preset: Preset | None
    detected: bool
    choice: Choice | None = None

    @property
    def explanation(self) -> str:
        """What the keep list is and how sure that is, in a sentence or two."""
        if self.preset:
            return f"{'Recognised as' if self.detected else 'Preset'} {self.preset.title}. {self._sureness}"
        if self.detected:
            return "No preset recognises these layer names: the general rule alone decides."
        return "The general rule alone decides."

    @property
    def _sureness(self) -> str:
        layers = list(self.names("quantize"))
        unknown = [name for name in layers if not self.preset.blocks.search(name)]
        if unknown:
            return f"Less sure: it does not know {len(unknown)} of the {len(layers)} layers to quantize, such as {unknown[0]}."
        return f"It knows all {len(layers)} layers to quantize."

    def names(self, action: str) -> Iterator[str]:
        """Names of the tensors with that decision."""
        return (name for name, decision in self.decisions.items() if decision.action == action)

    def output_names(self) -> Iterator[str]:
        """Names of the tensors that are not removed."""
        return (name for name, decision in self.decisions.items() if decision.action != "remove")


def _found(rules: tuple[Rule, ...], name: str) -> str | None:
    return next((rule.reason for rule in rules if rule.pattern.search(name)), None)


def _decide(
    name: str, info: TensorInfo, preset: Preset | None, own: Iterable[LayerRule], heur: bool
) -> Decision:
    if preset and (reason := _found(preset.remove, name)):
        return Decision("remove", reason)
    if reason := eligibility(name, info):
        return Decision("keep", reason)
    if rule := most_specific(own, name):
        return Decision("quantize" if rule.format else "keep", rule.reason, rule.format)
    kept = _found(COMMON.keep, name) or (preset and _found(preset.keep, name)) or (heur and heuristic(info))
    return Decision("keep", kept) if kept else Decision("quantize")


def _choose(name: str, source: Source) -> Preset | None:
    if name == AUTO:
        return recognise(source.tensors)
    return None if name == NONE else find_preset(name)


def make_plan(
    source: Source, *, preset: str = AUTO, rules: Iterable[LayerRule] = (), heur: bool = False
) -> Plan:
    """Decide for every tensor of ``source``; small tensors may be read, weights are not.

    ``preset`` and ``heur`` are those of a :class:`~.recipe.Recipe`. ``rules``: of the user's own; where one holds for a
    layer neither preset nor ``heur`` has a say.

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
    decisions = {name: _decide(name, info, family, rules, heur) for name, info in source.tensors.items()}
    plan = Plan(decisions, family, detected=preset == AUTO)
    if next(plan.names("quantize"), None) is None:
        reasons = sorted({decision.reason for decision in decisions.values()})
        raise NothingToQuantizeError(
            f"{source.name} has no layer to quantize: all {len(decisions)} tensors are kept ({'; '.join(reasons[:4]) or 'there are none'})."
        )
    return plan
