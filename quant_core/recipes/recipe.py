"""A recipe: everything a user decides about a run, as one frozen value that round-trips through JSON and TOML."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoints import Source
from ..errors import RecipeError
from ..formats import Format, find_format
from ..rounding import check_rounding
from .plan import Plan, make_plan
from .presets import AUTO, NONE, find_preset
from .toml import tomllib

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What to make of a model.

    Attributes:
        format: the file format string of the quantized layers.
        granularity: what shares a scale; None for the format's own.
        rounding: how codes are chosen, see :data:`~learned_rounding.quant_core.layer.ROUNDINGS`.
        preset: keep list by model family; "auto" looks at the layer names, "none" takes the general rule alone.
        keep: more regular expressions; a tensor whose full name one of them finds stays in full precision.
        heur: also keep layers whose shape gains little, see :mod:`.rules`.
        full_precision_matmul: ask ComfyUI to decode weights instead of multiplying in FP8.
        seed: of everything that draws numbers.

    Raises:
        RecipeError: (from the constructor) an unknown name or a contradiction; every option acts or is refused.
    """

    format: str = "float8_e4m3fn"
    granularity: str | None = None
    rounding: str = "auto"
    preset: str = AUTO
    keep: tuple[str, ...] = ()
    heur: bool = False
    full_precision_matmul: bool = False
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name))
        object.__setattr__(self, "keep", tuple(self.keep))
        granularity, _ = self.entry.granularity(self.granularity)
        object.__setattr__(self, "granularity", granularity)
        check_rounding(self.rounding)
        if self.preset not in (AUTO, NONE):
            find_preset(self.preset)
        if self.full_precision_matmul and not self.entry.full_precision_matmul:
            raise RecipeError(
                f"full_precision_matrix_mult has no effect on {self.format}: ComfyUI ignores it there; leave it out."
            )
        if not -(2**63) <= self.seed < 2**64:
            raise RecipeError(f"The recipe's seed {self.seed} does not fit into 64 bits.")
        for pattern in self.keep:
            try:
                re.compile(pattern)
            except re.error as error:
                raise RecipeError(f"The keep pattern '{pattern}' is no regular expression: {error}.") from None

    @property
    def entry(self) -> Format:
        """The format's entry in the table."""
        return find_format(self.format)

    @property
    def config(self) -> dict[str, object]:
        """The JSON of a layer quantized by this recipe."""
        return self.entry.config(self.granularity, full_precision_matmul=self.full_precision_matmul)

    @property
    def label(self) -> str:
        """Short name for file names: the format, and the granularity where the format has several."""
        return (
            self.format
            if len(self.entry.granularities) == 1
            else f"{self.format.removesuffix('_tensorwise')}_{self.granularity}"
        )

    def plan(self, source: Source) -> Plan:
        """One decision for every tensor of ``source``, see :func:`~.plan.make_plan`."""
        return make_plan(source, preset=self.preset, keep=self.keep, heur=self.heur)

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
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in self.to_dict().items())
        return "\n".join(lines).replace("\x7f", "\\u007f") + "\n"

    @classmethod
    def from_toml(cls, text: str) -> "Recipe":
        """Inverse of :meth:`to_toml`."""
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"The recipe is not valid TOML: {error}.") from None


_TYPES = {
    "format": str,
    "granularity": (str, type(None)),
    "rounding": str,
    "preset": str,
    "keep": (tuple, list),
    "heur": bool,
    "full_precision_matmul": bool,
    "seed": int,
}


def _check_type(name: str, value: object) -> None:
    if not isinstance(value, _TYPES[name]) or (_TYPES[name] is int and isinstance(value, bool)):
        raise RecipeError(f"The recipe's {name} cannot be {value!r}.")
    if name == "keep" and not all(isinstance(pattern, str) for pattern in value):
        raise RecipeError("The recipe's keep patterns must be strings.")
