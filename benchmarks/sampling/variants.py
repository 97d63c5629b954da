"""What is measured: formats with the kernels that run them, and settings of ComfyUI."""

from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from learned_rounding.hosts import Host
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics
from learned_rounding.quant_core.calibration.histogram import histogram
from learned_rounding.quant_core.sources import open_source

__all__ = ["FORMATS", "KERNELS", "SETTINGS", "SOURCE", "Format", "Setting", "Variant", "make_file", "parse_variants"]

_DISABLE_DYNAMIC = "--disable-dynamic-vram"
SOURCE = "bf16"  # the format of the source, to which all others are compared


@dataclass(frozen=True)
class Format:
    """Format of a model file.

    Attributes:
        options: fields of the recipe; empty for the source itself.
        calibrated: with a static ``input_scale`` for each layer.
        has_kernels: ComfyUI's own INT8 and W4A8 layers, which run on its kernels or on ours.
    """

    options: Mapping[str, object] = field(default_factory=dict)
    calibrated: bool = False
    has_kernels: bool = False

    @property
    def recipe(self) -> Recipe:
        return Recipe(rounding="nearest", **self.options)

    def refusal(self) -> str | None:
        """Why this GPU does not run the format; None if it does, or without a GPU."""
        if not self.options or not torch.cuda.is_available():
            return None
        needed = self.recipe.format.codec.format.native_since
        if torch.cuda.get_device_capability() >= needed:
            return None
        return f"not native on this GPU, needs compute capability {needed[0]}.{needed[1]}"


FORMATS = {
    SOURCE: Format(),
    "fp8": Format({"format": "float8_e4m3fn"}),
    "fp8_calibrated": Format({"format": "float8_e4m3fn"}, calibrated=True),
    "fp8_e5m2": Format({"format": "float8_e5m2"}),
    "fp8_row": Format({"format": "float8_e4m3fn_rowwise"}),
    "int8_row": Format({"format": "int8_tensorwise", "convrot": False}, has_kernels=True),
    "int8_convrot": Format({"format": "int8_tensorwise", "convrot": True}, has_kernels=True),
    "w4a8": Format({"format": "asym_w4a8_int8", "layer_config": r'{"(^|_)blocks\\.": "w4a8"}'}, has_kernels=True),
    "w4a8_preset": Format({"format": "asym_w4a8_int8"}, has_kernels=True),
    "w6a8": Format({"format": "w6a8"}),
    "w4a4": Format({"format": "w4a4"}),
    "int8_block": Format({"format": "int8_blockwise"}),
    "fp8_block": Format({"format": "float8_e4m3fn_blockwise"}),
    "nvfp4": Format({"format": "nvfp4"}),
    "mxfp8": Format({"format": "mxfp8"}),
}

# Kernels of ComfyUI's INT8 and W4A8 layers → value of the setting LearnedRounding.NativeInt8.
KERNELS = {"stock": "off", "ours": "on", "auto": "auto"}


@dataclass(frozen=True)
class Variant:
    """A format, and the kernels if it has a choice."""

    format: str
    kernels: str | None = None

    def __str__(self) -> str:
        return f"{self.format}:{self.kernels}" if self.kernels else self.format


@dataclass(frozen=True)
class Setting:
    """How ComfyUI runs.

    Attributes:
        dynamic_vram: ComfyUI's dynamic VRAM, its default on GPUs; off, it decides from estimates what to load.
        free_vram: GiB of the card that are left for ComfyUI; None: all.
        reserve_vram: GiB for ``--reserve-vram``.
        compile: with the node TorchCompileModel.
        lora: with a LoRA over all linear layers of the blocks.
    """

    dynamic_vram: bool = False
    free_vram: float | None = None
    reserve_vram: float | None = None
    compile: bool = False
    lora: bool = False

    @property
    def server_key(self) -> tuple:
        """Equal for settings that one server serves."""
        return self.dynamic_vram, self.free_vram, self.reserve_vram

    def arguments(self, host: Host) -> list[str]:
        """Command-line arguments of ComfyUI; older versions have no dynamic VRAM."""
        known = _DISABLE_DYNAMIC in (host.path / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        dynamic = [_DISABLE_DYNAMIC] if known and not self.dynamic_vram else []
        return dynamic if self.reserve_vram is None else [*dynamic, "--reserve-vram", str(self.reserve_vram)]


SETTINGS = {
    "eager": Setting(),
    "compile": Setting(compile=True),
    "lora": Setting(lora=True),
    "free16": Setting(free_vram=16),
    "free12": Setting(free_vram=12),
    "dynamic": Setting(dynamic_vram=True),
}


def parse_variants(text: str) -> list[Variant]:
    """Parse ``FORMAT[:KERNELS],…`` to variants in the order of :data:`FORMATS`, so the source comes first.

    A format with a choice of kernels and none given is measured with each.

    Raises:
        ArgumentTypeError: an unknown format, or kernels of a format that has one implementation.
    """
    variants = []
    for part in text.split(","):
        name, _, kernels = part.partition(":")
        if name not in FORMATS:
            raise ArgumentTypeError(f"unknown format {name}; use {', '.join(FORMATS)}")
        choices = list(KERNELS) if FORMATS[name].has_kernels else []
        if kernels and kernels not in choices:
            raise ArgumentTypeError(f"{name} has no kernels {kernels}; use {', '.join(choices) or 'the format alone'}")
        variants += [Variant(name, choice) for choice in ([kernels] if kernels else choices or [None])]
    order = list(FORMATS)
    return sorted(variants, key=lambda variant: order.index(variant.format))


def make_file(source: Path, target: Path, name: str) -> None:
    """Quantize ``source`` to one of :data:`FORMATS`, rounded to nearest, on the GPU if there is one."""
    recipe = FORMATS[name].recipe
    calibration = _static_calibration(source, recipe) if FORMATS[name].calibrated else None
    quantize_file(source, target, recipe, calibration=calibration, overwrite=True)


def _static_calibration(source: Path, recipe: Recipe) -> InMemoryCalibration:
    """Statistics from which every layer gets a static scale of between 16/448 and 2·16/448.

    No activation of these models exceeds 16, so nothing is clipped. The histogram is one of small magnitudes, for which
    scale 1 is a bad choice, so no layer goes without. The speed does not depend on the value of the scale.
    """
    values = torch.randn(1 << 12, generator=torch.Generator().manual_seed(0)) / 256
    statistics = LayerStatistics(amax=torch.tensor([16.0]), histogram=histogram(values))
    with open_source(source) as opened:
        names = recipe.plan(opened).names("quantize")
    return InMemoryCalibration({name.removesuffix(".weight"): statistics for name in names})
