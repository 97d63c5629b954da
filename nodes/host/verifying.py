"""Does ComfyUI read a saved file as it was written? Its loaders notice little of what is wrong.

Three things are compared: the file with what was quantized; what ComfyUI's own loader makes of the file with the file, key
by key; and what one of its layers in each format gives with what the file's weights give.

It takes the memory of the tensors that were kept, as the host holds them: codes stay in the file, and comparing adds the largest
tensor. It takes the time to load the file and to read it once more, and twice more where it was copied from another disk.
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management
import comfy.quant_ops
import comfy.utils
import torch
from comfy import model_detection

from ...quant_core.errors import QuantizationError, VerificationError
from ...quant_core.formats import detect_layer
from ...quant_core.formats.layer_json import CONFIG_KEY, layer_configs
from ...quant_core.output import verify_file
from ...quant_core.run.report import Report
from ...quant_core.sources import SafetensorsFile
from .building import layers_to_decode, quantized_linear, reload
from .folders import TEXT_ENCODERS, remove
from .quantizing import Quantized
from .running import is_interrupt
from .sources import is_quantized

__all__ = ["verify_saved"]

_TOKENS = 32  # of the random input of a layer that is run; kernels of cards refuse 16 and fewer
_TOLERANCE = 0.1  # relative error of its output; quantized inputs make about 0.03, wrong weights about 1
_CHUNK = 1 << 24  # bytes
_TINY = torch.finfo(torch.float32).tiny
_CONFIG = f".{CONFIG_KEY}"  # end of the name of a layer's JSON tensor
_NAMED = 3  # names of tensors that a sentence holds at most


def verify_saved(quantized: Quantized, paths: list[Path]) -> str:
    """Reload the saved files of ``quantized`` as ComfyUI does and compare them with what was written; says how that was done.

    Raises:
        VerificationError: a file does not hold what was quantized. All of them then have other names, NAME.failed.safetensors.
    """
    try:
        for path, original in zip(paths, quantized.files.values(), strict=True):
            _check_copy(path, original)
            if problems := verify_file(path).problems:
                raise VerificationError(problems[0])
        _check_contents(quantized.report, paths)
        try:
            return "\n".join(_verified(path, quantized) for path in paths)
        except (MemoryError, torch.OutOfMemoryError):
            return "Not verified: there is too little memory to load the model. The file holds what was quantized, byte for byte."
    except BaseException as error:  # whatever a loader says of a file that it cannot read
        if is_interrupt(error) or not isinstance(error, Exception):
            remove(paths)
            raise
        reason = str(error) if isinstance(error, QuantizationError) else f"ComfyUI's loader says {error!r}."
        now = ", ".join(_set_aside(path).name for path in paths)
        raise VerificationError(
            f"The saved file does not load as it was quantized and is now {now}: {reason}"
        ) from error


def _set_aside(path: Path) -> Path:
    """Rename a file that failed, so that nobody takes it for a good one."""
    names = itertools.chain([""], map(str, itertools.count(2)))
    target = next(
        free for number in names if not (free := path.with_name(f"{path.stem}.failed{number}{path.suffix}")).exists()
    )
    return path.rename(target)


def _check_copy(path: Path, original: Path) -> None:
    """The saved file is the one that was quantized, or holds the same bytes."""
    if path.samefile(original):
        return
    with open(path, "rb") as saved, open(original, "rb") as quantized:
        for one in iter(lambda: saved.read(_CHUNK), b""):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if one != quantized.read(_CHUNK):
                break
        else:
            if not quantized.read(1):
                return
    raise VerificationError(f"{path.name} is no longer what was quantized; check the disk, and save again.")


def _check_contents(report: Report, paths: list[Path]) -> None:
    """The files hold the tensors that the report speaks of, in the shapes and formats that it says, and no others."""
    if report.already_done:  # it does not speak of them
        return
    tensors, configs = {}, {}
    for path in paths:
        with SafetensorsFile(path) as opened:
            tensors |= opened.tensors
            configs |= layer_configs(opened)[0]
    shapes = {kept.name: kept.shape for kept in report.kept if not kept.removed}
    expected = set(shapes)
    for made in report.layers:
        layer = made.name.removesuffix(".weight")
        expected |= {made.name, layer + _CONFIG}
        if layer in configs:
            codec = detect_layer(layer, configs[layer], tensors)
            specs = codec.specs(codec.weight_shape(tensors[made.name].shape, configs[layer]))
            expected |= {f"{layer}.{suffix}" for suffix in specs}
            convrot = codec.rotation and codec.rotation.size
            if (codec.format.name, codec.granularity, convrot) != (made.format, made.granularity, made.convrot):
                raise VerificationError(
                    f"{layer}: is {codec} in the file, and was quantized as {made.format} per {made.granularity}."
                )
    if lost := expected - tensors.keys():
        raise VerificationError(f"{_named(lost)} missing; please report the model.")
    inputs = {f"{made.name.removesuffix('.weight')}.input_scale" for made in report.layers}
    if added := tensors.keys() - expected - inputs:
        raise VerificationError(f"{_named(added)} there that nothing has written.")
    for name, shape in shapes.items():
        if tensors[name].shape != tuple(shape):
            raise VerificationError(f"{name}: has shape {tensors[name].shape}, and {tuple(shape)} was kept.")


def _named(names: Iterable[str]) -> str:
    """ "1 tensor (a.bias) is", "4 tensors (a.bias, b.bias, c.bias …) are"."""
    names = sorted(names)
    some = ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({some}) {'are' if len(names) > 1 else 'is'}"


@dataclass
class _Loaded:
    """What became of a file's tensors in ComfyUI.

    Attributes:
        file: the file's tensors, by the names they have in the model.
        held: the model's own tensors by name; codes, scales and JSON of its quantized layers as a file names them.
        modules: the model's layers by name.
        elsewhere: the names of the file's tensors that this loader leaves to others.
    """

    file: Mapping[str, torch.Tensor]
    held: Mapping[str, torch.Tensor]
    modules: Mapping[str, torch.nn.Module]
    elsewhere: Iterable[str] = ()
    configs: dict[str, dict] = field(init=False)

    def __post_init__(self):
        names = [name for name in self.file if name.endswith(_CONFIG)]
        self.configs = {name.removesuffix(_CONFIG): _json(self.file[name]) for name in names}


def _json(tensor: torch.Tensor) -> dict:
    return json.loads(tensor.cpu().numpy().tobytes())


def _verified(path: Path, quantized: Quantized) -> str:
    """How a file was verified, in a few sentences. Raises what is wrong with it."""
    tensors = comfy.utils.load_torch_file(
        str(path), safe_load=True
    )  # not those that the loader is given, which may change them
    patcher = reload(path, quantized.kind, quantized.clip_type)
    if patcher is None:
        loaded, how = _layers_alone(tensors), "each by itself, because ComfyUI does not recognise the model"
        device = comfy.model_management.get_torch_device()
    else:
        find = _in_text_encoder if quantized.kind == TEXT_ENCODERS else _in_diffusion_model
        loaded, how, device = (
            find(tensors, patcher.model),
            "reloaded by ComfyUI's own loader and compared key by key",
            patcher.load_device,
        )
    unused = _compare(loaded)
    ran = _run(loaded, device)
    others = len(loaded.file) - sum(name.rpartition(".")[0] in loaded.configs for name in loaded.file) - len(unused)
    if layers_to_decode(path):
        how += ", with layers of this node pack because this ComfyUI cannot read the format"
    remarks = {
        "not compared: ComfyUI's model has no such tensor, of the original either": unused,
        "no part of what was reloaded, and as written": loaded.elsewhere,
        "in ComfyUI's model alone: the source lacks it, or a rule removed it": loaded.held.keys() - loaded.file.keys(),
    }
    said = [f"Verified: {len(loaded.configs)} layers and {others} other tensors, {how}; ran {', '.join(ran)}."]
    return " ".join(said + [f"{_named(names)} {remark}." for remark, names in remarks.items() if names])


def _layers_alone(tensors: Mapping[str, torch.Tensor]) -> _Loaded:
    """The quantized layers of a file, each in a layer of its own."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name in tensors:
        if name.endswith(_CONFIG):
            layers[name.removesuffix(_CONFIG)] = {}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        if layer in layers:
            layers[layer][key] = tensor
    modules = {layer: quantized_linear(layer, dict(own), _json(own[CONFIG_KEY])) for layer, own in layers.items()}
    held = {name: tensor for layer, module in modules.items() for name, tensor in _held(module, f"{layer}.").items()}
    file = {f"{layer}.{key}": tensor for layer, own in layers.items() for key, tensor in own.items()}
    return _Loaded(file, held, modules, tensors.keys() - file.keys())


def _held(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """A module's tensors by name, with the scales of quantized layers, which older ComfyUI leaves out."""
    held = {}
    for name, tensor in module.state_dict(prefix=prefix).items():
        if is_quantized(tensor):
            held |= {name: tensor._qdata, f"{name}_scale": tensor._layout_params["scale"]}
        else:
            held[name] = tensor
    return held


def _in_diffusion_model(tensors: Mapping[str, torch.Tensor], model) -> _Loaded:
    """The tensors under the names that the model's own rules give them."""
    prefix = model_detection.unet_prefix_from_state_dict(tensors)
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)} or dict(
        tensors
    )
    elsewhere = [name for name in tensors if name.removeprefix(prefix) not in inside]
    named = model.model_config.process_unet_state_dict(inside)
    root = model.diffusion_model
    return _Loaded(named, _held(root), dict(root.named_modules()), elsewhere)


def _in_text_encoder(tensors: Mapping[str, torch.Tensor], model) -> _Loaded:
    """The tensors under the names that the one encoder has that takes them: a prefix, and the name in the file."""
    held = _held(model)
    first = next(name.removesuffix(_CONFIG) + ".weight" for name in tensors if name.endswith(_CONFIG))
    stem = next((name.removesuffix(first) for name in held if name.endswith(f".{first}")), "")
    stems = (stem, stem.removesuffix("transformer."))
    named = {
        next((own + name for own in stems if own + name in held), stem + name): tensor
        for name, tensor in tensors.items()
    }
    held = {name: tensor for name, tensor in held.items() if name.startswith(stem) or name in named.keys()}
    return _Loaded(named, held, dict(model.named_modules()))


def _compare(loaded: _Loaded) -> list[str]:
    """Each of the file's tensors is in the model, bit for bit, or in the dtype that the host holds it in.

    Returns the names of those that the model has no place for: never one of a quantized layer. The file holds what its source
    held, so the original has none either.
    """
    for layer, config in loaded.configs.items():
        _check_layer(loaded, layer, config)
    unused = []
    for name, tensor in loaded.file.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        layer, _, key = name.rpartition(".")
        quantized = layer in loaded.configs
        if quantized and key == CONFIG_KEY:
            continue  # _check_layer has seen it
        if name not in loaded.held:
            if quantized:
                raise VerificationError(f"{layer}: ComfyUI's model does not hold its {key}.")
            unused.append(name)
        elif not _same(tensor, loaded.held[name], exact=quantized and key != "bias"):
            raise VerificationError(f"{layer or name}: ComfyUI holds another {key} than the file.")
    return unused


def _check_layer(loaded: _Loaded, layer: str, config: dict) -> None:
    """The model has that layer, in the format and of the shape that the file says."""
    module = loaded.modules.get(layer)
    if module is None:
        raise VerificationError(f"{layer}: ComfyUI's model has no layer of that name.")
    codec = detect_layer(layer, config, loaded.file)
    stored = loaded.held.get(layer + _CONFIG)
    if stored is not None:
        try:
            held = detect_layer(layer, _json(stored), loaded.held)
        except ValueError as error:
            raise VerificationError(f"In ComfyUI's model, {error}.") from None
        if held != codec:
            raise VerificationError(f"{layer}: is {held.config} in ComfyUI and {codec.config} in the file.")
    elif getattr(module, "layout_type", None) != comfy.quant_ops.QUANT_ALGOS[config["format"]]["comfy_tensor_layout"]:
        raise VerificationError(
            f"{layer}: ComfyUI takes it for {getattr(module, 'layout_type', 'a plain layer')}, and it is {codec} in the file."
        )
    stored, wanted = tuple(loaded.file[f"{layer}.weight"].shape), (module.out_features, module.in_features)
    shape = codec.weight_shape(stored, config)
    if shape != wanted:
        raise VerificationError(f"{layer}: the weight has shape {shape}, and the model needs {wanted}.")


def _same(tensor: torch.Tensor, held: torch.Tensor, exact: bool) -> bool:
    """Whether ``held`` has the bits of ``tensor``; unless ``exact``, in a dtype of its own that is no 8-bit one."""
    if held.dtype is not tensor.dtype:
        if exact or held.dtype.itemsize < min(2, tensor.dtype.itemsize):
            return False
        tensor = tensor.to(held.dtype)
    return tensor.shape == held.shape and torch.equal(_bits(tensor), _bits(held))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _run(loaded: _Loaded, device: torch.device) -> dict[str, str]:
    """Run the smallest layer of each codec on ``device`` as the model does: codec → that layer.

    Raises:
        VerificationError: its output is not that of the file's weights, with or without quantized activations.
    """
    sizes = {layer: loaded.file[f"{layer}.weight"].numel() for layer in loaded.configs}
    codecs = {layer: detect_layer(layer, config, loaded.file) for layer, config in loaded.configs.items()}
    smallest = {str(codecs[layer]): layer for layer in sorted(sizes, key=lambda layer: sizes[layer], reverse=True)}
    for layer in smallest.values():
        comfy.model_management.throw_exception_if_processing_interrupted()
        module, codec = loaded.modules[layer].to(device), codecs[layer]
        parts = {
            name.rpartition(".")[2]: tensor for name, tensor in loaded.file.items() if name.rpartition(".")[0] == layer
        }
        shape = codec.weight_shape(tuple(parts["weight"].shape), loaded.configs[layer])
        weight, bias = codec.dequantize(parts, shape), parts.get("bias")
        inputs = torch.randn(_TOKENS, shape[1], generator=torch.Generator().manual_seed(0))
        if codec.static_activations and "input_scale" in parts:  # larger ones clip where ComfyUI quantizes activations
            inputs *= parts["input_scale"] * codec.format.elements.max / inputs.abs().max()
        inputs = inputs.to(_computes_in(module))
        output = module(inputs.to(device)).float().cpu()
        bias = None if bias is None else bias.float()
        expected = [
            torch.nn.functional.linear(activations, weight, bias)
            for activations in (inputs.float(), codec.quantize_activations(inputs))
        ]
        error = min(float((output - one).norm() / one.norm().clamp_min(_TINY)) for one in expected)
        if not error < _TOLERANCE:  # NaN too
            raise VerificationError(
                f"{layer}: its output in ComfyUI differs by {error:.3g} from that of the file's weights."
            )
    return smallest


def _computes_in(module: torch.nn.Module) -> torch.dtype:
    """The dtype that a layer is made for."""
    weight = module.weight
    params = getattr(weight, "_params", None)
    if params is not None:
        return params.orig_dtype
    return getattr(weight, "_layout_params", {}).get("orig_dtype", getattr(module, "made_dtype", torch.float32))
