"""Inputs of both calibration nodes."""

from comfy_api.latest import io

from .. import host
from .schema import CalibrationType, widget

__all__ = [
    "earlier_input",
    "keep_input",
    "memory_input",
    "replay_input",
    "sensitivity_input",
    "step_inputs",
    "tokens_input",
]


def keep_input():
    """Return the input for the form of the Hessians."""
    return widget(
        io.Combo,
        id="keep",
        options=list(host.KEEP),
        default="full",
        tooltip="full: everything, up to 4·in² bytes of memory for each input of a layer, or in² on disk where memory is short; "
        "compact: leading directions and the diagonal, a thirtieth of that, and less gain; "
        "with quantized inputs: four times full, for INT8 without ConvRot, whose weights then make up for part of the inputs' error.",
    )


def tokens_input(default: int):
    """Return the input for the number of tokens sampled per call of the model."""
    return widget(
        io.Int,
        id="tokens",
        default=default,
        min=16,
        max=65536,
        optional=True,
        advanced=True,
        tooltip="Number of tokens of each call of the model, drawn with the seed; more is slower and a little better.",
    )


def sensitivity_input():
    """Return the input that enables the sensitivity analysis."""
    return widget(
        io.Boolean,
        id="sensitivity",
        default=False,
        optional=True,
        tooltip="Also measure what an error of each layer does to the model's output, for format measured: calls the model twice for each layer.",
    )


def memory_input():
    """Return the input that limits the memory of the Hessians."""
    return widget(
        io.Float,
        id="max_vram_gb",
        default=0.0,
        min=0.0,
        max=1024.0,
        step=0.5,
        optional=True,
        advanced=True,
        tooltip="Largest amount of VRAM in GB for the Hessians of keep full; the others are in ComfyUI's temp folder, which is slower. "
        "0: half of the VRAM that the model and its activations leave free.",
    )


def replay_input():
    """Return the input for the number of recorded calls."""
    return widget(
        io.Int,
        id="replay_calls",
        default=0,
        min=0,
        max=4096,
        optional=True,
        advanced=True,
        tooltip="How many calls of the model are recorded with all their inputs, drawn with the seed over all prompts and steps; "
        "rounding sequential and reconstructed run them again, and 64 are usual. They are in RAM, then in ComfyUI's temp folder, while the "
        "server runs. 0: none.",
    )


def step_inputs():
    """Return the inputs for the first step and for the step before which sampling stops."""
    settings = {"max": 10000, "optional": True, "advanced": True}
    start = widget(
        io.Int,
        id="start_at_step",
        default=0,
        min=0,
        **settings,
        tooltip="First step, as for KSampler (Advanced): for a model of the last steps, such as the low-noise model of WAN 2.2. "
        "latent_image then is the output latents of the Calibrate node of the first steps.",
    )
    end = widget(
        io.Int,
        id="end_at_step",
        default=10000,
        min=1,
        **settings,
        tooltip="Step before which sampling stops and leaves its noise: for a model of the first steps, such as the high-noise "
        "model of WAN 2.2.",
    )
    return start, end


def earlier_input():
    """Return the input for a calibration to continue."""
    return CalibrationType.Input(
        "calibration", optional=True, tooltip="A calibration of the same architecture to continue with more prompts."
    )
