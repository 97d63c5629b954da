"""A recipe: all choices of a user for a run, as one frozen value that round-trips through JSON and TOML."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..cancellation import CancelCheck
from ..display import shorten
from ..errors import RecipeError, UnknownNameError
from ..formats import MEASURED, FormatConfig
from ..formats.cards import CARDS, parse_card
from ..formats.scales import BLOCK_SIZE
from ..rounding import RoundingConfig
from ..sources import Source
from .aliases import choose_format
from .layers import LayerRule, check_length, parse_rules
from .option_table import MEASURED_ONLY
from .plan import Decision, Plan, make_plan
from .presets import AUTO, NONE, Preset, find_preset
from .toml import parse_bounded_toml

__all__ = ["Recipe"]


@dataclass(frozen=True, init=False)
class Recipe:
    """Format, rounding and choice of layers for a model.

    The constructor takes both configurations, or their fields as flat keywords:
    ``Recipe(format="int8_tensorwise", convrot=True, rounding="nearest", preset="flux")``. A format name may be an alias,
    see :mod:`.aliases`; INT8 per row by name has ConvRot "auto" unless ``convrot`` is given; None is that of the name. Files and :meth:`to_dict` are flat.

    Attributes:
        format: how quantized layers are stored; format measured chooses for each layer, see
            :mod:`~learned_rounding.quant_core.run.allocate`.
        rounding: how weights are rounded.
        preset: keep list by model family; "auto" recognizes it by the layer names, "none" is the general rule alone.
        keep: regular expressions; a layer in whose tensor name one of them is found stays in full precision.
        heur: also keep layers whose shape gains little, see :mod:`.rules`.
        seed: of all random numbers.
        target_size: for format measured, largest size of the file without its header in GB (10⁹ bytes); None: see there.
        target_error: for format measured, largest relative error of the model's output; None: any.
        card: for format measured and roundings that run the model, compute capability of the card that the model is for, as
            "8.9"; None: the card that quantizes.
        target_time: for format measured, largest time of the layers on the card relative to bfloat16, see
            :mod:`~learned_rounding.quant_core.run.card_times`; None: any.
        block_formats: for format measured, try the block-wise formats too, which need this node pack to load.
        layer_config: JSON of rules for single layers, see :func:`~.layers.parse_layer_config`; where a rule and ``keep``
            both match a layer, the more specific pattern decides.

    Raises:
        RecipeError: (from the constructor) an unknown name or field, a contradiction, or an option without effect.
    """

    format: FormatConfig
    rounding: RoundingConfig
    preset: str = AUTO
    keep: tuple[str, ...] = ()
    heur: bool = False
    seed: int = 0
    target_size: float | None = None
    target_error: float | None = None
    block_formats: bool = False
    layer_config: str = ""
    card: str | None = None
    target_time: float | None = None

    def __init__(
        self,
        /,
        format: FormatConfig | str = FormatConfig.name,
        rounding: RoundingConfig | str = RoundingConfig.rounding,
        *,
        preset: str = AUTO,
        keep: Iterable[str] = (),
        heur: bool = False,
        seed: int = 0,
        target_size: float | None = None,
        target_error: float | None = None,
        block_formats: bool = False,
        layer_config: str = "",
        card: str | None = None,
        target_time: float | None = None,
        **options,
    ):
        own = {
            "preset": preset,
            "keep": keep,
            "heur": heur,
            "seed": seed,
            "target_size": target_size,
            "target_error": target_error,
            "block_formats": block_formats,
            "layer_config": layer_config,
            "card": card,
            "target_time": target_time,
        }
        for key, value in own.items():
            _check_type(key, value)
        format_options = {key: options.pop(key) for key in _FORMAT_FIELDS if key in options}
        rounding_options = {key: options.pop(key) for key in _ROUNDING_FIELDS if key in options}
        if options:
            raise RecipeError(f"A recipe has no field '{min(options)}'.")
        if not isinstance(format, FormatConfig):
            format = choose_format(format, **format_options)
        elif format_options:
            format = dataclasses.replace(format, **format_options)
        if not isinstance(rounding, RoundingConfig):
            rounding = RoundingConfig(rounding, **rounding_options)
        elif rounding_options:
            rounding = dataclasses.replace(rounding, **rounding_options)
        for key, value in {**own, "format": format, "rounding": rounding, "keep": tuple(keep)}.items():
            object.__setattr__(self, key, value)
        self._check_measured()
        if self.preset not in (AUTO, NONE):
            find_preset(self.preset)
        if not -(2**63) <= self.seed < 2**64:
            raise RecipeError(f"The recipe's seed {self.seed} does not fit into 64 bits.")
        self._check_smoothing(parse_rules(self.keep, self.layer_config))

    def _check_measured(self) -> None:
        if self.format.measured and self.layer_config:
            raise RecipeError(
                f"layer_config has no effect on format {MEASURED}, which chooses the format of each layer; leave it out."
            )
        for name, option in MEASURED_ONLY.items():
            idle = not self.format.measured and self.rounding.rounding not in option.roundings
            if idle and getattr(self, name) not in (None, False):
                raise RecipeError(
                    f"{name} has no effect on format {self.format.name}, only on {option.scope}; leave it out."
                )
        if self.card is not None and self.card not in CARDS:
            raise UnknownNameError("card", self.card, CARDS)
        if self.target_size is not None and self.target_error is not None:
            raise RecipeError("target_size and target_error contradict each other; leave one out.")
        for name in ("target_size", "target_error", "target_time"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise RecipeError(f"The recipe's {name} must be a positive number, not {value}.")

    def _check_smoothing(self, rules: Iterable[LayerRule]) -> None:
        """Raise RecipeError for smoothing where no layer can have a format that has it."""
        formats = (self.format, *(rule.format for rule in rules if rule.format))
        if self.rounding.smoothing and not any(format.measured or format.smoothed for format in formats):
            raise RecipeError(f"smoothing has no effect on {self.format}; leave it out.")

    def resolve(self, calibrated: bool) -> RoundingConfig:
        """As :meth:`RoundingConfig.resolve`; format measured is refused without a calibration."""
        if self.format.measured and not calibrated:
            raise RecipeError(
                f"Format {MEASURED} chooses by the activations of the layers, which needs a calibration; connect or give one."
            )
        return self.rounding.resolve(calibrated)

    def find_capability(self, device: torch.device) -> tuple[int, int] | None:
        """Compute capability of the card that the model is for; None: not known, any. ``device``: that of the run."""
        if self.card is not None:
            return parse_card(self.card)
        return torch.cuda.get_device_capability(device) if device.type == "cuda" else None

    @property
    def rules(self) -> tuple[LayerRule, ...]:
        """Layer rules of the user: keep patterns and layer config."""
        return parse_rules(self.keep, self.layer_config)

    def of(self, decision: Decision) -> "Recipe":
        """The recipe of the layer that this decision was made for."""
        if decision.format is None:
            return self
        rounding = self.rounding
        if rounding.smoothing and not decision.format.smoothed:
            rounding = dataclasses.replace(rounding, smoothing=None)
        return Recipe(decision.format, rounding, preset=self.preset, heur=self.heur, seed=self.seed)

    def plan(
        self,
        source: Source,
        *,
        preset: Preset | None = None,
        general: bool | None = None,
        check: CancelCheck | None = None,
    ) -> Plan:
        """One decision for every tensor of ``source``, see :func:`~.plan.make_plan`; ``preset`` overrides that of the recipe."""
        size = self.format.block_size or BLOCK_SIZE
        return make_plan(
            source,
            format=self.format,
            preset=preset or self.preset,
            rules=self.rules,
            heur=self.heur,
            block_size=size,
            general=general,
            check=check,
        )

    def to_dict(self) -> dict[str, object]:
        """Plain values under the flat keys of a recipe file, in their order since version 0.1.0; later keys only where they are given."""
        own = {name: getattr(self, name) for name in _TYPES} | {"keep": list(self.keep)}
        values = {**vars(self.rounding), **vars(self.format), **own, "format": self.format.name}
        later = {key: values[key] for key in _LATER_KEYS if values[key] is not None}
        return {key: values[key] for key in _FILE_KEYS} | later

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Inverse of :meth:`to_dict`; missing keys take their defaults, unknown ones are refused.

        Without ``convrot`` the rotation is that of the format name, as in files of version 0.1.0: on for "int8", off for
        "int8_tensorwise".
        """
        named = not isinstance(values.get("format"), FormatConfig)
        return cls(**{**({"convrot": None} if named else {}), **values})

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Inverse of :meth:`to_json`."""
        check_length(text, "recipe")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"The recipe is not valid JSON: {error}.") from None
        if not isinstance(values, dict):
            raise RecipeError("The recipe is not a JSON object.")
        return cls.from_dict(values)

    def to_toml(self) -> str:
        """One line per key; strings, lists, numbers and booleans are written alike in JSON and TOML."""
        given = ((key, value) for key, value in self.to_dict().items() if value is not None)  # TOML has no null
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in given)
        return "\n".join(lines).replace("\x7f", "\\u007f") + "\n"

    @classmethod
    def from_toml(cls, text: str) -> "Recipe":
        """Inverse of :meth:`to_toml`."""
        check_length(text, "recipe")
        try:
            return cls.from_dict(parse_bounded_toml(text))
        except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
            raise RecipeError(f"The recipe is not valid TOML: {error}.") from None


_FORMAT_FIELDS = [field.name for field in dataclasses.fields(FormatConfig) if field.name != "name"]
_ROUNDING_FIELDS = [field.name for field in dataclasses.fields(RoundingConfig) if field.name != "rounding"]
_LATER_KEYS = ("bits", "linear_dtype", "card", "target_time", "smoothing", "beam_width")
_FILE_KEYS = (
    *("rounding", *(name for name in _ROUNDING_FIELDS if name not in _LATER_KEYS)),
    *("format", "granularity", "block_size", "convrot", "preset", "keep", "heur"),
    *("full_precision_matmul", "seed", "target_size", "target_error", "block_formats", "layer_config"),
)
# Types of the fields that are not part of the two configurations.
_TYPES = {
    "preset": (str,),
    "keep": (tuple, list),
    "heur": (bool,),
    "seed": (int,),
    "target_size": (int, float, type(None)),
    "target_error": (int, float, type(None)),
    "block_formats": (bool,),
    "layer_config": (str,),
    "card": (str, type(None)),
    "target_time": (int, float, type(None)),
}


def _check_type(name: str, value: object) -> None:
    types = _TYPES[name]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise RecipeError(f"The recipe's {name} cannot be {shorten(repr(value), 100)}.")
    if isinstance(value, (tuple, list)) and not all(isinstance(pattern, str) for pattern in value):
        raise RecipeError("The recipe's keep patterns must be strings.")
