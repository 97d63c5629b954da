"""A recipe: everything a user decides about a run, as one frozen value that round-trips through JSON and TOML."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from ..cancellation import CancelCheck
from ..errors import RecipeError
from ..formats import Codec, make_codec
from ..formats.rotation import rotation_groups
from ..formats.scales import BLOCK_SIZE
from ..rounding import Method
from ..sources import Source
from .layers import LayerRule, layer_rules
from .plan import Decision, Plan, make_plan
from .presets import AUTO, NONE, Preset, find_preset
from .toml import tomllib

__all__ = ["MEASURED", "MEASURED_CHOOSES", "MEASURED_ONLY", "Recipe"]

MEASURED = "measured"  # as a format: each layer has its own, found with a calibration


@dataclass(frozen=True)
class Recipe(Method):
    """What to make of a model: how to round, in which format, which layers.

    Attributes:
        format: the file format string of the quantized layers; "measured" to choose for each layer by its real inputs,
            see :mod:`~learned_rounding.quant_core.run.allocate`.
        granularity: what shares a scale; None for the format's own.
        block_size: side of a block, for granularity block; None for 128.
        convrot: rotate the inputs, see :func:`~learned_rounding.quant_core.layer.quantize_weight`; None for no.
        preset: keep list by model family; "auto" looks at the layer names, "none" takes the general rule alone.
        keep: more regular expressions; a tensor whose full name one of them finds stays in full precision.
        layer_config: JSON of rules for single layers, see :func:`~.layers.parse_layer_config`; where it and ``keep`` both
            find a layer, the more specific pattern decides.
        heur: also keep layers whose shape gains little, see :mod:`.rules`.
        full_precision_matmul: ask ComfyUI to decode weights instead of multiplying in FP8.
        seed: of everything that draws numbers.
        target_size: of the file without its header in GB (10⁹ bytes), for format measured; None: see there.
        target_error: for format measured, how large the error of the model's output may become, relative; None: any.
        block_formats: for format measured, try the block-wise formats too, which need this node pack to load.

    The others are those of :class:`~learned_rounding.quant_core.rounding.Method`.

    Raises:
        RecipeError: (from the constructor) an unknown name or a contradiction; every option acts or is refused.
    """

    format: str = "float8_e4m3fn"
    granularity: str | None = None
    block_size: int | None = None
    convrot: bool | int | str | None = None
    preset: str = AUTO
    keep: tuple[str, ...] = ()
    heur: bool = False
    full_precision_matmul: bool = False
    seed: int = 0
    target_size: float | None = None
    target_error: float | None = None
    block_formats: bool = False
    layer_config: str = ""

    def __post_init__(self):
        for name in _TYPES:
            _check_type(name, getattr(self, name))
        super().__post_init__()
        object.__setattr__(self, "keep", tuple(self.keep))
        object.__setattr__(self, "convrot", self.convrot or None)
        self._check_measured()
        if not self.measured:
            codec = self.codec
            object.__setattr__(self, "granularity", codec.granularity)
            object.__setattr__(self, "block_size", codec.block_size)
        if self.preset not in (AUTO, NONE):
            find_preset(self.preset)
        if not -(2**63) <= self.seed < 2**64:
            raise RecipeError(f"The recipe's seed {self.seed} does not fit into 64 bits.")
        for rule in self.rules:
            try:
                self.of(Decision("quantize", format=rule.format))
            except RecipeError as error:
                raise RecipeError(f"The {rule.origin}, at '{rule.pattern}': {error}") from None

    def _check_measured(self) -> None:
        given = {name for name in (*MEASURED_ONLY, *MEASURED_CHOOSES) if getattr(self, name) not in (None, False, "")}
        for name in sorted(given & set(MEASURED_CHOOSES if self.measured else MEASURED_ONLY)):
            hint = "which chooses it for each layer" if self.measured else f"only on format {MEASURED}"
            raise RecipeError(f"{name} has no effect on format {self.format}, {hint}; leave it out.")
        if {"target_size", "target_error"} <= given:
            raise RecipeError("target_size and target_error contradict each other; leave one out.")
        for name in _TARGETS & given:
            if not 0 < getattr(self, name) < float("inf"):
                raise RecipeError(f"The recipe's {name} must be a positive number, not {getattr(self, name)}.")

    def resolve(self, calibrated: bool) -> Method:
        """As :meth:`Method.resolve`; format measured is refused without a calibration."""
        if self.measured and not calibrated:
            raise RecipeError(
                f"Format {MEASURED} chooses by the layers' real inputs, which takes a calibration; connect or give one."
            )
        return super().resolve(calibrated)

    @property
    def rules(self) -> tuple[LayerRule, ...]:
        """The user's own rules for single layers."""
        return layer_rules(self.keep, self.layer_config)

    @property
    def measured(self) -> bool:
        """Whether each layer has a format of its own, found by measurement."""
        return self.format == MEASURED

    def of(self, decision: Decision) -> "Recipe":
        """The recipe of the layer that this decision was made for."""
        if decision.format is None:
            return self
        none = dict.fromkeys(MEASURED_ONLY, None) | {"block_formats": False, "layer_config": "", "keep": ()}
        return dataclasses.replace(self, **none, **decision.format.options)

    @property
    def codec(self) -> Codec:
        """How a layer stands in a file, unless that is measured; with ConvRot, one whose inputs the largest allowed group divides."""
        largest = max((size for size in rotation_groups(self.convrot, 0) if size), default=None)
        return make_codec(
            self.format,
            self.granularity,
            block_size=self.block_size,
            convrot=largest,
            full_precision_matmul=self.full_precision_matmul,
        )

    @property
    def description(self) -> str:
        """The format for people: "int8_tensorwise per row, ConvRot 256"."""
        return "the format measured best for each layer" if self.measured else str(self.codec)

    @property
    def label(self) -> str:
        """Short name for file names: the format, what it leaves open where that is something, and the rotation."""
        if self.measured:
            return MEASURED
        entry = self.codec.format
        several = len(entry.granularities) > 1
        name = f"{self.format.removesuffix('_tensorwise')}_{self.granularity}" if several else self.format
        return name + ("_convrot" if self.convrot else "")

    @property
    def layer_options(self) -> dict[str, object]:
        """The keyword arguments that :func:`~learned_rounding.quant_core.layer.quantize_weight` takes from a recipe."""
        names = [field.name for field in dataclasses.fields(Method)]
        names += ["format", "granularity", "block_size", "convrot", "full_precision_matmul", "seed"]
        return {name: getattr(self, name) for name in names}

    def plan(self, source: Source, *, preset: Preset | None = None, check: CancelCheck | None = None) -> Plan:
        """One decision for every tensor of ``source``, see :func:`~.plan.make_plan`; by another preset than the recipe's if one is given."""
        size = self.block_size or BLOCK_SIZE
        return make_plan(
            source, preset=preset or self.preset, rules=self.rules, heur=self.heur, block_size=size, check=check
        )

    def to_dict(self) -> dict[str, object]:
        """Plain values, in field order."""
        return {**dataclasses.asdict(self), "keep": list(self.keep)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Recipe":
        """Inverse of :meth:`to_dict`; missing fields take their defaults, unknown ones are refused."""
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise RecipeError(f"A recipe has no field '{min(unknown)}'.")
        return cls(**values)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Inverse of :meth:`to_json`."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"The recipe is not valid JSON: {error}.") from None
        if not isinstance(values, dict):
            raise RecipeError("The recipe is not a JSON object.")
        return cls.from_dict(values)

    def to_toml(self) -> str:
        """One line per field; strings, lists, numbers and booleans are written alike in JSON and TOML."""
        given = ((key, value) for key, value in self.to_dict().items() if value is not None)  # TOML has no null
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in given)
        return "\n".join(lines).replace("\x7f", "\\u007f") + "\n"

    @classmethod
    def from_toml(cls, text: str) -> "Recipe":
        """Inverse of :meth:`to_toml`."""
        try:
            return cls.from_dict(tomllib.loads(text))
        except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits too
            raise RecipeError(f"The recipe is not valid TOML: {error}.") from None


_TYPES = {
    "format": str,
    "granularity": (str, type(None)),
    "block_size": (int, type(None)),
    "convrot": (bool, int, str, type(None)),
    "preset": str,
    "keep": (tuple, list),
    "heur": bool,
    "full_precision_matmul": bool,
    "seed": int,
    "target_size": (int, float, type(None)),
    "target_error": (int, float, type(None)),
    "block_formats": bool,
    "layer_config": str,
}
_TARGETS = {"target_size", "target_error"}
# Fields that act with format measured alone, and fields that it chooses.
MEASURED_ONLY = ("target_size", "target_error", "block_formats")
MEASURED_CHOOSES = ("granularity", "block_size", "convrot", "full_precision_matmul", "layer_config")
_NUMBERS = ("block_size", "seed", *_TARGETS)


def _check_type(name: str, value: object) -> None:
    if not isinstance(value, _TYPES[name]) or (name in _NUMBERS and isinstance(value, bool)):
        raise RecipeError(f"The recipe's {name} cannot be {value!r}.")
    if name == "keep" and not all(isinstance(pattern, str) for pattern in value):
        raise RecipeError("The recipe's keep patterns must be strings.")
