"""Images of the tiny model in ComfyUI by format and rounding, against full precision.

Files of every format are made by the nodes, by round to nearest and by calibrated rounding (Calibrate on the calibration
split of the prompts). The prompts of the images are in no calibration: the 12 of the split unseen, on which the model was
not trained either, and prompts of the split evaluation. Every seed samples all prompts as one batch. Sections:

weights only   the file with its weights dequantized to float32, so that only the weights differ
as run         the file itself through Load Diffusion Model: ComfyUI also quantizes activations where it does so on this device.
               On a CPU it does not for FP8, mxfp8 and nvfp4, and comfy-kitchen's eager functions run the other formats
LoRA merged    the calibrated file with a LoRA by Load LoRA (Model), which adds it to the weights and quantizes them again, against
               the original model with the LoRA
LoRA beside    the same by Load LoRA (Bypass), which computes it beside the quantized layers

``latent error`` is the relative error of the latents, ``dB`` the PSNR of the decoded images before rounding to 8 bits, with a
95 % interval from 10,000 bootstrap draws of prompts with all their seeds. ``gain dB`` is the paired difference to nearest,
``FP8 dB`` that to FP8 per tensor with round to nearest, ``merged dB`` that to the merged LoRA. Half of the tiny model's blocks
are its first and last, which the preset makes INT8 in formats below 8 bits, so these have rows with every attention and MLP
layer of the blocks in the format too (``all layers``); ``bits`` per weight shows the difference.
"""

import itertools
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np

from learned_rounding.benchmarks.calibration import decode_file, mean_interval
from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.benchmarks.tiny_model.graph import MODEL, STEPS, TinyGraph, decode_latents, latents
from learned_rounding.benchmarks.tiny_model.place import place, prompt_splits
from learned_rounding.hosts import ComfyServer, find_host
from learned_rounding.hosts.server import HOST_DEVICE
from learned_rounding.quant_core.formats.detect import detect_layers
from learned_rounding.quant_core.sources import SafetensorsFile

# Name → options of the recipe.
FORMATS: dict[str, dict] = {
    "FP8 per tensor": {"format": "float8_e4m3fn"},
    "INT8 per row, ConvRot": {"format": "int8_tensorwise", "granularity": "row", "convrot": "on"},
    "W6A8": {"format": "asym_w4a8_int8", "bits": 6},
    "W4A8": {"format": "asym_w4a8_int8"},
    "nvfp4": {"format": "nvfp4"},
    "nvfp4, smoothed": {"format": "nvfp4", "smoothing": True},
    "mxfp8": {"format": "mxfp8"},
    "convrot_w4a4": {"format": "convrot_w4a4"},
}
BASE = "FP8 per tensor"
BELOW_8_BITS = ("W6A8", "W4A8", "nvfp4", "nvfp4, smoothed", "convrot_w4a4")
LAYERS = r"joint_blocks\..*(attn|mlp)"
FORMATS |= {
    f"{name}, all layers": {
        **FORMATS[name],
        "layer_config": json.dumps(
            {LAYERS: {key: FORMATS[name][key] for key in FORMATS[name].keys() & {"format", "bits"}}}
        ),
    }
    for name in BELOW_8_BITS
}
# Section → loader of the LoRA.
SECTIONS = {
    "weights only": None,
    "as run": None,
    "LoRA merged": "LoraLoaderModelOnly",
    "LoRA beside": "LoraLoaderBypassModelOnly",
}
FIRST_CALIBRATION_SEED = 1001  # of consecutive seeds, one per prompt; images use the seeds 0, 1, …

__all__ = ["BELOW_8_BITS", "FORMATS", "LAYERS", "bits_per_weight", "main"]


def bits_per_weight(path: Path) -> float:
    """Bits of the quantized layers of a file, with their scales, per weight."""
    with SafetensorsFile(path) as file:
        layers = list(detect_layers(file))
        stored = sum(file.tensors[name].nbytes for layer in layers for name in layer.parts.values())
    return 8 * stored / sum(math.prod(layer.shape) for layer in layers)


def _quantize(server: ComfyServer) -> dict[tuple[str, str], Path]:
    """Calibrate and quantize in one workflow; returns the saved file of each (format, rounding)."""
    graph = TinyGraph()
    model = graph.load()
    calibration = graph.calibrate(model[0], seed=FIRST_CALIBRATION_SEED, dataset="calibration")
    saved = {}
    for number, (name, options) in enumerate(FORMATS.items()):
        for rounding in ("calibrated",) if "smoothing" in options else ("nearest", "calibrated"):
            known = calibration[0] if rounding == "calibrated" else None
            quantized = graph.quantize(model[0], **options, rounding=rounding, calibration=known)
            saved[name, rounding] = graph.save(quantized, f"case{number}-{rounding}", folder="models")
    outputs = server.queue(graph, timeout=3600).outputs
    return {case: Path(outputs[node.id]["text"][0]) for case, node in saved.items()}


def _sample(
    server: ComfyServer, name: str, prefix: str, loader: str | None, prompts: int, seeds: int, steps: int
) -> np.ndarray:
    """Sample all prompts with every seed; returns the latents (seeds, prompts, channels, height, width)."""
    graph = TinyGraph()
    model = graph.load(name)
    if loader:
        model = graph.lora(model[0], loader=loader)
    for seed in range(seeds):
        graph.sample_batch(model[0], f"{prefix}-{seed:02}", prompts, seed, steps)
    server.queue(graph, timeout=3600)
    return np.concatenate([latents(server.output_dir, f"{prefix}-{seed:02}") for seed in range(seeds)])


def _norm(latents: np.ndarray) -> np.ndarray:
    """Norm of each latent of (seeds, prompts, channels, height, width)."""
    return np.linalg.norm(latents.reshape(*latents.shape[:2], -1), axis=-1)


def _interval(values: np.ndarray, name: str) -> dict[str, float]:
    return dict(zip((name, f"{name} low", f"{name} high"), mean_interval(values), strict=True))


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        ("--host", {"help": "version of ComfyUI (default: the newest installed)"}),
        ("--prompts", {"type": int, "default": 32, "help": "number of prompts of the images"}),
        ("--seeds", {"type": int, "default": 2, "help": "images per prompt"}),
        ("--steps", {"type": int, "default": STEPS, "help": "sampling steps of the images"}),
        ("--sections", {"nargs": "+", "choices": SECTIONS, "default": [*SECTIONS], "help": "sections to measure"}),
    )
    splits = prompt_splits()
    prompts = [*splits["unseen"], *splits["evaluation"]][: 8 if args.quick else args.prompts]
    calibrated = splits["calibration"][: 8 if args.quick else None]
    sampling = {"prompts": len(prompts), "seeds": args.seeds, "steps": args.steps}
    sections = {section: SECTIONS[section] for section in args.sections}
    host, start = find_host(args.host), time.monotonic()
    rows: list[dict] = []
    decibels: dict[tuple[str, str, str], np.ndarray] = {}
    with tempfile.TemporaryDirectory() as base:
        place(base, prompts=prompts, batched=True)
        place(base, prompts=calibrated, dataset="calibration")
        with ComfyServer(host, base=base) as server:
            folder = server.models_dir / "diffusion_models"
            full, images = {}, {}
            for loader in (None, SECTIONS["LoRA merged"]):
                full[bool(loader)] = _sample(server, MODEL, f"full-{loader}", loader, **sampling)
                images[bool(loader)] = decode_latents(full[bool(loader)])
            files = _quantize(server)
            print(f"{len(files)} files quantized after {time.monotonic() - start:.0f} s", flush=True)
            for (section, loader), ((name, rounding), file) in itertools.product(sections.items(), files.items()):
                if loader and rounding == "nearest":
                    continue
                target = file
                if section == "weights only":
                    target = folder / f"decoded-{file.name}"
                    decode_file(file, target)
                sampled = _sample(server, target.name, f"{section.replace(' ', '')}-{file.stem}", loader, **sampling)
                expected = full[bool(loader)]
                values = -10 * np.log10(((decode_latents(sampled) - images[bool(loader)]) ** 2).mean(axis=(-3, -2, -1)))
                decibels[section, name, rounding] = values
                row = {"section": section, "format": name, "rounding": rounding, "bits": bits_per_weight(file)}
                row |= _interval(_norm(sampled - expected) / _norm(expected), "latent error") | _interval(values, "dB")
                bases = {"gain dB": (section, name, "nearest"), "FP8 dB": (section, BASE, "nearest")}
                if loader:
                    bases = {"merged dB": ("LoRA merged", name, rounding)}
                for column, base_case in bases.items():
                    if base_case in decibels and base_case != (section, name, rounding):
                        row |= _interval(values - decibels[base_case], column)
                rows.append(row)
                print(f"{section} {name} {rounding}: {row['dB']:.2f} dB", flush=True)
    finish(
        args,
        rows,
        comfyui=host.version,
        host_device=HOST_DEVICE,
        steps=args.steps,
        seeds=args.seeds,
        prompts=prompts,
        trained_on=[name for name in prompts if name not in splits["unseen"]],
        calibration_prompts=len(calibrated),
        seconds=time.monotonic() - start,
        dB_per_prompt={
            " / ".join(case): [round(float(value), 3) for value in values.mean(axis=0)]
            for case, values in decibels.items()
        },
    )


if __name__ == "__main__":
    main()
