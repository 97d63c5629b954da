"""What a user can choose about the rounding: the table of roundings, the table of options, and both as one value."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import RecipeError, UnknownNameError
from .optimizers import OPTIMIZERS, SCHEDULES

__all__ = ["ROUNDINGS", "BIAS_CORRECTIONS", "OPTIONS", "Option", "Method"]

ROUNDINGS: Mapping[str, str] = {
    "auto": "calibrated where the layer's inputs are known, else nearest code under the best scale of a search",
    "nearest": "nearest code, under the scale that maps the largest weight onto the grid's end",
    "principal": "least error in the weight's own leading singular directions; needs no data, and helps only where inputs follow them",
    "calibrated": "least error of the layer's output for the inputs of a calibration",
    "stochastic": "one of the two neighbouring codes at random, right on average",
}

BIAS_CORRECTIONS: Mapping[str, str] = {
    "auto": "with the real mean input where it is known, else none",
    "none": "biases stay as they are",
    "synthetic": "with the mean of random inputs, whose expectation is zero",
}


@dataclass(frozen=True)
class Option:
    """One option of a rounding.

    Attributes:
        kind: the type of its value.
        default: what holds when it is not given; None: decided elsewhere, the help says how.
        acts: the roundings it acts on.
        gradient: whether it acts on gradient rounding only (True), on sequential only (False), or on both (None).
        needs: (other option, the value of it without which this one has no effect), or None.
        choices: names allowed, for a string.
        low, high: smallest and largest number allowed.
        help: one sentence without its full stop.
    """

    kind: type
    default: object
    acts: tuple[str, ...]
    help: str
    gradient: bool | None = None
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = float("inf")
    needs: tuple[str, object] | None = None


_BOTH, _PRINCIPAL, _CALIBRATED = ("principal", "calibrated"), ("principal",), ("calibrated",)
_ANY = tuple(name for name in ROUNDINGS if name != "auto")

OPTIONS: Mapping[str, Option] = {
    "optimizer": Option(
        str, None, _BOTH, "round by gradient steps of this optimizer instead of sequentially", choices=tuple(OPTIMIZERS)
    ),
    "num_iter": Option(
        int,
        500,
        _BOTH,
        "gradient steps; more are never worse, and need an optimizer (without one: original)",
        True,
        high=10**6,
    ),
    "lr": Option(
        float,
        None,
        _BOTH,
        "learning rate of the gradient steps (by default the optimizer's own)",
        True,
        low=1e-9,
        high=1e3,
    ),
    "lr_schedule": Option(
        str, None, _BOTH, "how the learning rate changes (by default as suits the optimizer)", True, tuple(SCHEDULES)
    ),
    "early_stop": Option(
        int,
        0,
        _BOTH,
        "end after so many gradient steps without a new best; the start of a cycle brings none; 0: never",
        True,
        high=10**6,
    ),
    "top_p": Option(float, 0.2, _PRINCIPAL, "share of the singular directions that count", low=1e-6, high=1.0),
    "min_k": Option(int, 1, _PRINCIPAL, "at least so many singular directions", low=1, high=10**6),
    "max_k": Option(int, 1280, _PRINCIPAL, "at most so many singular directions", low=1, high=10**6),
    "full_matrix": Option(bool, False, _PRINCIPAL, "take them from the complete SVD: slow, and hardly different"),
    "weight_cost": Option(
        float, 0.03, _PRINCIPAL, "how much larger the plain weight error may become: 0.03 is 3 %", low=1e-4, high=10.0
    ),
    "damping": Option(
        float,
        None,
        _CALIBRATED,
        "how much all directions count beside the calibrated ones, of their mean (by default the best "
        "of 0.01, 0.1 and 1 on held-out inputs, 0.01 where there are none)",
        low=1e-8,
        high=1e3,
    ),
    "sweeps": Option(int, 1, _CALIBRATED, "sweeps of coordinate descent after sequential rounding", False, high=1000),
    "bias_correction": Option(
        str, "auto", _ANY, "take the mean output error back in the bias", choices=tuple(BIAS_CORRECTIONS)
    ),
    "calib_samples": Option(
        int,
        3072,
        _ANY,
        "random inputs of the synthetic bias correction",
        low=1,
        high=10**6,
        needs=("bias_correction", "synthetic"),
    ),
}


@dataclass(frozen=True)
class Method:
    """A rounding with its options, see :data:`OPTIONS`; None stands for not given.

    Raises:
        RecipeError: (from the constructor) an unknown name, a value out of range, or an option without effect; every
            one acts or is refused.
    """

    rounding: str = "auto"
    optimizer: str | None = None
    num_iter: int | None = None
    lr: float | None = None
    lr_schedule: str | None = None
    early_stop: int | None = None
    top_p: float | None = None
    min_k: int | None = None
    max_k: int | None = None
    full_matrix: bool | None = None
    weight_cost: float | None = None
    damping: float | None = None
    sweeps: int | None = None
    bias_correction: str | None = None
    calib_samples: int | None = None

    def __post_init__(self):
        if not isinstance(self.rounding, str) or self.rounding not in ROUNDINGS:
            raise UnknownNameError("rounding", self.rounding, ROUNDINGS)
        for name in self._given:
            _check(name, getattr(self, name))
        if self.get("min_k") > self.get("max_k"):
            raise RecipeError(f"min_k {self.get('min_k')} is larger than max_k {self.get('max_k')}.")
        for name in self._given:
            self._check_effect(name)

    @property
    def _given(self) -> list[str]:
        return [name for name in OPTIONS if getattr(self, name) is not None]

    def _check_effect(self, name: str) -> None:
        option = OPTIONS[name]
        if option.needs and self.get(option.needs[0]) != option.needs[1]:
            raise RecipeError("{} has no effect without {} '{}'; leave it out.".format(name, *option.needs))
        if self.rounding != "auto" and self.rounding not in option.acts:
            raise RecipeError(f"{name} has no effect on rounding '{self.rounding}'; leave it out.")
        if option.gradient is False and self.gradient:
            raise RecipeError(f"{name} has no effect on rounding by an optimizer; leave one of them out.")
        clash = next((other for other in self._given if not set(OPTIONS[other].acts) & set(option.acts)), None)
        if clash:
            raise RecipeError(
                f"{name} acts on rounding '{option.acts[0]}' and {clash} on '{OPTIONS[clash].acts[0]}'; leave one out."
            )

    @property
    def gradient(self) -> bool:
        """Codes are chosen by gradient steps, not sequentially."""
        return self.optimizer is not None or any(OPTIONS[name].gradient for name in self._given)

    def get(self, name: str):
        """The option's value, or what holds when it is not given."""
        value = getattr(self, name)
        return OPTIONS[name].default if value is None else value

    def resolve(self, calibrated: bool) -> "Method":
        """The method for a layer: "auto" becomes the rounding it stands for, given whether the inputs are known.

        Raises:
            RecipeError: an option has no effect there, or calibrated rounding has no calibration.
        """
        if self.rounding == "calibrated" and not calibrated:
            raise RecipeError("Calibrated rounding needs a calibration; give one, or choose another rounding.")
        if self.rounding != "auto":
            return self
        learned = [name for name in self._given if OPTIONS[name].acts != _ANY]
        idle = next((name for name in learned if OPTIONS[name].acts == _CALIBRATED and not calibrated), None)
        if idle:
            raise RecipeError(
                f"{idle} acts on calibrated rounding, which needs a calibration; give one, or leave it out."
            )
        rounding = "calibrated" if calibrated else "principal" if learned else "auto"
        return dataclasses.replace(self, rounding=rounding)

    def uncalibrated(self) -> "Method":
        """The method for a layer of unknown inputs in a calibrated run: nearest code under a searched scale."""
        rest = {name: None for name in self._given if OPTIONS[name].acts != _ANY}
        return dataclasses.replace(self, rounding="auto", **rest)


def _check(name: str, value: object) -> None:
    option = OPTIONS[name]
    kinds = (int, float) if option.kind is float else option.kind
    if not isinstance(value, kinds) or (option.kind is not bool and isinstance(value, bool)):
        raise RecipeError(f"{name} cannot be {value!r}.")
    if option.choices and value not in option.choices:
        raise UnknownNameError(name, value, option.choices)
    if option.kind in (int, float) and not option.low <= value <= option.high:
        raise RecipeError(f"{name} must lie between {option.low:g} and {option.high:g}, not {value}.")
