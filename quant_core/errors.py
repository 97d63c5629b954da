"""Everything that can go wrong by name. Each message is one sentence: what, where, what to do."""

import difflib
from collections.abc import Iterable

__all__ = [
    "QuantizationError",
    "SourceError",
    "AlreadyQuantizedError",
    "NothingToQuantizeError",
    "NonFiniteWeightError",
    "OutOfMemoryError",
    "OutputError",
    "OutputExistsError",
    "RecipeError",
    "CalibrationError",
    "MissingPackageError",
    "UnknownNameError",
    "VerificationError",
]


class QuantizationError(Exception):
    """Base of all errors a user can meet; the message is fit to be shown as it stands."""


class SourceError(QuantizationError):
    """The source file is missing, is no safetensors file, is truncated, or is inconsistent."""


class AlreadyQuantizedError(SourceError):
    """The source holds codes instead of weights; quantizing them again would ruin them silently."""


class NothingToQuantizeError(QuantizationError):
    """The recipe leaves no layer to quantize in this source."""


class NonFiniteWeightError(QuantizationError):
    """A weight holds NaN or Inf, which no scale can represent."""


class OutOfMemoryError(QuantizationError):
    """A device has too little memory for a layer, even in parts."""


class OutputError(QuantizationError):
    """The output cannot be written: read-only folder, full disk, same file as the source."""


class OutputExistsError(OutputError):
    """The output exists already and was made from something else."""


class RecipeError(QuantizationError):
    """A recipe or an option of it makes no sense, or contradicts another."""


class CalibrationError(QuantizationError):
    """What is said of a layer's inputs does not fit the layer, or is damaged."""


class MissingPackageError(QuantizationError):
    """An option needs a package that is not installed; says how to install it."""


class VerificationError(QuantizationError):
    """A quantized file breaks the contract that ComfyUI's loader relies on."""


class UnknownNameError(RecipeError):
    """A format, preset, granularity or rounding of a name that does not exist; suggests the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'" if near else "known are " + ", ".join(known)
        super().__init__(f"There is no {kind} '{name}': {hint}?" if near else f"There is no {kind} '{name}'; {hint}.")
