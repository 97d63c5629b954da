"""The one place that touches ComfyUI's internals: folders, model management, loaders, server."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import logging
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from server import PromptServer

import nodes

from ..quant_core import Recipe, Report, quantize_file
from ..quant_core.calibration import SUFFIX, CalibrationFile, Collector, Sensitivity
from ..quant_core.checkpoints import SafetensorsFile, TensorInfo, layer_configs
from ..quant_core.checkpoints.metadata import CONFIG_SUFFIX
from ..quant_core.checkpoints.source import CPU
from ..quant_core.errors import (
    AlreadyQuantizedError,
    NothingToQuantizeError,
    OutputError,
    QuantizationError,
    SourceError,
)
from ..quant_core.events import Listener
from ..quant_core.recipes import make_plan
from ..quant_core.recipes.presets import NONE
from ..quant_core.report import human_bytes
from .decoded_linear import as_bytes, decoding_operations

__all__ = [
    "SAVE_FOLDERS",
    "FileSource",
    "KEEP",
    "Calibrated",
    "Quantized",
    "build_clip",
    "build_model",
    "calibrate_clip",
    "calibrate_model",
    "calibration_files",
    "calibration_state",
    "clip_types",
    "file_state",
    "is_interrupt",
    "knows",
    "load_calibration",
    "model_files",
    "outputs_in_use",
    "outputs_in_use_of_running_prompt",
    "pictures",
    "progress_bar",
    "quantize",
    "quantized_layers",
    "samplers",
    "save",
    "save_calibration",
    "schedulers",
    "send",
]

log = logging.getLogger(__name__)

DIFFUSION_MODELS, CHECKPOINTS, TEXT_ENCODERS = "diffusion_models", "checkpoints", "text_encoders"
_KINDS = (DIFFUSION_MODELS, CHECKPOINTS, TEXT_ENCODERS)
_EXTENSIONS = (".safetensors", ".sft")

# Text encoders that ComfyUI loads without looking for quantized layers: they are small, and stay as they are.
_PLAIN_ENCODERS = {
    "clip_l",
    "clip_g",
    "clip_h",
    "t5base",
    "pile_t5xl",
    "mt5xl",
    "hydit_clip",
    "byt5_small",
    "sam3_clip",
    "t5gemma",
}

# ---------------------------------------------------------------------------------------------------------- folders


def model_files() -> list[str]:
    """ "folder/name" of every safetensors file a user can choose."""
    return [
        f"{kind}/{name}"
        for kind in _KINDS
        for name in folder_paths.get_filename_list(kind)
        if name.lower().endswith(_EXTENSIONS)
    ]


def clip_types() -> list[str]:
    """The choices of ComfyUI's own Load CLIP."""
    return [entry.name.lower() for entry in comfy.sd.CLIPType]


def _path(choice: str) -> Path:
    kind, _, name = choice.partition("/")
    path = folder_paths.get_full_path(kind, name) if kind in _KINDS and name else None
    if path is None:
        raise SourceError(
            f"There is no model file '{choice}' in ComfyUI's model folders; refresh the list and choose again."
        )
    return Path(path)


def file_state(choice: str) -> tuple[int, int]:
    """Changes when the chosen file does."""
    return _state(_path(choice))


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@dataclass(frozen=True)
class FileSource:
    """A model file that nothing has been read of yet. ``kind``: the model folder it is in; ``clip_type``: for text encoders."""

    path: Path
    kind: str
    clip_type: str

    @classmethod
    def choose(cls, choice: str, clip_type: str) -> "FileSource":
        """From what :func:`model_files` lists."""
        return cls(_path(choice), choice.partition("/")[0], clip_type)


# ------------------------------------------------------------------------------------------- models as tensor sources


def _patched_keys(patcher) -> set[str]:
    return {key if isinstance(key, str) else key[0] for key in patcher.patches}


class PatchedWeights:
    """The weights of a ModelPatcher under a prefix as a :class:`~..quant_core.checkpoints.Source`, LoRAs baked in when read.

    A CPU host holds every model in float32, whatever its file held: tensors that fit a 16-bit dtype without loss are
    given in it. ``rename``: state-dict key → name in the file; None leaves a tensor out.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, patcher, name: str, rename):
        self.name = name
        self._patcher = patcher
        state = {rename(key): (key, tensor) for key, tensor in patcher.model_state_dict().items()}
        state.pop(None, None)
        codes = [new for new, (_, tensor) in state.items() if new.endswith(CONFIG_SUFFIX) or _is_quantized(tensor)]
        if codes:
            raise AlreadyQuantizedError(f"The {name} is quantized already; connect its full-precision original.")
        self._keys = {new: key for new, (key, _) in state.items()}
        self._patched = _patched_keys(patcher)
        plain = {new: self._unpatched(key, tensor) for new, (key, tensor) in state.items() if key not in self._patched}
        dtypes = _stored_dtypes(plain)
        self.tensors = {
            new: TensorInfo(dtypes.get(new, torch.float32), tuple(tensor.shape)) for new, (_, tensor) in state.items()
        }

    def _unpatched(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        backup = self._patcher.backup.get(key)
        return tensor if backup is None else backup.weight

    @torch.inference_mode()
    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        key = self._keys[name]
        weight = self._unpatched(key, comfy.utils.get_attr(self._patcher.model, key))
        if key in self._patched:
            patches = self._patcher.patches[key]
            weight = comfy.lora.calculate_weight(patches, weight.to(device, torch.float32, copy=True), key)
        return weight.to(device, self.tensors[name].dtype)


def _is_quantized(tensor) -> bool:
    """ComfyUI's own class of quantized tensors, wherever the release at hand keeps it."""
    return type(tensor).__name__ == "QuantizedTensor"


def _fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is torch.float32 and torch.equal(tensor.to(dtype).to(torch.float32), tensor)


def _stored_dtypes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.dtype]:
    """Each tensor's dtype; for float32 weights that were widened from a 16-bit dtype, that dtype.

    Widened is a model of which one 16-bit dtype holds more than half of the float32 weights without loss.
    """
    fitting = {
        dtype: {name for name, tensor in tensors.items() if _fits(tensor, dtype)}
        for dtype in (torch.bfloat16, torch.float16)
    }
    sizes = {dtype: sum(tensors[name].numel() for name in names) for dtype, names in fitting.items()}
    narrow = max(sizes, key=sizes.get)
    widened = sizes[narrow] > sum(t.numel() for t in tensors.values() if t.dtype is torch.float32) / 2
    return {name: narrow if widened and name in fitting[narrow] else tensor.dtype for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------------------------- quantizing


@dataclass(frozen=True)
class Quantized:
    """Finished temporary files of one run, removed when nothing uses them any more.

    Attributes:
        files: part name ("" for a whole model) → path.
        kind: the model folder the files belong in.
        label: format and granularity, for file names.
        report: what was done.
    """

    files: dict[str, Path]
    kind: str
    label: str
    report: Report

    def __post_init__(self):
        weakref.finalize(self, _remove, tuple(self.files.values()))


def _remove(paths) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError:  # Windows: still mapped by a model; ComfyUI empties its temp folder when it starts
            log.debug("could not remove %s", path)


def _parts(source) -> tuple[str, dict[str, object]]:
    """The model folder and {part name: path or Source} of what is connected."""
    if isinstance(source, FileSource):
        return source.kind, {"": source.path}
    if isinstance(source, comfy.sd.CLIP):
        return TEXT_ENCODERS, _encoder_parts(source)
    prefix = "diffusion_model."
    return DIFFUSION_MODELS, {
        "": PatchedWeights(source, "MODEL", lambda key: key.removeprefix(prefix) if key.startswith(prefix) else None)
    }


def _encoder_parts(clip) -> dict[str, PatchedWeights]:
    """One source per text encoder that ComfyUI can load quantized, named as in files of its own."""
    names = {key.partition(".")[0] for key in clip.patcher.model_state_dict() if ".transformer." in key}
    parts = sorted(names - _PLAIN_ENCODERS)
    if not parts:
        raise NothingToQuantizeError(
            f"ComfyUI loads no quantized weights for {', '.join(sorted(names)) or 'this text encoder'}; leave it as it is."
        )

    def rename(part: str):
        return lambda key: (
            key.removeprefix(f"{part}.").removeprefix("transformer.") if key.startswith(f"{part}.") else None
        )

    return {part: PatchedWeights(clip.patcher, f"CLIP ({part})", rename(part)) for part in parts}


def _identity(source) -> tuple:
    """Equal for two sources exactly when quantizing them gives the same."""
    if isinstance(source, FileSource):
        return source.path, *_state(source.path)
    patcher = source.patcher if isinstance(source, comfy.sd.CLIP) else source
    return weakref.ref(patcher.model), patcher.patches_uuid


# The last result, so that connecting another output afterwards does not quantize again.
_last: tuple[tuple, Recipe, Quantized] | None = None


def quantize(source, recipe: Recipe, on_event: Listener, calibration: "Calibrated | None" = None) -> Quantized:
    """Quantize a MODEL, CLIP or :class:`FileSource` into files in ComfyUI's temp folder, on the device ComfyUI gives."""
    global _last
    identity = (*_identity(source), calibration and calibration.mark)
    if _last and _last[:2] == (identity, recipe):
        return _last[2]
    _last = None
    kind, parts = _parts(source)
    device = comfy.model_management.get_torch_device()
    folder = _temporary_folder()
    files, reports = {}, []
    with calibration.open() if calibration else contextlib.nullcontext() as statistics:
        try:
            for part, tensors in parts.items():
                _make_room(tensors, recipe, statistics is not None, device)
                files[part] = folder / f"learned_rounding_{os.urandom(6).hex()}.safetensors"
                reports.append(
                    quantize_file(
                        tensors,
                        files[part],
                        recipe,
                        calibration=statistics.part(part) if statistics and part else statistics,
                        device=device,
                        on_event=on_event,
                        check=comfy.model_management.throw_exception_if_processing_interrupted,
                    )
                )
        except BaseException:
            _remove(files.values())
            raise
    quantized = Quantized(files, kind, recipe.label, _joined(reports))
    _last = (identity, recipe, quantized)
    return quantized


def _joined(reports: list[Report]) -> Report:
    first, *others = reports
    for other in others:
        for field in dataclasses.fields(Report):
            if field.name in ("layers", "kept", "bytes_in", "bytes_out", "seconds"):
                setattr(first, field.name, getattr(first, field.name) + getattr(other, field.name))
    first.output = None  # a temporary file is no output
    return first


def _temporary_folder() -> Path:
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _make_room(tensors, recipe: Recipe, calibrated: bool, device: torch.device) -> None:
    """Ask ComfyUI for the memory of the largest layer: its weight, its codes, and float32 scratch of the rounding."""
    if isinstance(tensors, Path):
        with SafetensorsFile(tensors) as opened:
            infos = opened.tensors
    else:
        infos = tensors.tensors
    largest = max((info.nbytes for info in infos.values()), default=0)
    method = recipe.resolve(calibrated)
    times = 32 if method.gradient else 16 if method.rounding == "principal" else 6
    inner = max((info.shape[1] for info in infos.values() if len(info.shape) == 2), default=0) if calibrated else 0
    comfy.model_management.free_memory(times * largest + 12 * inner**2, device)  # three float32 matrices (in, in)


# -------------------------------------------------------------------------------------------------------- calibrating

# How much of the Grams to keep, in the words of a Collector; None for in low rank, as far as its file stays small.
KEEP = {"full": {}, "compact": None, "with quantized inputs": {"quantized_inputs": True}}
_COMPACT_BYTES, _COMPACT_RANKS = 640 << 20, (32, 64, 128, 256)  # beside the held-out inputs
_RAM = 2 << 30  # for Grams where the model itself runs in main memory
_PROBES = (0.25, 0.75)  # where in a run sensitivities are measured
_RUNS_FOR_HOLDOUT = 4  # from so many on, every fourth is held out as a whole

samplers, schedulers = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS


@dataclass(frozen=True)
class Calibrated:
    """A calibration file; a temporary one is removed when nothing uses it any more. ``mark`` changes when it does."""

    path: Path
    mark: str
    temporary: bool = True

    def __post_init__(self):
        if self.temporary:
            weakref.finalize(self, _remove, (self.path,))

    def open(self) -> CalibrationFile:
        """For reading, as a context."""
        return CalibrationFile(self.path)


def _linear_layers(patcher, parts: Mapping[str, PatchedWeights], module_name) -> dict[str, torch.nn.Module]:
    """Name in a calibration → linear layer, of all that some recipe could quantize."""
    layers = {}
    for part, weights in parts.items():
        for name in make_plan(weights, preset=NONE).names("quantize"):
            layer = name.removesuffix(".weight")
            module = patcher.model.get_submodule(module_name(part, layer))
            if isinstance(module, torch.nn.Linear):
                layers[f"{part}.{layer}" if len(parts) > 1 else layer] = module
    return layers


@contextlib.contextmanager
def _collecting(patcher, layers, keep: str, tokens: int, seed: int, earlier: Calibrated | None):
    """A :class:`Collector` with the memory that ComfyUI can spare; its files are gone afterwards."""
    device = patcher.load_device
    if device.type == "cpu":
        spare = min(comfy.model_management.get_total_memory(device) // 4, _RAM)
    else:  # half of what the model and its activations leave
        spare = (comfy.model_management.get_total_memory(device) - patcher.model_size() - (8 << 30)) // 2
    folder = _temporary_folder() / f"learned_rounding_grams_{os.urandom(6).hex()}"
    folder.mkdir()
    options = {"device": device, "device_bytes": max(spare, 0), "tokens": tokens, "seed": seed}
    options |= {"rank": _compact_rank(layers)} if KEEP[keep] is None else KEEP[keep]
    try:
        with earlier.open() if earlier else contextlib.nullcontext() as known:
            with Collector(layers, folder, earlier=known, **options) as collector:
                places = {f"of {device}": collector.device_bytes, f"in {folder.parent}": collector.disk_bytes}
                needed = " and ".join(f"{human_bytes(size)} {place}" for place, size in places.items() if size)
                show(f"Calibrating {len(layers)} layers takes up to {needed}.")
                yield collector
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compact_rank(layers: Mapping[str, torch.nn.Module]) -> int:
    """The part of their directions that inputs can keep, in 16 bits, if no layers share one."""
    widths = [layer.weight.shape[1] for layer in layers.values()]
    fitting = (rank for rank in _COMPACT_RANKS if sum(2 * width * width // rank for width in widths) <= _COMPACT_BYTES)
    return next(fitting, _COMPACT_RANKS[-1])


def _finish(collector: Collector, provenance: dict) -> tuple[Calibrated, str]:
    path = _temporary_folder() / f"learned_rounding_{os.urandom(6).hex()}{SUFFIX}"
    size = collector.save(path, provenance)
    with CalibrationFile(path) as made:
        calibrated, layers = Calibrated(path, made.mark), len(made.layers)
    lines = [
        f"{layers} linear layers, {collector.inputs} different inputs, {collector.tokens} tokens or more of each",
        f"{human_bytes(size)} in {provenance['keep']} form",
    ]
    if collector.sensitivity:
        most = sorted(collector.sensitivity, key=collector.sensitivity.get, reverse=True)[:3]
        lines.append(f"errors hurt most in {', '.join(most)}")
    if collector.kept < 1:
        lines.append(
            f"directions are known of at least {collector.kept:.0%} of each input's energy, of the rest the size only"
        )
    show("\n".join(lines))
    return calibrated, "\n".join(lines)


def _hash(*values) -> str:
    """A mark of prompts or conditioning, from which nobody can read them."""
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.float().cpu().numpy().tobytes()
        digest.update(value if isinstance(value, bytes) else str(value).encode())
    return digest.hexdigest()


def calibrate_model(
    model,
    conditioning: list[tuple[list, list]],
    latents: list[dict],
    *,
    seed: int,
    samples: int,
    keep: str,
    tokens: int,
    sensitivity: bool = False,
    earlier: Calibrated | None = None,
    **sampling,
) -> tuple[Calibrated, list, str]:
    """Sample with a MODEL as KSampler does and learn what its linear layers are given.

    Args:
        conditioning: pairs of positive and negative; each is sampled ``samples`` times, with seeds counted up.
        latents: LATENTs, taken in turns.
        keep: key of :data:`KEEP`.
        tokens: looked at in each call of the model.
        sensitivity: also measure, in one more run, what errors of each layer do to the model's output.
        earlier: a calibration to continue.
        sampling: the other arguments of KSampler, by name.

    Returns:
        the calibration, the sampled LATENTs, and a summary.
    """
    weights = _parts(model)[1]
    layers = _linear_layers(model, weights, lambda part, layer: f"diffusion_model.{layer}")
    runs = [(*pair, latents[index % len(latents)]) for index, pair in enumerate(conditioning) for _ in range(samples)]
    apart = len(runs) >= _RUNS_FOR_HOLDOUT
    sampled = []
    with _collecting(model, layers, keep, tokens, seed, earlier) as collector:
        for index, (positive, negative, latent) in enumerate(runs):
            hold_out = index % _RUNS_FOR_HOLDOUT == _RUNS_FOR_HOLDOUT - 1 if apart else None
            with collector.watching(model.model.diffusion_model, hold_out):
                (result,) = nodes.common_ksampler(
                    model, seed + index, positive=positive, negative=negative, latent=latent, **sampling
                )
            sampled.append(result)
        if sensitivity:
            probing = _Probing(model, layers, weights, collector.calls // len(runs))
            positive, negative, latent = runs[0]
            nodes.common_ksampler(probing.model, seed, positive=positive, negative=negative, latent=latent, **sampling)
            collector.sensitivity = probing.sensitivity.found
        provenance = {
            "kind": "diffusion model",
            "class": type(model.model).__name__,
            "prompts": [_hash(*(entry[0] for entry in positive)) for positive, _ in conditioning],
            "runs": len(runs),
            "seed": seed,
            "tokens per call": tokens,
            "keep": keep,
            **sampling,
        }
        calibrated, summary = _finish(collector, provenance)
        return calibrated, sampled, summary


def _sensitivity(layers: Mapping[str, torch.nn.Module], weights: Mapping[str, PatchedWeights], device) -> Sensitivity:
    """For the layers of :func:`_linear_layers`, whose weights are read as the model applies them."""
    bar = comfy.utils.ProgressBar(len(layers) * len(_PROBES))

    def read(name: str) -> torch.Tensor:
        part = next((part for part in weights if len(weights) > 1 and name.startswith(f"{part}.")), None)
        source = next(iter(weights.values())) if part is None else weights[part]
        bar.update(1)
        return source.read(f"{name if part is None else name.removeprefix(f'{part}.')}.weight", device)

    return Sensitivity(layers, read, comfy.model_management.throw_exception_if_processing_interrupted)


class _Probing:
    """A clone of a MODEL whose sampling measures sensitivities in some of the ``calls`` of a run."""

    def __init__(self, model, layers, weights, calls: int):
        self.sensitivity = _sensitivity(layers, weights, model.load_device)
        self.model = model.clone()
        self._inner = model.model_options.get("model_function_wrapper")
        self.model.set_model_unet_function_wrapper(self)
        self._places = {int(share * calls) for share in _PROBES}
        self._seen = 0

    def __call__(self, apply_model, given: dict) -> torch.Tensor:
        def run() -> torch.Tensor:
            if self._inner is not None:
                return self._inner(apply_model, given)
            return apply_model(given["input"], given["timestep"], **given["c"])

        if self._seen in self._places:
            self.sensitivity.probe(run)
        self._seen += 1
        return run()


def calibrate_clip(
    clip,
    prompts: list[str],
    *,
    keep: str,
    tokens: int,
    seed: int,
    sensitivity: bool = False,
    earlier: Calibrated | None = None,
) -> tuple[Calibrated, str]:
    """Encode ``prompts`` and learn what the linear layers of a CLIP are given; returns the calibration and a summary."""
    parts = _encoder_parts(clip)
    model = clip.cond_stage_model
    layers = _linear_layers(clip.patcher, parts, lambda part, layer: _module_name(model, part, layer))
    with _collecting(clip.patcher, layers, keep, tokens, seed, earlier) as collector:
        bar = comfy.utils.ProgressBar(len(prompts))
        apart = len(prompts) >= _RUNS_FOR_HOLDOUT
        for index, prompt in enumerate(prompts):
            comfy.model_management.throw_exception_if_processing_interrupted()
            hold_out = index % _RUNS_FOR_HOLDOUT == _RUNS_FOR_HOLDOUT - 1 if apart else None
            with collector.watching(model.get_submodule(next(iter(parts))), hold_out):
                nodes.CLIPTextEncode().encode(clip, prompt)
            bar.update(1)
        if sensitivity:
            probing = _sensitivity(layers, parts, clip.patcher.load_device)
            for prompt in prompts[: len(_PROBES)]:
                probing.probe(functools.partial(clip.encode_from_tokens, clip.tokenize(prompt)))
            collector.sensitivity = probing.found
        provenance = {
            "kind": "text encoder",
            "class": type(model).__name__,
            "prompts": [_hash(prompt) for prompt in prompts],
            "seed": seed,
            "tokens per call": tokens,
            "keep": keep,
        }
        return _finish(collector, provenance)


def pictures(model, latents: list[dict], vae=None) -> torch.Tensor:
    """What was sampled as an IMAGE (pictures, height, width, 3): decoded, or in the latents' own colours without a VAE."""
    frames = [_frames(model, latent["samples"], vae) for latent in latents]
    same = [frame for frame in frames if frame.shape[1:] == frames[0].shape[1:]]
    return torch.cat(same)


def _frames(model, samples, vae) -> torch.Tensor:
    if vae is not None:
        return vae.decode(samples).flatten(0, -4)
    factors = getattr(model.model.latent_format, "latent_rgb_factors", None)
    if not isinstance(samples, torch.Tensor) or samples.ndim not in (4, 5) or factors is None:
        return torch.zeros(1, 64, 64, 3)
    x = model.model.process_latent_in(samples).float().cpu()
    x = x.movedim(1, -1).flatten(0, -4)  # (pictures, height, width, channels)
    bias = getattr(model.model.latent_format, "latent_rgb_factors_bias", None)
    colours = x @ torch.tensor(factors) + (0 if bias is None else torch.tensor(bias))
    small = ((colours + 1) / 2).clamp(0, 1)
    return small.repeat_interleave(8, 1).repeat_interleave(8, 2)


# Where calibrations are looked for; the first is where they are saved.
_CALIBRATIONS = "calibrations"


def _calibration_folders() -> list[Path]:
    return [
        Path(folder_paths.get_output_directory()) / _CALIBRATIONS,
        Path(folder_paths.models_dir) / _CALIBRATIONS,
    ]


def calibration_files() -> list[str]:
    """Names of the calibrations a user can choose."""
    found = {
        path.relative_to(folder).as_posix() for folder in _calibration_folders() for path in folder.rglob(f"*{SUFFIX}")
    }
    return sorted(found)


def _calibration_path(name: str) -> Path:
    for folder in _calibration_folders():
        path = (folder / name).resolve()
        if path.is_relative_to(folder.resolve()) and path.is_file():
            return path
    raise SourceError(f"There is no calibration '{name}'; refresh the list and choose again.")


def calibration_state(name: str) -> tuple[int, int]:
    """Changes when the chosen calibration does."""
    return _state(_calibration_path(name))


def load_calibration(name: str) -> tuple[Calibrated, str]:
    """A saved calibration, and what it says of itself."""
    path = _calibration_path(name)
    with CalibrationFile(path) as made:
        lines = [f"{path.name}: {human_bytes(path.stat().st_size)}, {len(made.layers)} linear layers"]
        lines += [f"{key}: {value}" for key, value in made.provenance.items() if not isinstance(value, list)]
        return Calibrated(path, made.mark, temporary=False), "\n".join(lines)


def save_calibration(calibration: Calibrated, prefix: str) -> Path:
    """Give a calibration a lasting name in the output folder; never overwrites, never leaves the folder."""
    folder, stem = _target(_calibration_folders()[0], prefix)
    return _place(calibration.path, folder, stem, SUFFIX)


# ----------------------------------------------------------------------------------------------------------- building


def knows(format: str) -> bool:
    """Whether this ComfyUI itself multiplies that format."""
    return format in getattr(comfy.quant_ops, "QUANT_ALGOS", {})


def _layers_to_decode(path: Path) -> list[str]:
    """The quantized layers of a file, when it holds a format that this ComfyUI cannot read by itself; else none."""
    with SafetensorsFile(path) as opened:
        configs = layer_configs(opened)[0]
    return [] if all(knows(config["format"]) for config in configs.values()) else list(configs)


def _decoding(loader) -> dict:
    """Options that make one of ComfyUI's loaders use our operations.

    Its dynamic loading of newer releases hands LoRAs to layers of its own only, so that is left out.
    """
    classic = {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(loader).parameters else {}
    return {"model_options": {"custom_operations": decoding_operations(comfy.ops.manual_cast)}, **classic}


def _load_model(path: Path, kind: str):
    """The MODEL in a file of formats that ComfyUI knows."""
    if kind == CHECKPOINTS:
        return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
    return comfy.sd.load_diffusion_model(str(path))


def _load_decoding_model(path: Path, kind: str, disable_dynamic: bool = True):
    """The MODEL in a file of which ComfyUI does not know a format."""
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    tensors = as_bytes(tensors, _layers_to_decode(path))
    if kind == CHECKPOINTS:
        load = comfy.sd.load_state_dict_guess_config
        model = load(tensors, output_vae=False, output_clip=False, metadata=metadata, **_decoding(load))[0]
    else:
        load = comfy.sd.load_diffusion_model_state_dict
        model = load(tensors, metadata=metadata, **_decoding(load))
    if model is None:
        raise QuantizationError("ComfyUI does not recognise this model; save it, and load it where it is supported.")
    model.cached_patcher_init = (_load_decoding_model, (path, kind))  # by which newer ComfyUI makes it once more
    return model


def _check_built(patcher, path: Path, what: str) -> None:
    """Every layer that is quantized in the file must be so in the model: ComfyUI's loader does not say when one is not."""
    with SafetensorsFile(path) as opened:
        expected = len(layer_configs(opened)[0])
    found = len(quantized_layers(patcher))
    if found < expected:
        raise QuantizationError(
            f"ComfyUI's loader took only {found} of {expected} quantized layers of this {what}; please report the model, it is not supported yet."
        )


def quantized_layers(patcher) -> dict[str, str]:
    """{module name: dtype of its codes} of the layers of a ModelPatcher that hold codes."""
    layers = {}
    for name, module in patcher.model.named_modules():
        weight = getattr(module, "weight", None)
        if _is_quantized(weight) or getattr(module, "is_quantized", False):
            layers[name] = str(getattr(weight, "_qdata", weight).dtype).removeprefix("torch.")
    return layers


def build_model(source, quantized: Quantized):
    """The quantized MODEL, made by ComfyUI's own loader; an ExecutionBlocker when there is none to make."""
    if quantized.kind == TEXT_ENCODERS:
        return ExecutionBlocker("Learned Round Quantize was given a text encoder: use its CLIP output, not MODEL.")
    path = quantized.files[""]
    model = (_load_decoding_model if _layers_to_decode(path) else _load_model)(path, quantized.kind)
    _check_built(model, path, "model")
    model.model.learned_rounding_file = quantized  # the model may be read again from its file
    if not isinstance(source, FileSource):
        _carry_over(source, model)
    return model


def _carry_over(original, model) -> None:
    """What nodes between the loader and us set on the MODEL: sampling, attention patches, wrappers … LoRAs are baked."""
    twin = original.clone()
    model.model_options = twin.model_options
    model.object_patches = {
        key: patch for key, patch in twin.object_patches.items() if not key.startswith("diffusion_model")
    }
    for name in ("attachments", "additional_models", "callbacks", "wrappers", "injections"):
        setattr(model, name, getattr(twin, name))


def build_clip(source, quantized: Quantized):
    """The quantized CLIP; an ExecutionBlocker when there is none to make."""
    if isinstance(source, comfy.sd.CLIP):
        return _rebuilt_clip(source, quantized)
    if quantized.kind == DIFFUSION_MODELS:
        return ExecutionBlocker("Learned Round Quantize was given a diffusion model: use its MODEL output, not CLIP.")
    path, embeddings = quantized.files[""], folder_paths.get_folder_paths("embeddings")
    if quantized.kind == CHECKPOINTS:  # its text encoder stays as it is
        return comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=False, output_clip=True, output_model=False, embedding_directory=embeddings
        )[1]
    clip = comfy.sd.load_clip(
        ckpt_paths=[str(path)],
        embedding_directory=embeddings,
        clip_type=comfy.sd.CLIPType[source.clip_type.upper()],
        **(_decoding(comfy.sd.load_clip) if _layers_to_decode(path) else {}),
    )
    _check_built(clip.patcher, path, "text encoder")
    clip.cond_stage_model.learned_rounding_file = quantized
    return clip


def _rebuilt_clip(clip, quantized: Quantized):
    """A twin of ``clip`` whose quantized layers are ComfyUI's own quantized linear layers."""
    model = clip.cond_stage_model
    layers = {}  # module name → the layer's tensors
    for part, path in quantized.files.items():
        with SafetensorsFile(path) as opened:
            for layer, config in layer_configs(opened)[0].items():
                names = [name for name in opened.tensors if name.rpartition(".")[0] == layer]
                tensors = {name.rpartition(".")[2]: opened.read(name) for name in names}
                layers[_module_name(model, part, layer)] = (tensors, config)
    weights = {id(module.weight): module.weight for module in map(model.get_submodule, layers)}
    twin = copy.deepcopy(model, memo=weights)
    for name, (tensors, config) in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, _quantized_linear(model.get_submodule(name), name, tensors, config))
    rebuilt = clip.clone()
    rebuilt.cond_stage_model = twin
    decoded = not all(knows(config["format"]) for _, config in layers.values())
    patcher = comfy.model_patcher.ModelPatcher if decoded else type(clip.patcher)  # as in _decoding
    rebuilt.patcher = patcher(twin, load_device=clip.patcher.load_device, offload_device=clip.patcher.offload_device)
    for name in ("object_patches", "model_options", "hook_mode", "is_clip", "force_cast_weights"):
        if hasattr(clip.patcher, name):
            setattr(rebuilt.patcher, name, copy.copy(getattr(clip.patcher, name)))
    return rebuilt


def _module_name(model, part: str, layer: str) -> str:
    """A layer's name in the file → its module in the text encoder."""
    for name in (f"{part}.transformer.{layer}", f"{part}.{layer}"):
        try:
            model.get_submodule(name)
            return name
        except AttributeError:
            continue
    raise QuantizationError(
        f"The text encoder has no layer {part}.{layer}; please report the model, it is not supported yet."
    )


def _quantized_linear(original, name: str, tensors: dict[str, torch.Tensor], config: dict):
    """ComfyUI's quantized counterpart of the linear layer ``original``."""
    bias = original.bias
    dtype = bias.dtype if bias is not None else original.weight.dtype
    if knows(config["format"]):
        operations = comfy.ops.mixed_precision_ops({name: config}, dtype, full_precision_mm=True)
    else:
        operations = decoding_operations(comfy.ops.manual_cast)
    device = original.weight.device
    linear = operations.Linear(
        original.in_features, original.out_features, bias=bias is not None, device=device, dtype=dtype
    )
    state = {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    if bias is not None:
        state[f"{name}.bias"] = bias
    linear._load_from_state_dict(state, f"{name}.", {}, True, [], [], [])
    return linear


# ------------------------------------------------------------------------------------------------------------- saving

# Folder of the output that ComfyUI's loaders search, by kind.
_OUTPUT_SUBFOLDERS = {DIFFUSION_MODELS: "diffusion_models", CHECKPOINTS: "checkpoints", TEXT_ENCODERS: "clip"}


def _models_folder(kind: str) -> Path:
    paths = [Path(path) for path in folder_paths.get_folder_paths(kind)]
    return next((path for path in paths if path.name == kind), paths[0])  # older folders (unet, clip) are listed too


SAVE_FOLDERS = {
    "output": lambda kind: Path(folder_paths.get_output_directory()) / _OUTPUT_SUBFOLDERS[kind],
    "models": _models_folder,
}


def save(quantized: Quantized, prefix: str, folder: str) -> list[Path]:
    """Give each file of ``quantized`` a lasting name; never overwrites, never leaves the folder."""
    target, name = _target(SAVE_FOLDERS[folder](quantized.kind), prefix)
    paths = []
    for part, path in quantized.files.items():
        stem = "_".join(filter(None, (name, part, quantized.label)))
        paths.append(_place(path, target, stem, ".safetensors"))
    return paths


def _target(base: Path, prefix: str) -> tuple[Path, str]:
    """The folder inside ``base`` and the start of the file name that a user's prefix means."""
    base, prefix = base.resolve(), prefix.strip().replace("\\", "/")
    target = (base / prefix).resolve()
    if not prefix or prefix.endswith("/") or not target.is_relative_to(base) or target == base:
        raise OutputError(f"'{prefix}' is no file name inside {base}; give a name, with folders before it if you like.")
    return target.parent, target.name


def _place(path: Path, folder: Path, stem: str, suffix: str) -> Path:
    """Link ``path`` into ``folder`` under the first free number, or copy it where links are not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return _first_free(folder, stem, suffix, lambda target: os.link(path, target))
        except OSError:
            return _copy(path, folder, stem, suffix)
    except OSError as error:
        raise OutputError(f"The model cannot be saved in {folder}: {error.strerror or error}.") from error


def _first_free(folder: Path, stem: str, suffix: str, take) -> Path:
    """The first numbered name that ``take`` creates without a FileExistsError."""
    for number in itertools.count(1):
        target = folder / f"{stem}_{number:05}_{suffix}"
        try:
            take(target)
            return target
        except FileExistsError:
            continue


def _copy(path: Path, folder: Path, stem: str, suffix: str) -> Path:
    partial = folder / f".{stem}.{os.urandom(4).hex()}.partial"
    try:
        with open(path, "rb") as source, open(partial, "xb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
            target.flush()
            os.fsync(target.fileno())
        claimed = _first_free(folder, stem, suffix, lambda target: os.close(os.open(target, os.O_CREAT | os.O_EXCL)))
        return partial.replace(claimed)
    finally:
        partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- server


def outputs_in_use(prompt, node_id: str) -> set[int]:
    """Which outputs of a node something is connected to. ``prompt``: ComfyUI's DynamicPrompt."""
    nodes = {key: prompt.get_node(key) for key in prompt.all_node_ids()}
    return {slot for source, slot in _links(nodes) if source == node_id}


def _links(nodes: Mapping[str, dict]) -> Iterator[tuple[str, int]]:
    for node in nodes.values():
        for value in node.get("inputs", {}).values():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
                yield str(value[0]), value[1]


def outputs_in_use_of_running_prompt(node_class: str) -> str:
    """For all nodes of that class in the prompt now running: which of their outputs are in use."""
    running, _ = PromptServer.instance.prompt_queue.get_current_queue()
    nodes = running[0][2] if running else {}
    ours = {key for key, node in nodes.items() if node.get("class_type") == node_class}
    return json.dumps(sorted({link for link in _links(nodes) if link[0] in ours}))


def send(event: str, payload: dict) -> None:
    """To the client that queued the running prompt."""
    server = PromptServer.instance
    server.send_sync(event, payload, server.client_id)


def show(text: str) -> None:
    """On the node that runs, and in the log."""
    log.info("%s", text)
    server = getattr(PromptServer, "instance", None)
    if server is not None and server.last_node_id is not None:
        server.send_progress_text(text, server.last_node_id, server.client_id)


def progress_bar(total: int, node_id: str):
    """ComfyUI's own progress bar on the node."""
    return comfy.utils.ProgressBar(total, node_id=node_id)


def is_interrupt(error: BaseException) -> bool:
    """Whether the user cancelled."""
    return isinstance(error, comfy.model_management.InterruptProcessingException)
