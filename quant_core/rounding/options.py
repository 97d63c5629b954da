"""The rounding part of a recipe: the table of rounding methods, the table of their options, and :class:`RoundingConfig`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError, UnknownNameError
from ..option import Option
from .optimizers import OPTIMIZERS, SCHEDULES

__all__ = ["BIAS_CORRECTIONS", "MODEL_ROUNDINGS", "OPTIONS", "ROUNDINGS", "RoundingConfig", "RoundingOption"]

ROUNDINGS: Mapping[str, str] = {
    "auto": "calibrated for layers with calibration statistics, else round to nearest with a scale search",
    "nearest": "round to nearest (RTN), each scale set by the largest magnitude of its group",
    "principal": "least error in the leading singular directions of the weight; data-free, helps only if activations follow them",
    "calibrated": "GPTQ (also known as OPTQ, equivalent to LDLQ): least output error on the calibration activations",
    "stochastic": "round to one of the two neighbouring values at random, unbiased",
    "sequential": "calibrated, block by block, for the activations that the quantized layers before produce; runs the MODEL in ComfyUI, "
    "with calls that Calibrate has recorded (replay_calls)",
    "reconstructed": "sequential, then gradient steps on the output of each block",
}
# Roundings that run the model.
MODEL_ROUNDINGS = ("sequential", "reconstructed")

BIAS_CORRECTIONS: Mapping[str, str] = {
    "auto": "with the calibrated mean activation, none without calibration statistics",
    "none": "biases stay unchanged",
    "synthetic": "with the mean of random activations, whose expectation is zero",
}


@dataclass(frozen=True, kw_only=True)
class RoundingOption(Option):
    """An option of one or more rounding methods.

    Attributes:
        acts: rounding methods that it acts on.
        gradient: True: acts on gradient rounding only; False: on GPTQ only; None: on both.
        needs: (other option, the value of it without which this one has no effect), or None.
    """

    acts: tuple[str, ...]
    gradient: bool | None = None
    needs: tuple[str, object] | None = None

    @property
    def scope(self) -> str:
        """Rounding methods that the option acts on; empty for all."""
        return "" if self.acts == _ANY else f"rounding {' or '.join(self.acts)}"


_PRINCIPAL, _CALIBRATED = ("principal",), ("calibrated", *MODEL_ROUNDINGS)
_BOTH = ("principal", "calibrated", "reconstructed")  # by gradient steps
_ANY = tuple(name for name in ROUNDINGS if name != "auto")

OPTIONS: Mapping[str, RoundingOption] = {
    "optimizer": RoundingOption(
        acts=_BOTH,
        choices=tuple(OPTIMIZERS),
        help="round by gradient steps of this optimizer instead of GPTQ",
    ),
    "num_iter": RoundingOption(
        acts=_BOTH,
        kind=int,
        default=500,
        high=10**6,
        gradient=True,
        help="number of gradient steps; without an optimizer, of optimizer original, or of adamw for reconstructed, which takes 120 steps "
        "by default; the best step is kept",
    ),
    "lr": RoundingOption(
        acts=_BOTH,
        kind=float,
        low=1e-9,
        high=1e3,
        gradient=True,
        help="learning rate of the gradient steps; by default that of the optimizer",
    ),
    "lr_schedule": RoundingOption(
        acts=_BOTH,
        choices=tuple(SCHEDULES),
        gradient=True,
        help="learning rate schedule; by default that of the optimizer",
    ),
    "early_stop": RoundingOption(
        acts=_BOTH,
        kind=int,
        default=0,
        high=10**6,
        gradient=True,
        help="stop after this many gradient steps without improvement, not counting the start of a cycle; 0: never",
    ),
    "top_p": RoundingOption(
        acts=_PRINCIPAL,
        kind=float,
        default=0.2,
        low=1e-6,
        high=1.0,
        help="fraction of the singular directions to use",
    ),
    "min_k": RoundingOption(
        acts=_PRINCIPAL, kind=int, default=1, low=1, high=10**6, help="smallest number of singular directions"
    ),
    "max_k": RoundingOption(
        acts=_PRINCIPAL, kind=int, default=1280, low=1, high=10**6, help="largest number of singular directions"
    ),
    "full_matrix": RoundingOption(
        acts=_PRINCIPAL, kind=bool, default=False, help="compute the full SVD; slow, with hardly any difference"
    ),
    "weight_cost": RoundingOption(
        acts=_PRINCIPAL,
        kind=float,
        default=0.03,
        low=1e-4,
        high=10.0,
        help="allowed relative increase of the weight error; 0.03 is 3 %",
    ),
    "damping": RoundingOption(
        acts=_CALIBRATED,
        kind=float,
        low=1e-8,
        high=1e3,
        help="dampening of the Hessian as a fraction of its mean diagonal (GPTQ: percdamp); by default the best of "
        "0.01, 0.1 and 1 on validation activations, 0.01 without them",
    ),
    "sweeps": RoundingOption(
        acts=_CALIBRATED,
        kind=int,
        default=1,
        high=1000,
        gradient=False,
        help="coordinate-descent passes after GPTQ",
    ),
    "beam_width": RoundingOption(
        acts=_CALIBRATED,
        kind=int,
        low=1,
        high=16,
        gradient=False,
        help="number of partial roundings of an output channel that GPTQ keeps within a block of 128 input channels (beam search); "
        "by default 4, but 1 for FP8 and on a CPU",
    ),
    "bias_correction": RoundingOption(
        acts=_ANY,
        default="auto",
        choices=tuple(BIAS_CORRECTIONS),
        help="subtract the mean output error from the bias: "
        + "; ".join(f"{name}: {text}" for name, text in BIAS_CORRECTIONS.items()),
    ),
    "calib_samples": RoundingOption(
        acts=_ANY,
        kind=int,
        default=3072,
        low=1,
        high=10**6,
        needs=("bias_correction", "synthetic"),
        help="number of random activations of bias_correction synthetic",
    ),
    "smoothing": RoundingOption(
        acts=_CALIBRATED,
        kind=bool,
        default=False,
        help="scale the input channels of nvfp4 layers (pre_quant_scale) where that lowers the error on validation activations; such "
        "files need ComfyUI 0.30 or newer; without this node pack, use LoRAs with these layers only by Load LoRA (Bypass)",
    ),
}


@dataclass(frozen=True)
class RoundingConfig:
    """A rounding method and its options, see :data:`OPTIONS`; None: not given.

    Raises:
        RecipeError: (from the constructor) an unknown name, a value out of range, or an option without effect.
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
    smoothing: bool | None = None
    beam_width: int | None = None

    def __post_init__(self):
        if not isinstance(self.rounding, str) or self.rounding not in ROUNDINGS:
            raise UnknownNameError("rounding", self.rounding, ROUNDINGS)
        for name in self._given:
            OPTIONS[name].check(name, getattr(self, name))
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
        if option.gradient is False and self.gradient and self.rounding != "reconstructed":
            raise RecipeError(
                f"{name} has no effect on rounding by an optimizer; leave one of them out, or choose rounding 'reconstructed'."
            )
        clash = next((other for other in self._given if not set(OPTIONS[other].acts) & set(option.acts)), None)
        if clash:
            raise RecipeError(
                f"{name} acts on rounding '{option.acts[0]}' and {clash} on '{OPTIONS[clash].acts[0]}'; leave one out."
            )

    @property
    def gradient(self) -> bool:
        """Whether values are rounded by gradient steps instead of GPTQ."""
        return self.optimizer is not None or any(OPTIONS[name].gradient for name in self._given)

    def get(self, name: str) -> Any:
        """The option's value, or its default if it is not given."""
        value = getattr(self, name)
        return OPTIONS[name].default if value is None else value

    def resolve(self, calibrated: bool) -> "RoundingConfig":
        """The configuration of a run: "auto" becomes the method that is the default with or without a calibration.

        Raises:
            RecipeError: an option has no effect, or rounding calibrated has no calibration.
        """
        if self.rounding in _CALIBRATED and not calibrated:
            title = self.rounding.capitalize()
            raise RecipeError(f"{title} rounding needs a calibration; give one, or choose another rounding.")
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

    @property
    def runs_model(self) -> bool:
        """Whether the rounding runs the model."""
        return self.rounding in MODEL_ROUNDINGS

    def layerwise(self) -> "RoundingConfig":
        """The configuration for a single layer: calibrated, by GPTQ, for a rounding that runs the model."""
        if not self.runs_model:
            return self
        idle = {name: None for name in self._given if "sequential" not in OPTIONS[name].acts}
        return dataclasses.replace(self, rounding="calibrated", **idle)

    def uncalibrated(self) -> "RoundingConfig":
        """The configuration of a layer without statistics in a calibrated run: RTN with a scale search."""
        learned = {name: None for name in self._given if OPTIONS[name].acts != _ANY}
        return dataclasses.replace(self, rounding="auto", **learned)
