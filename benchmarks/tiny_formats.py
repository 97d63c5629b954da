"""Images of the tiny model in ComfyUI by format and rounding, against full precision.

Files of every format are made by the nodes with each rounding. Calibrate samples prompts of the split calibration, then of the
showcase, then of the evaluation split without those of the images, in batches, and records calls of the model for sequential
and reconstructed rounding. The prompts of the images are in no calibration: the 12 of the split unseen, on which the model was
not trained either, and prompts of the split evaluation. Every seed samples all prompts as one batch. Sections:

weights only   the file with its weights dequantized to float32, so that only the weights differ
as run         the file itself through Load Diffusion Model: ComfyUI also quantizes activations where it does so on this device.
               On a CPU it does not for FP8, mxfp8 and nvfp4, and comfy-kitchen's eager functions run the other formats
LoRA merged    the file with a LoRA by Load LoRA (Model), which adds it to the weights and quantizes them again, against
               the original model with the LoRA; not for nearest
LoRA beside    the same by Load LoRA (Bypass), which computes it beside the quantized layers

``latent error`` is the relative error of the latents; ``MSE``, ``dB`` (PSNR) and ``SSIM`` are of the decoded images in 0…1 before
rounding to 8 bits; ``SNR dB`` is the signal-to-noise ratio of the latents after a step, which contain noise before the last. All have
95 % intervals from 10,000 bootstrap draws of prompts with all their seeds, since images of a prompt are correlated. Paired
differences of images with the same prompt and seed have the same intervals: ``gain`` to nearest, ``calibrated`` and ``sequential`` to
these roundings, ``FP8`` to FP8 per tensor with round to nearest, ``merged`` to the merged LoRA. Half of the tiny model's
blocks are its first and last, which the preset makes INT8 in formats below 8 bits, so these have rows with every attention and
MLP layer of the blocks in the format too (``all layers``); ``bits`` per weight shows the difference. ``output error`` is that of the
model in recorded validation calls, as sequential rounding records it in the file.

With ``--json`` the file is written after every row, and ``tiny_formats_report.py`` compares several of them.
"""

import itertools
import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from learned_rounding.benchmarks.calibration import decode_file, mean_interval
from learned_rounding.benchmarks.harness import arguments, save
from learned_rounding.benchmarks.tiny_formats_report import tables
from learned_rounding.benchmarks.tiny_model.graph import MODEL, STEPS, TinyGraph, decode_latents, latents
from learned_rounding.benchmarks.tiny_model.place import place, prompt_splits
from learned_rounding.hosts import ComfyServer, find_host
from learned_rounding.hosts.server import HOST_DEVICE
from learned_rounding.quant_core.comparison import ssim
from learned_rounding.quant_core.formats.detect import detect_layers
from learned_rounding.quant_core.output.metadata import PROVENANCE_KEY
from learned_rounding.quant_core.rounding.options import MODEL_ROUNDINGS
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
ROUNDINGS = ("nearest", "calibrated", *MODEL_ROUNDINGS)
LAYERWISE = (
    BASE,
    "mxfp8",
    "nvfp4, smoothed",
    "nvfp4, smoothed, all layers",
)  # without the roundings that run the model
# Section → loader of the LoRA.
SECTIONS = {
    "weights only": None,
    "as run": None,
    "LoRA merged": "LoraLoaderModelOnly",
    "LoRA beside": "LoraLoaderBypassModelOnly",
}
CALIBRATION_SEED = 1001  # first of consecutive seeds, one per batch; images use the seeds 0, 1, …
BATCH = 8  # prompts per run of the calibration; a call of the model has 2 · 8 · 16 tokens of images
MARKS = (1, 2, 5, 10, 15)  # steps after which latents are compared, and the last
METRICS = ("MSE", "dB", "SSIM")

Case = tuple[str, str]  # format, rounding

__all__ = [
    "BELOW_8_BITS",
    "FORMATS",
    "LAYERS",
    "ROUNDINGS",
    "Images",
    "bits_per_weight",
    "calibration_prompts",
    "family",
    "main",
]


def family(name: str) -> str:
    """Name of a format with its variants, as ``--formats`` takes it: "W4A8, all layers" is "w4a8"."""
    return name.split()[0].rstrip(",").lower()


def calibration_prompts(images: list[str], count: int) -> list[str]:
    """``count`` prompts, or as many as there are, on which the model was trained and that are not among ``images``."""
    splits = prompt_splits()
    known = [*splits["calibration"], *splits["showcase"], *splits["evaluation"]]
    found = [name for name in known if name not in images][:count]
    return found[: len(found) // BATCH * BATCH]


def bits_per_weight(path: Path) -> float:
    """Bits of the quantized layers of a file, with their scales, per weight."""
    with SafetensorsFile(path) as file:
        layers = list(detect_layers(file))
        stored = sum(file.tensors[name].nbytes for layer in layers for name in layer.parts.values())
    return 8 * stored / sum(math.prod(layer.shape) for layer in layers)


def _output_error(path: Path) -> dict[str, float]:
    """Column with the error of the model that sequential rounding recorded in the file; none for other roundings."""
    with SafetensorsFile(path) as file:
        origin = json.loads(file.metadata[PROVENANCE_KEY])
    error = origin.get("sequential", {}).get("output_error")
    return {} if error is None else {"output error": error}


@dataclass(frozen=True)
class Images:
    """Latents (marks, seeds, prompts, channels, height, width) of a model, and the images of the last ones."""

    latents: np.ndarray
    images: np.ndarray

    def compare(self, expected: "Images") -> dict[str, np.ndarray]:
        """Metric → values (seeds, prompts); the signal-to-noise ratio has a first dimension of marks."""
        error, signal = _norm(self.latents - expected.latents), _norm(expected.latents)
        mse = ((self.images - expected.images) ** 2).mean(axis=(-3, -2, -1))
        pairs = zip(_tensors(expected.images), _tensors(self.images), strict=True)
        return {
            "latent error": error[-1] / signal[-1],
            "MSE": mse,
            "dB": -10 * np.log10(mse),
            "SSIM": np.array([ssim(*pair) for pair in pairs]).reshape(mse.shape),
            "SNR dB": 20 * np.log10(signal / error),
        }


def _norm(latents: np.ndarray) -> np.ndarray:
    """Norm of each latent of (marks, seeds, prompts, channels, height, width)."""
    return np.linalg.norm(latents.reshape(*latents.shape[:3], -1), axis=-1)


def _tensors(images: np.ndarray) -> torch.Tensor:
    """Images (seeds, prompts, height, width, 3) as (images, 1, height, width, 3)."""
    return torch.from_numpy(images).flatten(0, 1).unsqueeze(1)


def _interval(values: np.ndarray, name: str) -> dict[str, float]:
    return dict(zip((name, f"{name} low", f"{name} high"), mean_interval(values), strict=True))


class _Quantizer:
    """Calibrate once and quantize with the nodes.

    Attributes:
        learned: summary of Calibrate.
        seconds: duration of Calibrate.
    """

    def __init__(self, server: ComfyServer, seed: int, replay_calls: int):
        self._server = server
        self._options = {"seed": seed, "dataset": "calibration", "batch": BATCH, "replay_calls": replay_calls}
        graph, _, calibration = self._start()
        summary = graph.add("PreviewAny", source=calibration[2])
        result = server.queue(graph, timeout=3600)
        self.learned, self.seconds = result.outputs[summary.id]["text"][0], result.seconds

    def _start(self):
        """The graph with the nodes that ComfyUI does not run again: it keeps their results from one workflow to the next."""
        graph = TinyGraph()
        model = graph.load()
        return graph, model, graph.calibrate(model[0], **self._options)

    def quantize(self, name: str, rounding: str, prefix: str) -> tuple[Path, float]:
        """Return the saved file and the duration in s."""
        graph, model, calibration = self._start()
        known = None if rounding == "nearest" else calibration[0]
        quantized = graph.quantize(model[0], **FORMATS[name], rounding=rounding, calibration=known)
        saved = graph.save(quantized, prefix, folder="models")
        result = self._server.queue(graph, timeout=3600)
        return Path(result.outputs[saved.id]["text"][0]), result.seconds


@dataclass(frozen=True)
class _Sampler:
    """Sample all prompts of the images with every seed."""

    server: ComfyServer
    prompts: int
    seeds: int
    marks: list[int]

    def sample(self, name: str, prefix: str, loader: str | None) -> Images:
        """Sample with the model file ``name`` and, with a loader, a LoRA."""
        graph = TinyGraph()
        model = graph.load(name)
        if loader:
            model = graph.lora(model[0], loader=loader)
        names = [f"{prefix}-{seed:02}" for seed in range(self.seeds)]
        for seed, each in enumerate(names):
            graph.sample_batch(model[0], each, self.prompts, self.marks, seed)
        self.server.queue(graph, timeout=3600)
        folder = self.server.output_dir
        sampled = np.stack(
            [np.concatenate([latents(folder, f"{each}-{mark:02}") for each in names]) for mark in self.marks]
        )
        return Images(sampled, decode_latents(sampled[-1]))


def _parse():
    families = list(dict.fromkeys(map(family, FORMATS)))
    return arguments(
        __doc__.splitlines()[0],
        ("--host", {"help": "version of ComfyUI (default: the newest installed)"}),
        ("--prompts", {"type": int, "default": 32, "help": "number of prompts of the images"}),
        ("--seeds", {"type": int, "default": 2, "help": "images per prompt"}),
        ("--steps", {"type": int, "default": STEPS, "help": "sampling steps of the images"}),
        ("--sections", {"nargs": "+", "choices": SECTIONS, "default": [*SECTIONS], "help": "sections to measure"}),
        ("--formats", {"nargs": "+", "choices": families, "default": families, "help": "formats with their variants"}),
        ("--roundings", {"nargs": "+", "choices": ROUNDINGS, "default": ROUNDINGS[:2], "help": "roundings to measure"}),
        ("--calibration-prompts", {"type": int, "default": 64, "help": f"at most 96; a multiple of {BATCH}"}),
        ("--calibration-seed", {"type": int, "default": CALIBRATION_SEED, "help": "first seed of the calibration"}),
        ("--replay-calls", {"type": int, "default": 128, "help": "recorded calls of the model"}),
    )


def main() -> None:
    args = _parse()
    splits = prompt_splits()
    prompts = [*splits["unseen"], *splits["evaluation"]][: 8 if args.quick else args.prompts]
    calibrated = calibration_prompts(prompts, 32 if args.quick else args.calibration_prompts)
    marks = [*(mark for mark in MARKS if mark < args.steps), args.steps]
    cases = [
        (name, rounding)
        for name, rounding in itertools.product(FORMATS, ROUNDINGS)
        if family(name) in args.formats
        and rounding in args.roundings
        and (name not in LAYERWISE or rounding not in MODEL_ROUNDINGS)
        and ("smoothing" not in FORMATS[name] or rounding == "calibrated")
    ]
    host, start = find_host(args.host), time.monotonic()
    rows: list[dict] = []
    measured: dict[tuple[str, str, str], dict[str, np.ndarray]] = {}
    about = {
        "comfyui": host.version,
        "host_device": HOST_DEVICE,
        "steps": args.steps,
        "seeds": args.seeds,
        "prompts": prompts,
        "trained_on": [name for name in prompts if name not in splits["unseen"]],
        "calibration_prompts": len(calibrated),
        "calibration_seed": args.calibration_seed,
    }
    with tempfile.TemporaryDirectory() as base:
        place(base, prompts=prompts, batch=len(prompts))
        place(base, prompts=calibrated, dataset="calibration", batch=BATCH)
        with ComfyServer(host, base=base) as server:
            folder = server.models_dir / "diffusion_models"
            sampler = _Sampler(server, len(prompts), args.seeds, marks)
            loaders = dict.fromkeys(bool(SECTIONS[section]) for section in args.sections)
            full = {
                lora: sampler.sample(MODEL, f"full-{lora}", SECTIONS["LoRA merged"] if lora else None)
                for lora in loaders
            }
            quantizer = _Quantizer(server, args.calibration_seed, args.replay_calls)
            print(f"calibrated in {quantizer.seconds:.1f} s: {quantizer.learned}", flush=True)
            about |= {"calibration": quantizer.learned, "calibration_seconds": quantizer.seconds}
            files: dict[Case, tuple[Path, dict]] = {}
            for number, case in enumerate(cases):
                file, seconds = quantizer.quantize(*case, prefix=f"case{number:02}")
                files[case] = file, {"bits": bits_per_weight(file), "seconds": seconds, **_output_error(file)}
                print(f"{' '.join(case)}: quantized in {seconds:.1f} s", flush=True)
            for section, (case, (file, columns)) in itertools.product(args.sections, files.items()):
                loader, target = SECTIONS[section], file
                if loader and case[1] == "nearest":
                    continue
                if section == "weights only":
                    target = folder / f"decoded-{file.name}"
                    decode_file(file, target)
                sampled = sampler.sample(target.name, f"{section.replace(' ', '')}-{file.stem}", loader)
                measured[(section, *case)] = sampled.compare(full[bool(loader)])
                row = _row(measured, (section, *case), marks)
                rows.append({"section": section, "format": case[0], "rounding": case[1], **columns, **row})
                print(f"{section} {' '.join(case)}: {row['dB']:.2f} dB", flush=True)
                save(args, rows, **about, **_per_prompt(measured), seconds=time.monotonic() - start)
    print(tables(rows))
    print(*(f"{key}: {value}" for key, value in about.items()), f"seconds: {time.monotonic() - start:.0f}", sep="\n")


def _row(measured: dict, key: tuple[str, str, str], marks: list[int]) -> dict[str, object]:
    """Columns of metrics, and of differences to what was measured before."""
    section, name, rounding = key
    values = measured[key]
    bases = {
        "gain": (section, name, "nearest"),
        "calibrated": (section, name, "calibrated"),
        "sequential": (section, name, "sequential"),
        "FP8": (section, BASE, "nearest"),
        "merged": ("LoRA merged", name, rounding),
    }
    row = {}
    for metric in ("latent error", *METRICS):
        row |= _interval(values[metric], metric)
    row["SNR dB"] = {mark: mean_interval(snr) for mark, snr in zip(marks, values["SNR dB"], strict=True)}
    for base, other in bases.items():
        if other not in measured or other == key or (base == "merged" and section != "LoRA beside"):
            continue
        for metric in METRICS:
            row |= _interval(values[metric] - measured[other][metric], f"{base} {metric}")
        change = values["SNR dB"] - measured[other]["SNR dB"]
        row[f"{base} SNR dB"] = {mark: mean_interval(snr) for mark, snr in zip(marks, change, strict=True)}
    return row


def _per_prompt(measured: dict) -> dict[str, dict[str, list[float]]]:
    """Means over the seeds, by section, format and rounding."""
    return {
        f"{metric}_per_prompt": {
            " / ".join(case): [float(f"{value:.6g}") for value in values[metric].mean(axis=0)]
            for case, values in measured.items()
        }
        for metric in METRICS
    }


if __name__ == "__main__":
    main()
