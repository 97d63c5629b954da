"""The JSON of quantized layers: a tensor beside each weight, and one entry of the file's header for all of them."""

import json
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from ..errors import SourceError

__all__ = [
    "CONFIG_KEY",
    "EXPERTS_KEY",
    "QUANTIZATION_KEY",
    "LayerSource",
    "config_bytes",
    "config_tensor",
    "file_layers",
    "header_layers",
    "layer_configs",
    "loaded_configs",
    "parse_object",
    "quantization_metadata",
    "read_config",
]

CONFIG_KEY = "comfy_quant"  # last part of the name of a layer's JSON tensor
EXPERTS_KEY = "num_experts"  # key of the JSON of a bank of experts: the first side of its tensors
QUANTIZATION_KEY = "_quantization_metadata"  # header entry; overrides the tensors where both are there
_CHECKPOINT_PREFIX = "model.diffusion_model."
# Keys of a layer's JSON that ComfyUI reads below "params" too; a key at the top level takes precedence.
_NESTED = ("convrot", "convrot_groupsize", "group_size", "linear_dtype")
_MAX_JSON = 1 << 22  # bytes of all JSON tensors; one layer takes about a hundred


class LayerSource(Protocol):
    """What is needed of a source of tensors: see :class:`~..sources.Source`."""

    name: str

    @property
    def tensors(self) -> Mapping: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def read(self, name: str) -> torch.Tensor: ...


def config_bytes(config: Mapping[str, object]) -> bytes:
    """A layer's JSON in the one spelling that this project writes."""
    return json.dumps(config, separators=(",", ":")).encode()


def config_tensor(config: Mapping[str, object]) -> torch.Tensor:
    """The layer's JSON as a uint8 tensor, stored under :data:`CONFIG_KEY`."""
    return torch.frombuffer(bytearray(config_bytes(config)), dtype=torch.uint8)


def header_layers(configs: Mapping[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """{layer: JSON} as the header lists them.

    ComfyUI before 0.27 looks the layers of a whole checkpoint up without their prefix, later releases with it: such layers
    are listed under both names.
    """
    layers = dict(configs)
    for layer, config in configs.items():
        if layer.startswith(_CHECKPOINT_PREFIX):
            layers[layer.removeprefix(_CHECKPOINT_PREFIX)] = config
    return layers


def file_layers(
    configs: Mapping[str, dict[str, object]], header: Mapping[str, dict[str, object]]
) -> Mapping[str, dict[str, object]]:
    """{layer: JSON} of a file: of its JSON tensors, or where it has none of its header, without the second names there."""
    return configs or {layer: config for layer, config in header.items() if _CHECKPOINT_PREFIX + layer not in header}


def quantization_metadata(configs: Mapping[str, dict[str, object]]) -> str:
    """The header entry for {layer: JSON}."""
    return json.dumps({"format_version": "1.0", "layers": header_layers(configs)}, separators=(",", ":"))


def parse_object(text: str | bytes, where: str) -> dict:
    """A JSON object. Raises :class:`SourceError`, which begins with ``where``, for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where} is not valid JSON ({error}); the file is damaged.") from None
    if not isinstance(value, dict):
        raise SourceError(f"{where} is not a JSON object; the file is damaged.")
    return value


def read_config(tensor: torch.Tensor, where: str) -> dict:
    """A layer's JSON from its tensor of bytes, with ``params`` read as ComfyUI reads it. Raises as :func:`parse_object`."""
    return _flatten(parse_object(tensor.cpu().numpy().tobytes(), where))


def layer_configs(source: LayerSource) -> tuple[dict[str, dict], dict[str, dict]]:
    """{layer: JSON} from the JSON tensors, and {layer: JSON} from the header.

    Raises:
        SourceError: JSON that is damaged, too large or does not map layers to formats.
    """
    tensors = _tensor_configs(source)
    where = f"{source.name}: header entry {QUANTIZATION_KEY}"
    header = {}
    if QUANTIZATION_KEY in source.metadata:
        header = parse_object(source.metadata[QUANTIZATION_KEY], where).get("layers", {})
    if not isinstance(header, dict) or not all(isinstance(config, dict) for config in header.values()):
        raise SourceError(f"{where} does not map layers to their formats.")
    header = {layer: _flatten(config) for layer, config in header.items()}
    _check_formats(source.name, (*tensors.items(), *header.items()))
    return tensors, header


def loaded_configs(source: LayerSource) -> dict[str, dict]:
    """{layer: JSON} as ComfyUI reads it: the header's over the tensors'."""
    tensors, header = layer_configs(source)
    return {**tensors, **header}


def _tensor_configs(source: LayerSource) -> dict[str, dict]:
    configs, size = {}, 0
    for name, info in source.tensors.items():
        layer, _, suffix = name.rpartition(".")
        if suffix != CONFIG_KEY or not layer:
            continue
        size += info.nbytes
        if size > _MAX_JSON:
            raise SourceError(
                f"{source.name}: the JSON tensors of the layers, {name} among them, take more than {_MAX_JSON:,} bytes; "
                "the file is damaged."
            )
        if info.dtype is not torch.uint8:
            raise SourceError(f"{source.name}: tensor {name} must have dtype U8; the file is damaged.")
        configs[layer] = read_config(source.read(name), f"{source.name}: tensor {name}")
    return configs


def _check_formats(source: str, configs: Iterable[tuple[str, dict]]) -> None:
    for layer, config in configs:
        if not isinstance(config.get("format"), (str, type(None))):
            raise SourceError(
                f"{source}: the format of layer {layer} is {config['format']!r:.60}, and must be a name; the file is damaged."
            )


def _flatten(config: dict) -> dict:
    """A layer's JSON with the keys that ComfyUI also reads below ``params`` at the top level, where they are not there."""
    nested = config.get("params")
    if not isinstance(nested, dict):
        return config
    moved = {key: nested[key] for key in _NESTED if key in nested}
    rest = {key: value for key, value in nested.items() if key not in moved}
    return moved | {key: value for key, value in config.items() if key != "params"} | ({"params": rest} if rest else {})
