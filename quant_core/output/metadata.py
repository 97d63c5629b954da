"""What a quantized file says of itself, in the header and beside each layer."""

import json
from collections.abc import Mapping

import torch

from ..errors import SourceError
from ..formats import FORMATS
from ..sources.source import Source

__all__ = [
    "QUANTIZATION_KEY",
    "PROVENANCE_KEY",
    "NOTE_KEY",
    "CONFIG_SUFFIX",
    "ENCODER_PREFIX",
    "header_layers",
    "loading_note",
    "quantization_metadata",
    "layer_configs",
    "provenance",
    "read_config",
]

QUANTIZATION_KEY = "_quantization_metadata"  # read by ComfyUI; overrides the tensors when present
PROVENANCE_KEY = "learned_rounding"  # read by us: version, recipe, fingerprint
NOTE_KEY = "note"  # read by people whose ComfyUI does not load the file
CONFIG_SUFFIX = ".comfy_quant"
# What ComfyUI takes of a layer's JSON from its "params" too; what stands beside them comes first.
_NESTED = ("convrot", "convrot_groupsize", "group_size", "linear_dtype")
_MOST_JSON = 1 << 22  # bytes of all layers' JSON beside them; a layer has a hundred
_HOME = "https://github.com/learned-rounding/learned_rounding"
_CHECKPOINT_PREFIX = "model.diffusion_model."
ENCODER_PREFIX = "text_encoders."  # of text encoders in a whole checkpoint


def header_layers(configs: Mapping[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """The layers as the header lists them.

    ComfyUI before 0.27 looks the layers of a whole checkpoint up without their prefix, later releases with it:
    such layers are listed under both names.
    """
    layers = dict(configs)
    for layer, config in configs.items():
        if layer.startswith(_CHECKPOINT_PREFIX):
            layers[layer.removeprefix(_CHECKPOINT_PREFIX)] = config
    return layers


def quantization_metadata(configs: Mapping[str, dict[str, object]]) -> str:
    """The header entry for {layer: JSON}."""
    layers = header_layers(configs)
    return json.dumps({"format_version": "1.0", "layers": layers}, separators=(",", ":"))


def loading_note(configs: Mapping[str, dict[str, object]]) -> dict[str, str]:
    """The header entry that names what loads the file; none where stock ComfyUI does. ``configs``: {layer: JSON}."""
    formats = {str(config["format"]) for config in configs.values()}
    ours = sorted(name for name in formats if name in FORMATS and FORMATS[name].stock_since is None)
    return (
        {NOTE_KEY: f"ComfyUI loads {', '.join(ours)} layers with the node pack Learned Rounding installed: {_HOME}"}
        if ours
        else {}
    )


def _parse(text: str | bytes, where: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where} is not valid JSON ({error}); the file is damaged.") from None
    if not isinstance(value, dict):
        raise SourceError(f"{where} is not a JSON object; the file is damaged.")
    return value


def _flat(config: dict) -> dict:
    """A layer's JSON with the keys that ComfyUI also reads under ``params`` beside the others, as far as they are not there."""
    nested = config.get("params")
    if not isinstance(nested, dict):
        return config
    moved = {key: nested[key] for key in _NESTED if key in nested}
    rest = {key: value for key, value in nested.items() if key not in moved}
    return moved | {key: value for key, value in config.items() if key != "params"} | ({"params": rest} if rest else {})


def read_config(tensor: torch.Tensor, where: str) -> dict:
    """The layer's JSON in a ``comfy_quant`` tensor (bytes); ``params`` are read as ComfyUI does.

    Raises SourceError, which begins with ``where``, when it holds no JSON object.
    """
    return _flat(_parse(tensor.cpu().numpy().tobytes(), where))


def layer_configs(source: Source) -> tuple[dict[str, dict], dict[str, dict]]:
    """The layers' JSON as the ``comfy_quant`` tensors give it, and as the header does: two {layer: JSON}."""
    tensors, left = {}, _MOST_JSON
    for name, info in source.tensors.items():
        if name.endswith(CONFIG_SUFFIX):
            left -= info.nbytes
            if left < 0:
                raise SourceError(
                    f"{source.name}: the layers' JSON, as in tensor {name}, takes more than {_MOST_JSON:,} bytes; the file is damaged."
                )
            text = source.read(name) if info.dtype is torch.uint8 else None
            if text is None:
                raise SourceError(f"{source.name}: tensor {name} should be of dtype U8.")
            tensors[name.removesuffix(CONFIG_SUFFIX)] = read_config(text, f"{source.name}: tensor {name}")
    header = {}
    if QUANTIZATION_KEY in source.metadata:
        header = _parse(source.metadata[QUANTIZATION_KEY], f"{source.name}: header entry {QUANTIZATION_KEY}").get(
            "layers", {}
        )
    if not isinstance(header, dict) or not all(isinstance(config, dict) for config in header.values()):
        raise SourceError(f"{source.name}: header entry {QUANTIZATION_KEY} does not map layers to their formats.")
    header = {layer: _flat(config) for layer, config in header.items()}
    for layer, config in (*tensors.items(), *header.items()):
        if not isinstance(config.get("format"), (str, type(None))):
            raise SourceError(
                f"{source.name}: the format of layer {layer} is no name but {config['format']!r:.60}; the file is damaged."
            )
    return tensors, header


def provenance(source: Source) -> dict:
    """What this project wrote into the header when it made the file; empty for other files."""
    text = source.metadata.get(PROVENANCE_KEY)
    return _parse(text, f"{source.name}: header entry {PROVENANCE_KEY}") if text else {}
