"""The one place that touches ComfyUI's internals: folders, model management, loaders, server."""

import copy
import dataclasses
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
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from server import PromptServer

from ..quant_core import Recipe, Report, quantize_file
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
from .decoded_linear import as_bytes, decoding_operations

__all__ = [
    "SAVE_FOLDERS",
    "FileSource",
    "Quantized",
    "build_clip",
    "build_model",
    "clip_types",
    "file_state",
    "is_interrupt",
    "model_files",
    "outputs_in_use",
    "outputs_in_use_of_running_prompt",
    "progress_bar",
    "quantize",
    "quantized_layers",
    "save",
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
    status = _path(choice).stat()
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
        status = source.path.stat()
        return source.path, status.st_mtime_ns, status.st_size
    patcher = source.patcher if isinstance(source, comfy.sd.CLIP) else source
    return weakref.ref(patcher.model), patcher.patches_uuid


# The last result, so that connecting another output afterwards does not quantize again.
_last: tuple[tuple, Recipe, Quantized] | None = None


def quantize(source, recipe: Recipe, on_event: Listener) -> Quantized:
    """Quantize a MODEL, CLIP or :class:`FileSource` into files in ComfyUI's temp folder, on the device ComfyUI gives."""
    global _last
    identity = _identity(source)
    if _last and _last[:2] == (identity, recipe):
        return _last[2]
    _last = None
    kind, parts = _parts(source)
    device = comfy.model_management.get_torch_device()
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    files, reports = {}, []
    try:
        for part, tensors in parts.items():
            _make_room(tensors, recipe, device)
            files[part] = folder / f"learned_rounding_{os.urandom(6).hex()}.safetensors"
            reports.append(
                quantize_file(
                    tensors,
                    files[part],
                    recipe,
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


def _make_room(tensors, recipe: Recipe, device: torch.device) -> None:
    """Ask ComfyUI for the memory of the largest layer: its weight, its codes, and float32 scratch of the rounding."""
    if isinstance(tensors, Path):
        with SafetensorsFile(tensors) as opened:
            infos = opened.tensors
    else:
        infos = tensors.tensors
    largest = max((info.nbytes for info in infos.values()), default=0)
    method = recipe.resolve(calibrated=False)
    times = 32 if method.gradient else 16 if method.rounding == "principal" else 6
    comfy.model_management.free_memory(times * largest, device)


# ----------------------------------------------------------------------------------------------------------- building


def _knows(format: str) -> bool:
    return format in getattr(comfy.quant_ops, "QUANT_ALGOS", {})


def _layers_to_decode(path: Path) -> list[str]:
    """The quantized layers of a file, when it holds a format that this ComfyUI cannot read by itself; else none."""
    with SafetensorsFile(path) as opened:
        configs = layer_configs(opened)[0]
    return [] if all(_knows(config["format"]) for config in configs.values()) else list(configs)


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
    decoded = not all(_knows(config["format"]) for _, config in layers.values())
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
    if _knows(config["format"]):
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
    base = SAVE_FOLDERS[folder](quantized.kind).resolve()
    prefix = prefix.strip().replace("\\", "/")
    target = (base / prefix).resolve()
    if not prefix or prefix.endswith("/") or not target.is_relative_to(base) or target == base:
        raise OutputError(f"'{prefix}' is no file name inside {base}; give a name, with folders before it if you like.")
    paths = []
    for part, path in quantized.files.items():
        stem = "_".join(filter(None, (target.name, part, quantized.label)))
        paths.append(_place(path, target.parent, stem))
    return paths


def _place(path: Path, folder: Path, stem: str) -> Path:
    """Link ``path`` into ``folder`` under the first free number, or copy it where links are not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return _first_free(folder, stem, lambda target: os.link(path, target))
        except OSError:
            return _copy(path, folder, stem)
    except OSError as error:
        raise OutputError(f"The model cannot be saved in {folder}: {error.strerror or error}.") from error


def _first_free(folder: Path, stem: str, take) -> Path:
    """The first numbered name that ``take`` creates without a FileExistsError."""
    for number in itertools.count(1):
        target = folder / f"{stem}_{number:05}_.safetensors"
        try:
            take(target)
            return target
        except FileExistsError:
            continue


def _copy(path: Path, folder: Path, stem: str) -> Path:
    partial = folder / f".{stem}.{os.urandom(4).hex()}.partial"
    try:
        with open(path, "rb") as source, open(partial, "xb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
            target.flush()
            os.fsync(target.fileno())
        claimed = _first_free(folder, stem, lambda target: os.close(os.open(target, os.O_CREAT | os.O_EXCL)))
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


def progress_bar(total: int, node_id: str):
    """ComfyUI's own progress bar on the node."""
    return comfy.utils.ProgressBar(total, node_id=node_id)


def is_interrupt(error: BaseException) -> bool:
    """Whether the user cancelled."""
    return isinstance(error, comfy.model_management.InterruptProcessingException)
