"""Image error of the tiny model in ComfyUI, by rounding method and by choice of formats.

Everything runs in stock ComfyUI on a CPU. GPTQ (rounding calibrated) is calibrated on the calibration split of the
prompts, one seed per prompt; images are evaluated on the evaluation split with other seeds. Sections:

weights only   the saved file with its weights dequantized to float32, so that only the weights differ
w8a8           the saved file itself: ComfyUI also quantizes the activations of INT8 layers. On a CPU it dequantizes FP8
               weights and does not quantize activations, so FP8 has no row here. ``floor`` is the original model with
               quantized activations: the error that remains with exact weights

Methods: ``calibrated + X̂`` uses quantized activations (:class:`PairedHessian`); ``auto`` is format measured with
sensitivities, with the size of nearest as its target; ``calibrated, 12 prompts`` uses fewer calibration prompts.

``MSE`` is the mean squared error of images in 0…1 against full precision: ``unrounded`` as decoded, and ``PNG`` as 8-bit
files, whose rounding adds up to 1/(6·255²) = 2.6e-6. ``×`` is the geometric mean over images of the unrounded error
relative to nearest, with a 95 % interval from 10,000 bootstrap draws of prompts with all their seeds. ``gain`` is a
layer's output error relative to nearest (a ratio of norms) on validation activations, as the node reports it;
``gain here`` is the same on the calibration activations. A large difference between the two means that there are too few
calibration prompts.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.benchmarks.tiny_model.graph import (
    MODEL,
    STEPS,
    TinyGraph,
    decode_latents,
    latents,
    pictures,
    psnr,
)
from learned_rounding.benchmarks.tiny_model.place import ASSETS, place, prompt_splits
from learned_rounding.hosts import ComfyServer, find_host
from learned_rounding.hosts.server import PACK, PACK_NAME
from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.calibration import CalibrationFile
from learned_rounding.quant_core.comparison import ssim
from learned_rounding.quant_core.formats.detect import detect_layers
from learned_rounding.quant_core.sources import SafetensorsFile

FORMATS = {
    "float8_e4m3fn tensor": {"format": "float8_e4m3fn", "granularity": "tensor"},
    "int8_tensorwise row": {"format": "int8_tensorwise", "granularity": "row"},
    "int8_tensorwise row, ConvRot": {"format": "int8_tensorwise", "granularity": "row", "convrot": "on"},
}
# Method → the calibration it uses, if any.
METHODS = {
    "nearest": None,
    "principal": None,
    "calibrated": "full",
    "calibrated, 12 prompts": "few",
    "calibrated + X̂": "with quantized inputs",
    "auto": "full",
}
FEW = 12  # prompts
WEIGHTS_ONLY = ("calibrated, 12 prompts",)  # methods without a row in section w8a8
MARKS = [5, 10, 15, STEPS]  # steps after which latents are compared
FIRST_CALIBRATION_SEED = 1001  # of consecutive seeds, one per prompt; evaluation uses the seeds 0, 1, …
TEXT_ENCODER = Path(__file__).parent / "results" / "rounding_minilm_h200.json"
DRAWS = 10_000

__all__ = ["FORMATS", "METHODS", "decode_file", "main", "mean_interval", "ratio_interval"]


def decode_file(source: Path, target: Path) -> int:
    """Dequantize a file to an unquantized float32 file; returns the number of dequantized layers."""
    with SafetensorsFile(source) as file:
        layers = list(detect_layers(file))
    tensors = load_file(source)
    for layer in layers:
        parts = {suffix: tensors.pop(name) for suffix, name in layer.parts.items()}
        tensors[f"{layer.name}.weight"] = layer.dequantize(parts["weight"], parts)
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, target)
    return len(layers)


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of ``values`` (seeds, prompts) and its 95 % interval.

    The bootstrap draws prompts with all their seeds, because images of one prompt are correlated.
    """
    draws = np.random.default_rng(0).integers(values.shape[1], size=(DRAWS, values.shape[1]))
    low, high = np.quantile(values.mean(axis=0)[draws].mean(axis=1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def ratio_interval(error: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Return the geometric mean of ``error / base``, both (seeds, prompts), and its 95 % interval."""
    mean, low, high = mean_interval(np.log(error / base))
    return float(np.exp(mean)), float(np.exp(low)), float(np.exp(high))


class _Sampler:
    """Sample a model with every prompt and seed; returns latents, 8-bit images, and images before rounding to 8 bits.

    Latents are (marks, seeds, prompts, channels, height, width), images (seeds, prompts, height, width, 3).
    """

    def __init__(self, server: ComfyServer, seeds: int):
        self._server, self._seeds = server, seeds

    def __call__(
        self, name: str, prefix: str, quantized_as: Path | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        graph = TinyGraph()
        model = graph.load(name)
        if quantized_as:
            model = graph.add("QuantizeActivations", model=model[0], file=str(quantized_as))
        for seed in range(self._seeds):
            graph.sample_in_parts(model[0], f"{prefix}-{seed:02}", MARKS, seed=seed)
        self._server.queue(graph, timeout=1800)
        folder, seeds = self._server.output_dir, range(self._seeds)
        sampled = np.stack(
            [np.stack([latents(folder, f"{prefix}-{seed:02}-{mark:02}") for seed in seeds]) for mark in MARKS]
        )
        saved = np.stack([pictures(folder, f"{prefix}-{seed:02}") for seed in seeds])
        images = decode_latents(sampled[-1])
        if np.abs(images - saved).max() > 1.01 / 255:  # ComfyUI truncates to 8 bits
            raise SystemExit(f"{prefix}: the images saved by ComfyUI differ from the decoded latents.")
        return sampled, saved, images


def _quantize(server: ComfyServer) -> tuple[dict[tuple[str, str], Path], dict, Path, dict[str, str]]:
    """Calibrate and quantize with every format and method.

    Returns files and {layer: gain} by (format, method), the full calibration, and the summaries of the calibrations.
    """
    graph = TinyGraph()
    model = graph.load()
    calibrations = {
        "full": graph.calibrate(model[0], seed=FIRST_CALIBRATION_SEED, dataset="calibration", sensitivity=True),
        "few": graph.calibrate(model[0], seed=FIRST_CALIBRATION_SEED, dataset="few"),
        "with quantized inputs": graph.calibrate(
            model[0], seed=FIRST_CALIBRATION_SEED, dataset="calibration", keep="with quantized inputs"
        ),
    }
    summaries = {name: graph.add("PreviewAny", source=node[2]) for name, node in calibrations.items()}
    for name in calibrations:
        graph.add("LearnedRoundingSaveCalibration", calibration=calibrations[name][0], filename_prefix=name.split()[0])
    result = server.queue(graph, timeout=3600)
    summary = {name: result.outputs[node.id]["text"][0] for name, node in summaries.items()}
    files, gains = {}, {}
    for number, (name, choices) in enumerate(FORMATS.items()):
        for case, (method, calibration) in enumerate(METHODS.items()):
            options = {**choices, "rounding": "auto" if calibration else method}
            if method == "auto":
                options = {"format": "measured", "target_size": _tensor_bytes(files[name, "nearest"]) / 1e9}
            elif method == "calibrated + X̂" and not choices["format"].startswith("int8"):
                continue
            files[name, method], gains[name, method] = _save(server, f"case{number}-{case}", calibration, options)
    (path,) = server.output_dir.rglob("full*.safetensors")
    return files, gains, path, summary


def _save(server: ComfyServer, name: str, calibration: str | None, options: dict) -> tuple[Path, dict[str, float]]:
    """Quantize the model with a saved calibration; returns the file and the gain of each layer."""
    graph = TinyGraph()
    inputs = {}
    if calibration:
        (file,) = server.output_dir.rglob(f"{calibration.split()[0]}*.calib.safetensors")
        inputs["calibration"] = graph.add("LearnedRoundingLoadCalibration", file=file.name)[0]
    saved = graph.save(graph.quantize(graph.load()[0], **options, **inputs), name, folder="models")
    result = server.queue(graph, timeout=3600)
    layers = [event.data for event in result.of("learned_rounding.progress") if event.data["state"] == "layer"]
    gains = {layer["name"]: layer["gain"] for layer in layers if layer["gain"] is not None} if calibration else {}
    return Path(result.outputs[saved.id]["text"][0]), gains


def _tensor_bytes(path: Path) -> int:
    """Return the size of a file's tensors in bytes."""
    with SafetensorsFile(path) as file:
        return sum(info.nbytes for info in file.tensors.values())


def _calibration_gains(path: Path, choices: dict, layers: list[str]) -> list[float]:
    """Return the gain of each layer on the calibration activations."""
    weights = load_file(ASSETS / MODEL)
    choices = {**choices, "convrot": "convrot" in choices}
    gains = []
    with CalibrationFile(path) as calibration:
        for name in layers:
            hessian = calibration.layer_statistics(name.removesuffix(".weight")).hessian
            gains.append(
                quantize_weight(weights[name], hessian=hessian, rounding="calibrated", **choices).solution.gain
            )
    return gains


def _compare(full: tuple, sampled: tuple, base: np.ndarray | None) -> tuple[dict, np.ndarray]:
    """Compare results of :class:`_Sampler`; returns a row of metrics and the error of each image.

    ``base``: errors of nearest.
    """
    error = ((full[2] - sampled[2]) ** 2).mean(axis=(-3, -2, -1))
    decibels = -10 * np.log10(error)
    row = {
        "MSE unrounded": float(error.mean()),
        "MSE PNG": float(((full[1] - sampled[1]) ** 2).mean()),
        "PSNR mean dB": float(decibels.mean()),
        "PSNR worst dB": float(decibels.min()),
        "PSNR mean dB PNG": float(
            np.mean([psnr(a, b) for a, b in zip(_flatten(full[1]), _flatten(sampled[1]), strict=True)])
        ),
        "SSIM": ssim(torch.from_numpy(_flatten(full[2])), torch.from_numpy(_flatten(sampled[2]))),
    }
    for mark, expected, actual in zip(MARKS, full[0], sampled[0], strict=True):
        row[f"latent SNR dB after {mark}"] = float(
            10 * np.log10((expected**2).sum() / ((expected - actual) ** 2).sum())
        )
    if base is not None:
        row["×"], row["low"], row["high"] = ratio_interval(error, base)
        row["better"] = f"{int((error < base).sum())} of {error.size}"
    return row, error


def _flatten(images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, *images.shape[2:])


def _text_encoder() -> dict:
    """Return the error of the text embedding by format and method, weights only, from the results of `rounding.py`."""
    per = {
        "float8_e4m3fn tensor": "tensor",
        "int8_tensorwise row": "row",
        "int8_tensorwise row, ConvRot": "row, rotated",
    }
    methods = {"nearest": "nearest", "principal": "principal", "calibrated, 1 sweep": "calibrated"}
    errors: dict = {"source": TEXT_ENCODER.name}
    for row in json.loads(TEXT_ENCODER.read_text(encoding="utf-8"))["rows"]:
        for name, choices in FORMATS.items():
            if (row["format"], row["per"]) == (choices["format"], per[name]) and row["method"] in methods:
                errors.setdefault(name, {})[methods[row["method"]]] = row["embedding"]
    return errors


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0], ("--host", {"help": "version of ComfyUI (default: the newest installed)"})
    )
    seeds, evaluation_prompts, calibration_prompts = (2, 4, 8) if args.quick else (4, 8, 50)
    host = find_host(args.host)
    splits = prompt_splits()
    evaluation = splits["evaluation"][:evaluation_prompts]
    calibrated = splits["calibration"][:calibration_prompts]
    rows, layers = [], {}
    errors: dict[tuple[str, str, str], np.ndarray] = {}
    image_mse: dict[str, dict[str, dict]] = {"weights only": {}, "w8a8": {}}
    with tempfile.TemporaryDirectory() as base:
        place(base, prompts=evaluation)
        place(base, prompts=calibrated, dataset="calibration")
        place(base, prompts=calibrated[:FEW], dataset="few")
        links = {PACK_NAME: PACK, "quantized_activations": Path(__file__).parent / "quantized_activations"}
        with ComfyServer(host, base=base, links=links) as server:
            folder = server.models_dir / "diffusion_models"
            sample = _Sampler(server, seeds)
            files, gains, calibration, summary = _quantize(server)
            full = sample(MODEL, "full")
            save_file(
                {name: tensor.float() for name, tensor in load_file(ASSETS / MODEL).items()},
                folder / "exact.safetensors",
            )
            if not np.array_equal(sample("exact.safetensors", "exact")[0], full[0]):
                raise SystemExit("A float32 copy of the model gives other latents than the model.")
            for (name, method), file in files.items():
                for section in image_mse:
                    if section == "w8a8" and (not FORMATS[name]["format"].startswith("int8") or method in WEIGHTS_ONLY):
                        continue
                    target = file
                    if section == "weights only":
                        target = folder / f"decoded-{file.name}"
                        decode_file(file, target)
                    sampled = sample(str(target.relative_to(folder)), f"{section[:2]}-{file.stem}")
                    base_error = errors.get((section, name, "nearest"))
                    row, errors[section, name, method] = _compare(full, sampled, base_error)
                    row["bytes"] = _tensor_bytes(file)
                    if layer_gains := gains[name, method]:
                        row |= {
                            "gain median": float(np.median(list(layer_gains.values()))),
                            "gain worst": max(layer_gains.values()),
                        }
                    if section == "weights only" and method == "calibrated":
                        calibration_gains = _calibration_gains(calibration, FORMATS[name], list(layer_gains))
                        row["gain here"] = float(np.median(calibration_gains))
                        layers[name] = {
                            layer: [round(layer_gains[layer], 3), round(gain, 3)]
                            for layer, gain in zip(layer_gains, calibration_gains, strict=True)
                        }
                    rows.append({"section": section, "format": name, "method": method, **row})
                    image_mse[section].setdefault(name, {})[method] = {
                        "png": row["MSE PNG"],
                        "unrounded": row["MSE unrounded"],
                    }
                if method == "nearest" and FORMATS[name]["format"].startswith("int8"):
                    sampled = sample(MODEL, f"floor-{file.stem}", quantized_as=file)
                    row, _ = _compare(full, sampled, errors["w8a8", name, "nearest"])
                    rows.append({"section": "w8a8", "format": name, "method": "floor", **row})
                    image_mse["w8a8"][name]["floor"] = {"png": row["MSE PNG"], "unrounded": row["MSE unrounded"]}

    def nested(section: str, kind: str) -> dict:
        return {
            name: {method: values[kind] for method, values in methods.items()}
            for name, methods in image_mse[section].items()
        }

    finish(
        args,
        sorted(rows, key=lambda row: row["section"], reverse=True),
        comfyui=host.version,
        seeds=seeds,
        prompts=evaluation,
        calibration={"prompts": calibrated, "first seed": FIRST_CALIBRATION_SEED, "learned": summary},
        image_mse=nested("weights only", "png"),
        image_mse_w8a8=nested("w8a8", "png"),
        image_mse_unrounded=nested("weights only", "unrounded"),
        image_mse_w8a8_unrounded=nested("w8a8", "unrounded"),
        text_encoder=_text_encoder(),
        mse_per_picture={
            " / ".join(key): [[float(f"{value:.4g}") for value in line] for line in image_errors]
            for key, image_errors in errors.items()
        },
        gains_per_layer_held_out_and_here=layers,
    )


if __name__ == "__main__":
    main()
