"""How near to full precision the tiny model's pictures stay in ComfyUI, by rounding and by choice of formats.

Everything runs in stock ComfyUI on a CPU. Calibrated rounding learns from the calibration split of the prompts, each with
a seed of its own; judged are other prompts (the evaluation split) with other seeds. Two sections:

weights only   the saved file with its codes decoded to float32, so that nothing but the weights has changed
w8a8           the saved file as it is: ComfyUI quantizes the activations of INT8 layers as well. On a CPU it decodes FP8
               weights and leaves the activations alone, so FP8 has no row here. ``floor`` is the original model whose
               activations are quantized alike: what is left when weights cost nothing

Methods: ``calibrated + X̂`` rounds against quantized inputs; ``auto`` is format measured, with sensitivities, in as many
bytes as nearest has; ``calibrated, 12 prompts`` learns from fewer, to tell what more would bring.

``MSE`` is the mean squared error of the pictures against full precision, in 0…1, as decoded (``unrounded``) and as PNG
files of 8 bits hold it, whose rounding of both pictures adds up to 1/(6·255²) = 2.6e-6. ``×`` is the geometric mean, over
pictures, of the unrounded error relative to nearest, with a 95 % interval: 10,000 bootstrap draws of prompts with all
their seeds. ``gain`` are the layers' output errors relative to nearest (roots of squares, so square them to compare) on
held-out calibration runs, as the node reports them; ``gain here`` the same on the very runs that were learned from, where
nothing is held out. The two are far apart where the calibration saw too few prompts.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.benchmarks.tiny_model.graph import MODEL, STEPS, TinyGraph, latents, pictures, psnr
from learned_rounding.benchmarks.tiny_model.model import Decoder
from learned_rounding.benchmarks.tiny_model.place import ASSETS, place, prompt_splits
from learned_rounding.hosts import ComfyServer, available_hosts
from learned_rounding.hosts.server import PACK, PACK_NAME
from learned_rounding.quant_core.calibration import CalibrationFile
from learned_rounding.quant_core.layer import quantize_weight
from learned_rounding.quant_core.output import layer_configs
from learned_rounding.quant_core.output.verify import layer_encoding
from learned_rounding.quant_core.sources import SafetensorsFile

FORMATS = {
    "float8_e4m3fn tensor": {"format": "float8_e4m3fn", "granularity": "tensor"},
    "int8_tensorwise row": {"format": "int8_tensorwise", "granularity": "row"},
    "int8_tensorwise row, ConvRot": {"format": "int8_tensorwise", "granularity": "row", "convrot": "on"},
}
# Method → the calibration it takes, if any.
METHODS = {
    "nearest": None,
    "principal": None,
    "calibrated": "full",
    "calibrated, 12 prompts": "few",
    "calibrated + X̂": "with quantized inputs",
    "auto": "full",
}
FEW = 12  # prompts
WEIGHTS_ALONE = ("calibrated, 12 prompts",)  # not sampled with quantized activations
MARKS = [5, 10, 15, STEPS]  # steps after which latents are compared
FIRST_CALIBRATION_SEED = 1001  # counted up for each prompt; the seeds judged are 0, 1, …
TEXT_ENCODER = Path(__file__).parent / "results" / "rounding_minilm_h200.json"
DRAWS = 10_000

__all__ = ["FORMATS", "METHODS", "decode_file", "main", "ratio_interval", "ssim"]


def decode_file(source: Path, target: Path) -> int:
    """Write a quantized file's weights in float32, without a trace of quantization; returns how many were decoded."""
    with SafetensorsFile(source) as file:
        configs, _ = layer_configs(file)
        encodings = {layer: layer_encoding(layer, config, file.tensors) for layer, config in configs.items()}
    tensors = load_file(source)
    for layer, encoding in encodings.items():
        tensors[f"{layer}.weight"] = encoding.decode(tensors[f"{layer}.weight"], tensors.pop(f"{layer}.weight_scale"))
        del tensors[f"{layer}.comfy_quant"]
        tensors.pop(f"{layer}.input_scale", None)
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, target)
    return len(encodings)


def ratio_interval(error: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of ``error / base``, both (seeds, prompts), and its 95 % interval.

    Prompts are drawn with all their seeds, since pictures of one prompt resemble each other.
    """
    logs = np.log(error / base)
    draws = np.random.default_rng(0).integers(logs.shape[1], size=(DRAWS, logs.shape[1]))
    low, high = np.quantile(logs.mean(axis=0)[draws].mean(axis=1), (0.025, 0.975))
    return tuple(float(np.exp(value)) for value in (logs.mean(), low, high))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of pictures (n, height, width, 3) in 0…1, (n,): Wang et al. 2004, Gaussian window of 11 pixels."""
    x, y = (torch.from_numpy(images).double().movedim(-1, 1) for images in (a, b))
    window = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(window, window)
    kernel = (window / window.sum()).expand(3, 1, 11, 11)

    def blur(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(images, kernel, groups=3)

    mean_x, mean_y = blur(x), blur(y)
    spread = blur(x * x) + blur(y * y) - mean_x**2 - mean_y**2
    shared = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mean_x * mean_y + c1) * (2 * shared + c2) / ((mean_x**2 + mean_y**2 + c1) * (spread + c2))
    return found.mean(dim=(1, 2, 3)).numpy()


class _Sampler:
    """Samples models with every prompt and seed; each returns latents, pictures, and pictures before they are rounded.

    Latents are (marks, seeds, prompts, channels, height, width).
    """

    def __init__(self, server: ComfyServer, seeds: int):
        self._server, self._seeds = server, seeds
        self._decoder = Decoder().eval()
        self._decoder.load_state_dict(load_file(ASSETS / "vae_approx" / "taesd3_decoder.safetensors"))

    def __call__(
        self, name: str, prefix: str, quantized_as: Path | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        graph = TinyGraph()
        model = graph.load(name)
        if quantized_as:
            model = graph.add("QuantizeInputs", model=model[0], file=str(quantized_as))
        for seed in range(self._seeds):
            graph.sample_in_parts(model[0], f"{prefix}-{seed:02}", MARKS, seed=seed)
        self._server.queue(graph, timeout=1800)
        folder, seeds = self._server.output_dir, range(self._seeds)
        found = np.stack(
            [np.stack([latents(folder, f"{prefix}-{seed:02}-{mark:02}") for seed in seeds]) for mark in MARKS]
        )
        shown = np.stack([pictures(folder, f"{prefix}-{seed:02}") for seed in seeds])
        images = self._decode(found[-1])
        if np.abs(images - shown).max() > 1.01 / 255:  # ComfyUI cuts off where it does not round
            raise SystemExit(f"{prefix}: the pictures that ComfyUI saved are not those of its latents.")
        return found, shown, images

    def _decode(self, found: np.ndarray) -> np.ndarray:
        """Pictures (seeds, prompts, height, width, 3) of latents as ComfyUI's decoder makes them, not rounded."""
        values = torch.from_numpy(found).float().reshape(-1, *found.shape[-3:])
        with torch.no_grad():
            images = self._decoder((values - 0.0609) * 1.5305).clamp(0, 1)  # SD3 latents → the model's own space
        return images.movedim(1, -1).double().numpy().reshape(*found.shape[:2], *images.shape[-2:], 3)


def _quantize(server: ComfyServer) -> tuple[dict[tuple[str, str], Path], dict, Path, dict[str, str]]:
    """Calibrate and save every format × method: files, {layer: gain} of each, the calibration, and what was learned."""
    graph = TinyGraph()
    model = graph.load()
    calibrations = {
        "full": graph.calibrate(model[0], seed=FIRST_CALIBRATION_SEED, dataset="calibration", sensitivity=True),
        "few": graph.calibrate(model[0], seed=FIRST_CALIBRATION_SEED, dataset="few"),
        "with quantized inputs": graph.calibrate(
            model[0], seed=FIRST_CALIBRATION_SEED, dataset="calibration", keep="with quantized inputs"
        ),
    }
    shown = {name: graph.add("PreviewAny", source=node[2]) for name, node in calibrations.items()}
    for name in calibrations:
        graph.add("LearnedRoundingSaveCalibration", calibration=calibrations[name][0], filename_prefix=name.split()[0])
    result = server.queue(graph, timeout=3600)
    learned = {name: result.outputs[node.id]["text"][0] for name, node in shown.items()}
    files, gains = {}, {}
    for number, (name, choices) in enumerate(FORMATS.items()):
        for case, (method, known) in enumerate(METHODS.items()):
            options = {**choices, "rounding": "auto" if known else method}
            if method == "auto":
                options = {"format": "measured", "target_size": _bytes(files[name, "nearest"]) / 1e9}
            elif method == "calibrated + X̂" and not choices["format"].startswith("int8"):
                continue
            files[name, method], gains[name, method] = _saved(server, f"case{number}-{case}", known, options)
    (found,) = server.output_dir.rglob("full*.safetensors")
    return files, gains, found, learned


def _saved(server: ComfyServer, name: str, calibration: str | None, options: dict) -> tuple[Path, dict[str, float]]:
    """Quantize the model with a saved calibration: the file, and the gain of each layer."""
    graph = TinyGraph()
    known = {}
    if calibration:
        (file,) = server.output_dir.rglob(f"{calibration.split()[0]}*.calib.safetensors")
        known["calibration"] = graph.add("LearnedRoundingLoadCalibration", file=file.name)[0]
    saved = graph.save(graph.quantize(graph.load()[0], **options, **known), name, folder="models")
    result = server.queue(graph, timeout=3600)
    layers = [event.data for event in result.of("learned_rounding.progress") if event.data["state"] == "layer"]
    gains = {layer["name"]: layer["gain"] for layer in layers if layer["gain"] is not None} if calibration else {}
    return Path(result.outputs[saved.id]["text"][0]), gains


def _bytes(path: Path) -> int:
    """Of a file's tensors."""
    with SafetensorsFile(path) as file:
        return sum(info.nbytes for info in file.tensors.values())


def _gains_here(calibration: Path, choices: dict, layers: list[str]) -> list[float]:
    """Gain of each layer on the inputs that were learned from."""
    weights = load_file(ASSETS / MODEL)
    choices = {**choices, "convrot": "convrot" in choices or None}
    found = []
    with CalibrationFile(calibration) as file:
        for name in layers:
            gram = file.inputs(name.removesuffix(".weight")).gram
            found.append(quantize_weight(weights[name], gram=gram, rounding="calibrated", **choices).rounded.gain)
    return found


def _row(full: tuple, found: tuple, base: np.ndarray | None) -> tuple[dict, np.ndarray]:
    """Numbers of pictures ``found`` against ``full``; ``base``: nearest's errors. Also the error of each picture."""
    error = ((full[2] - found[2]) ** 2).mean(axis=(-3, -2, -1))
    decibels = -10 * np.log10(error)
    row = {
        "MSE unrounded": float(error.mean()),
        "MSE PNG": float(((full[1] - found[1]) ** 2).mean()),
        "PSNR mean dB": float(decibels.mean()),
        "PSNR worst dB": float(decibels.min()),
        "PSNR mean dB PNG": float(np.mean([psnr(a, b) for a, b in zip(_flat(full[1]), _flat(found[1]), strict=True)])),
        "SSIM": float(ssim(_flat(full[2]), _flat(found[2])).mean()),
    }
    for mark, exact, got in zip(MARKS, full[0], found[0], strict=True):
        row[f"latent SNR dB after {mark}"] = float(10 * np.log10((exact**2).sum() / ((exact - got) ** 2).sum()))
    if base is not None:
        row["×"], row["low"], row["high"] = ratio_interval(error, base)
        row["better"] = f"{int((error < base).sum())} of {error.size}"
    return row, error


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, *images.shape[2:])


def _text_encoder() -> dict:
    """The embedding's error by format and method, weights only, as `rounding.py` measured it."""
    per = {
        "float8_e4m3fn tensor": "tensor",
        "int8_tensorwise row": "row",
        "int8_tensorwise row, ConvRot": "row, rotated",
    }
    methods = {"nearest": "nearest", "principal": "principal", "calibrated, 1 sweep": "calibrated"}
    found: dict = {"source": TEXT_ENCODER.name}
    for row in json.loads(TEXT_ENCODER.read_text(encoding="utf-8"))["rows"]:
        for name, choices in FORMATS.items():
            if (row["format"], row["per"]) == (choices["format"], per[name]) and row["method"] in methods:
                found.setdefault(name, {})[methods[row["method"]]] = row["embedding"]
    return found


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0], ("--host", {"help": "version of the ComfyUI to use (default: the newest here)"})
    )
    seeds, count, learned = (2, 4, 8) if args.quick else (4, 8, 50)
    host = [host for host in available_hosts() if args.host in (None, host.version)][-1]
    splits = prompt_splits()
    judged, calibrated = splits["evaluation"][:count], splits["calibration"][:learned]
    rows, layers = [], {}
    errors: dict[tuple[str, str, str], np.ndarray] = {}
    image_mse: dict[str, dict[str, dict]] = {"weights only": {}, "w8a8": {}}
    with tempfile.TemporaryDirectory() as base:
        place(base, prompts=judged)
        place(base, prompts=calibrated, dataset="calibration")
        place(base, prompts=calibrated[:FEW], dataset="few")
        links = {PACK_NAME: PACK, "quantized_inputs": Path(__file__).parent / "quantized_inputs"}
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
                raise SystemExit("ComfyUI samples a float32 copy of the model otherwise than the model itself.")
            for (name, method), file in files.items():
                for section in image_mse:
                    if section == "w8a8" and (
                        not FORMATS[name]["format"].startswith("int8") or method in WEIGHTS_ALONE
                    ):
                        continue
                    target = file
                    if section == "weights only":
                        target = folder / f"decoded-{file.name}"
                        decode_file(file, target)
                    found = sample(str(target.relative_to(folder)), f"{section[:2]}-{file.stem}")
                    base_error = errors.get((section, name, "nearest"))
                    row, errors[section, name, method] = _row(full, found, base_error)
                    row["bytes"] = _bytes(file)
                    if known := gains[name, method]:
                        row |= {
                            "gain median": float(np.median(list(known.values()))),
                            "gain worst": max(known.values()),
                        }
                    if section == "weights only" and method == "calibrated":
                        here = _gains_here(calibration, FORMATS[name], list(known))
                        row["gain here"] = float(np.median(here))
                        layers[name] = {
                            layer: [round(known[layer], 3), round(gain, 3)]
                            for layer, gain in zip(known, here, strict=True)
                        }
                    rows.append({"section": section, "format": name, "method": method, **row})
                    image_mse[section].setdefault(name, {})[method] = {
                        "png": row["MSE PNG"],
                        "unrounded": row["MSE unrounded"],
                    }
                if method == "nearest" and FORMATS[name]["format"].startswith("int8"):
                    found = sample(MODEL, f"floor-{file.stem}", quantized_as=file)
                    row, _ = _row(full, found, errors["w8a8", name, "nearest"])
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
        prompts=judged,
        calibration={"prompts": calibrated, "first seed": FIRST_CALIBRATION_SEED, "learned": summary},
        image_mse=nested("weights only", "png"),
        image_mse_w8a8=nested("w8a8", "png"),
        image_mse_unrounded=nested("weights only", "unrounded"),
        image_mse_w8a8_unrounded=nested("w8a8", "unrounded"),
        text_encoder=_text_encoder(),
        mse_per_picture={
            " / ".join(key): [[float(f"{value:.4g}") for value in line] for line in found]
            for key, found in errors.items()
        },
        gains_per_layer_held_out_and_here=layers,
    )


if __name__ == "__main__":
    main()
