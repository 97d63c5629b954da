"""The plan: one decision for every tensor of a source, from names and shapes alone."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..cancellation import CancelCheck
from ..display import human_bytes, three_digits
from ..errors import AlreadyQuantizedError, NothingToQuantizeError
from ..formats import FORMATS, FormatConfig
from ..formats.kinds import can_dequantize, quantized_formats
from ..formats.scales import BLOCK_SIZE
from ..sources import Source, TensorInfo
from .eight_bits import BANK_EIGHT_BITS, EIGHT_BITS, explain_fallback, find_eight_bits, find_packed
from .experts import find_banks
from .layers import LayerRule, find_rules, most_specific
from .presets import AUTO, COMMON, GENERAL, Preset, Rule, recognize_preset
from .recognition import (
    check_kind,
    check_recognized,
    choose_preset,
    describe_configuration,
    describe_expert,
    describe_unused,
)
from .roles import find_roles
from .rules import check_eligibility, check_heuristic

__all__ = ["Choice", "Decision", "Plan", "make_plan"]

_OUTLINE = 6  # points
_UNMEASURED = "bank of experts: mixed precision measures linear layers"

_TEXT_ENCODER = " Also {}, which ComfyUI 0.33 and newer reads quantized; keep layers ^{} for older versions."
_ENCODER = re.compile(r"text_encoders\.(?:(?P<part>[^.]+)\.transformer\.)?")


@dataclass(frozen=True)
class Choice:
    """Result of the bit allocation of format measured.

    Attributes:
        curve: (bytes of the file, expected relative error of the model's output), from the smallest file to all layers
            in full precision.
        chosen: the point of the curve that the plan uses.
        sensitive: errors are those of the model's output; otherwise the root mean square of the layers' outputs.
        times: time of the layers at each point of the curve, relative to bfloat16; empty where it was not measured.
        time: the same at the chosen point; None where it was not measured.
        card: name of the card that the times are of.
    """

    curve: tuple[tuple[int, float], ...]
    chosen: tuple[int, float]
    sensitive: bool
    times: tuple[float, ...] = ()
    time: float | None = None
    card: str = ""

    def __str__(self) -> str:
        """For people: the chosen point and the smallest file."""
        what = "the model's output" if self.sensitive else "the layers' outputs (sensitivities were not measured)"
        (size, error), (least, worst) = self.chosen, self.curve[0]
        time = (
            ""
            if self.time is None
            else f" and {three_digits(self.time)} of the layers' time in bfloat16 on {self.card}"
        )
        return (
            f"error of {what} {three_digits(error)} expected at {human_bytes(size)}{time}; the smallest possible: {three_digits(worst)} at "
            f"{human_bytes(least)}"
        )

    @property
    def outline(self) -> str:
        """For people: a few points of the curve, from the smallest to the largest file, the chosen one among them."""
        step = max(1, (len(self.curve) - 1) // (_OUTLINE - 1))
        shown = sorted({*range(0, len(self.curve), step), self.curve.index(self.chosen)})
        return ", ".join(map(self._describe_point, shown))

    def _describe_point(self, index: int) -> str:
        (size, error), chosen = self.curve[index], " (chosen)" if self.curve[index] == self.chosen else ""
        time = f" {three_digits(self.times[index])}×" if self.times else ""
        return f"{human_bytes(size)} {three_digits(error)}{time}{chosen}"


@dataclass(frozen=True)
class Decision:
    """Action for one tensor, and its reason (empty for the default).

    Attributes:
        format: of a layer rule or a fallback, None for that of the recipe.
        fallback: the layer takes another format than the one asked for, see :mod:`.eight_bits`.
    """

    action: Literal["quantize", "keep", "remove"]
    reason: str = ""
    format: FormatConfig | None = None
    fallback: bool = False


@dataclass(frozen=True)
class Plan:
    """Decisions for all tensors of a source.

    Attributes:
        decisions: tensor name → :class:`Decision`, in the order of the source.
        preset: the preset used, None for the general rule alone.
        detected: the preset was recognized by the layer names, not named by the user.
        choice: result of the bit allocation, for format measured.
        encoders: name prefix of a text encoder inside a checkpoint → its preset.
        idle: layer rules of the user that match no layer.
        warnings: sentences for the user: choices that match no layer, and other files that the model needs.
    """

    decisions: dict[str, Decision]
    preset: Preset | None
    detected: bool
    choice: Choice | None = None
    encoders: Mapping[str, Preset] = field(default_factory=dict)
    idle: tuple[LayerRule, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def explanation(self) -> str:
        """For people: the keep list, and the layers that it does not cover."""
        if self.preset:
            encoders = "".join(_TEXT_ENCODER.format(preset.title, start) for start, preset in self.encoders.items())
            return f"{'Recognized as' if self.detected else 'Preset'} {self.preset.title}.{encoders} {self._coverage}"
        if self.detected:
            return "No preset matches these layer names; only the general rule applies."
        return "Only the general rule applies."

    @property
    def _coverage(self) -> str:
        layers = list(self.names("quantize"))
        unknown = []
        for name in layers:
            start = _encoder_prefix(name)
            preset = self.encoders.get(start, self.preset)
            if preset and not preset.blocks.search(name.removeprefix(start)):
                unknown.append(name)
        if unknown:
            return f"The preset does not cover {len(unknown)} of the {len(layers)} layers to quantize, such as {unknown[0]}."
        return f"The preset covers all {len(layers)} layers to quantize."

    def names(self, action: str) -> Iterator[str]:
        """Names of the tensors with that decision."""
        return (name for name, decision in self.decisions.items() if decision.action == action)

    def output_names(self) -> Iterator[str]:
        """Names of the tensors that are not removed."""
        return (name for name, decision in self.decisions.items() if decision.action != "remove")


def _encoder_prefix(name: str) -> str:
    """Name prefix of the text encoder in a checkpoint that a tensor belongs to; empty for other tensors."""
    found = _ENCODER.match(name)
    return found[0] if found else ""


def _find_encoders(tensors: Mapping[str, TensorInfo], family: Preset) -> dict[str, Preset]:
    """Name prefix → preset of the text encoders in a checkpoint of that family that ComfyUI reads quantized."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if (found := _ENCODER.match(name)) and (found["part"] or "") in family.encoders:
            parts.setdefault(found[0], {})[name.removeprefix(found[0])] = info
    known = {start: recognize_preset(part) for start, part in parts.items()}
    return {start: preset for start, preset in known.items() if preset}


def _find_reason(rules: Iterable[Rule], name: str) -> str | None:
    return next((rule.reason for rule in rules if rule.pattern.search(name)), None)


def _find_obstacle(rules: Iterable[Rule], name: str, format: FormatConfig | None) -> str | None:
    """Why ComfyUI cannot read the layer quantized, or not in that format; None if it can."""
    if reason := _find_reason((rule for rule in rules if rule.cannot), name):
        return reason
    if format is None or FORMATS[format.name].stock_since is not None:
        return None
    table = _find_reason((rule for rule in rules if rule.table), name)
    return f"embedding: ComfyUI does not read {format.name} for embeddings" if table else None


def _decide(
    name: str,
    info: TensorInfo,
    start: str,
    preset: Preset | None,
    own: Sequence[LayerRule],
    role: str | None,
    heur: int | None,
) -> Decision:
    """``start``: name prefix that presets ignore. ``own``: layer rules of the user that match the name. ``role``: see :mod:`.roles`."""
    seen = name.removeprefix(start)
    if reason := _find_reason((*COMMON.remove, *(preset or GENERAL).remove), seen):
        return Decision("remove", reason)
    if reason := check_eligibility(name, info):
        return Decision("keep", reason)
    rules = (*COMMON.keep, *(preset or GENERAL).keep)
    rule = most_specific(own, name)
    if reason := _find_obstacle(rules, seen, rule and rule.format):
        return Decision("keep", reason)
    if rule:
        return Decision("quantize" if rule.format else "keep", rule.reason, rule.format)
    kept = _find_reason(rules, seen) or role or (heur and check_heuristic(info, heur))
    return Decision("keep", kept) if kept else Decision("quantize")


def _fall_back(
    tensors: Mapping[str, TensorInfo],
    matrices: Mapping[str, TensorInfo],
    decisions: Mapping[str, Decision],
    format: FormatConfig,
    presets: Mapping[str, tuple[str, Preset | None]],
) -> dict[str, Decision]:
    """Decisions of the layers that take 8 bits instead of another format.

    Args:
        matrices: the same tensors, and one expert in place of each bank.
        presets: weight → name prefix that its preset ignores, preset.
    """

    def eight_bits(name: str, reason: str) -> Decision:
        bank = tensors[name] is not matrices[name]
        return Decision("quantize", reason, BANK_EIGHT_BITS if bank else EIGHT_BITS, fallback=True)

    fallbacks: dict[str, Decision] = {}
    rules: dict[str, list[Rule]] = {}
    packed = find_packed(matrices, {name: decision.format for name, decision in decisions.items()})
    for name, decision in decisions.items():
        if decision.action != "quantize":
            continue
        if reason := explain_fallback(decision.format or format, tensors[name].shape) or packed.get(name):
            fallbacks[name] = eight_bits(name, reason)
        elif decision.format is None:
            start, preset = presets[name]
            own = (*COMMON.eight_bits, *(preset or GENERAL).eight_bits)
            rules[name] = [rule for rule in own if rule.pattern.search(name.removeprefix(start))]
    for name, reason in find_eight_bits(matrices, format, rules).items():
        fallbacks[name] = eight_bits(name, reason)
    return fallbacks


def _fix_banks(tensors: Mapping[str, TensorInfo], decisions: Mapping[str, Decision]) -> dict[str, Decision]:
    """Decisions of the banks of experts in mixed precision, except those with a layer rule of their own."""
    chosen = Decision("quantize", _UNMEASURED, BANK_EIGHT_BITS, fallback=True)
    return {
        name: chosen
        for name, decision in decisions.items()
        if decision.action == "quantize" and decision.format is None and len(tensors[name].shape) > 2
    }


def make_plan(
    source: Source,
    *,
    format: FormatConfig | None = None,
    preset: str | Preset = AUTO,
    rules: Iterable[LayerRule] = (),
    heur: bool = False,
    block_size: int = BLOCK_SIZE,
    general: bool | None = None,
    check: CancelCheck | None = None,
) -> Plan:
    """Decide for every tensor of ``source``; small tensors may be read, weights are not.

    Args:
        format: of layers without a rule of their own, for which some layers take 8 bits instead; None or format measured:
            it is chosen later, for each layer.
        preset, heur: as in a :class:`~.recipe.Recipe`.
        rules: layer rules of the user; they override preset, roles and ``heur``, unless ComfyUI cannot read the result.
        block_size: side of a block in weights, for ``heur``.
        general: apply the general rule to a model that no preset recognizes, and quantize kinds of files that ComfyUI does not
            load quantized. False refuses both, as ``lrq`` and the nodes do unless the user asks for it. None, for programs that
            know their models, refuses only such kinds.
        check: called often; raises to cancel.

    Raises:
        AlreadyQuantizedError: the source is quantized.
        NothingToQuantizeError: no layer would be quantized, or ComfyUI would load none of them.
        UnrecognizedModelError: ``general`` is False, and no preset recognizes the source.
        RecipeError: a pattern of the rules takes too long to search for, or the preset is that of another model.
    """
    if formats := quantized_formats(source):
        decode = ", or dequantize it first (requantize)" if can_dequantize(source) else ""
        raise AlreadyQuantizedError(
            f"{source.name} is quantized already ({', '.join(formats)}); quantizing it again would ruin the model, "
            f"so give its full-precision original{decode}."
        )
    check_kind(source, general)
    family = choose_preset(preset, source)
    encoders = _find_encoders(source.tensors, family) if family else {}
    decisions, own, block = {}, tuple(dict.fromkeys(rules)), block_size if heur else None
    matrices = {**source.tensors, **find_banks(source.tensors)}
    eligible = (name for name, info in matrices.items() if check_eligibility(name, info) is None)
    found = find_rules(own, eligible, check)
    roles, presets = find_roles(source.tensors), {}
    for name, info in matrices.items():
        if check:
            check()
        start = _encoder_prefix(name)
        presets[name] = seen, preset_of = (start, encoders[start]) if start in encoders else ("", family)
        decisions[name] = _decide(name, info, seen, preset_of, found.get(name, ()), roles.get(name), block)
    if format and format.measured:
        decisions |= _fix_banks(source.tensors, decisions)
    elif format:
        decisions |= _fall_back(source.tensors, matrices, decisions, format, presets)
    used = {rule for name, its_rules in found.items() if decisions[name].action != "remove" for rule in its_rules}
    idle = tuple(rule for rule in own if rule not in used)
    notes = (
        describe_unused(source, preset, family, idle),
        describe_expert(source, family),
        describe_configuration(source, family),
    )
    plan = Plan(
        decisions, family, detected=preset == AUTO, encoders=encoders, idle=idle, warnings=tuple(filter(None, notes))
    )
    layers = list(plan.names("quantize"))
    if not layers:
        reasons = sorted({decision.reason for decision in decisions.values()})
        raise NothingToQuantizeError(
            f"{source.name} has no layer to quantize: all {len(decisions)} tensors are kept ({'; '.join(reasons[:4]) or 'there are none'})."
        )
    if general is False:
        check_recognized(source, preset, family, layers)
    return plan
