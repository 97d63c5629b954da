"""Exception hierarchy. A message is one sentence: what is wrong, where (file, tensor, option), and what to do."""

import difflib
from collections.abc import Iterable

from .display import shorten

__all__ = [
    "AlreadyQuantizedError",
    "CalibrationError",
    "ClusterLostError",
    "MissingPackageError",
    "NonFiniteWeightError",
    "NothingToQuantizeError",
    "OutOfMemoryError",
    "OutputError",
    "OutputExistsError",
    "QuantizationError",
    "RecipeError",
    "SourceError",
    "UnknownNameError",
    "UnrecognizedModelError",
    "VerificationError",
]

_SHOWN = 100  # characters of an unknown name


class QuantizationError(Exception):
    """Base class of all errors that a user can cause or correct. Long messages are shortened: files contain long names.

    file     name of the file concerned, or None
    tensor   name of the tensor or layer concerned, or None
    option   name of the recipe field or command line option concerned, or None
    """

    def __init__(self, message: str, *, file: str | None = None, tensor: str | None = None, option: str | None = None):
        super().__init__(shorten(message))
        self.file = file
        self.tensor = tensor
        self.option = option


class SourceError(QuantizationError):
    """The source file is missing, truncated, inconsistent, or of an unsupported kind."""


class AlreadyQuantizedError(SourceError):
    """The source contains quantized values where full-precision weights are required."""


class UnrecognizedModelError(SourceError):
    """No preset recognizes the model, or several do."""


class NothingToQuantizeError(QuantizationError):
    """The recipe selects no layer of the source."""


class NonFiniteWeightError(QuantizationError):
    """A weight contains NaN or Inf, which no scale can represent."""


class OutOfMemoryError(QuantizationError):
    """The device has too little memory for a layer, even when the layer is processed in parts."""


class OutputError(QuantizationError):
    """The output cannot be written, for example to a read-only folder, a full disk, or the source itself."""


class OutputExistsError(OutputError):
    """The output exists and was made from another source or recipe."""


class RecipeError(QuantizationError):
    """A recipe or one of its options is invalid, or two options contradict each other."""


class CalibrationError(QuantizationError):
    """Calibration statistics are damaged, or do not match the layer or model."""


class MissingPackageError(QuantizationError):
    """An option requires a package that is not installed; the message gives the install command."""


class ClusterLostError(QuantizationError):
    """A cluster does not answer; what is incomplete is kept for the next run."""


class VerificationError(QuantizationError):
    """A quantized file violates the file format that ComfyUI's loader requires."""


class UnknownNameError(RecipeError):
    """The name of a format, preset, granularity or rounding is unknown; the message suggests the closest known name.

    kind  what the name refers to, for example "format"
    name  the unknown name as given
    """

    def __init__(self, kind: str, name: object, known: Iterable[str]):
        known = sorted(known)
        shown = shorten(str(name), _SHOWN)
        near = difflib.get_close_matches(shown, known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(known)}."
        super().__init__(f"Unknown {kind} '{shown}': {hint}", option=kind)
        self.kind = kind
        self.name = name
        self.known = known

    def __reduce__(self):
        return type(self), (self.kind, self.name, self.known)
