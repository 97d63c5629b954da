"""Does ComfyUI read a saved file as it was written? Its loaders notice little of what is wrong."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import comfy.model_management
import torch

from ...quant_core.checkpoints import SafetensorsFile, layer_configs, verify_file
from ...quant_core.checkpoints.verify import layer_encoding
from ...quant_core.errors import QuantizationError, VerificationError
from ...quant_core.report import Report
from .building import layers_to_decode, quantized_linear, reload
from .folders import TEXT_ENCODERS
from .quantizing import Quantized
from .running import is_interrupt

__all__ = ["verify_saved"]

_TOKENS = 4  # of the random input of a layer that is run
_TOLERANCE = 0.1  # relative error of its output; quantized inputs make about 0.03, wrong weights about 1


def verify_saved(quantized: Quantized, paths: list[Path]) -> str:
    """Reload the saved files of ``quantized`` as ComfyUI does and compare them with what was written; says how that was done.

    Raises:
        VerificationError: a file does not hold what was quantized. It then has another name, NAME.failed.safetensors.
    """
    said = []
    for path in paths:
        try:
            said.append(_verified(path, quantized.kind))
        except Exception as error:  # whatever a loader says of a file that it cannot read
            if is_interrupt(error):
                raise
            reason = str(error) if isinstance(error, QuantizationError) else f"ComfyUI's loader says {error!r}."
            raise VerificationError(f"The saved file does not load as it was quantized and is now {_set_aside(path).name}: {reason}") from error
    _check_names(quantized.report, paths)
    return "\n".join(dict.fromkeys(said))


def _set_aside(path: Path) -> Path:
    """Rename a file that failed, so that nobody takes it for a good one."""
    names = itertools.chain([""], map(str, itertools.count(2)))
    target = next(
        free for number in names if not (free := path.with_name(f"{path.stem}.failed{number}{path.suffix}")).exists()
    )
    return path.rename(target)


def _check_names(report: Report, paths: list[Path]) -> None:
    """Every tensor that the report speaks of is in one of the files."""
    written = set()
    for path in paths:
        with SafetensorsFile(path) as opened:
            written |= opened.tensors.keys()
    reported = [layer.name for layer in report.layers] + [kept.name for kept in report.kept if not kept.removed]
    if lost := [name for name in reported if name not in written]:
        failed = ", ".join(_set_aside(path).name for path in paths)
        raise VerificationError(f"{len(lost)} tensors are missing in what is now {failed}, first {lost[0]}; please report the model.")


def _verified(path: Path, kind: str) -> str:
    """How a file was verified, in one sentence. Raises what is wrong with it."""
    found = verify_file(path)
    if found.problems:
        raise VerificationError(found.problems[0])
    model, how = None, "each by itself, decoded by this node pack because this ComfyUI cannot read the format"
    if not layers_to_decode(path):
        how = "each by itself, in ComfyUI's own quantized layer"
        if kind != TEXT_ENCODERS:
            model = reload(path, kind)
            how += ", because ComfyUI does not recognise the model"
    if model is not None:
        how = "reloaded by ComfyUI's own loader"
    modules = {} if model is None else dict(model.model.named_modules())
    with SafetensorsFile(path) as opened:
        configs = layer_configs(opened)[0]
        smallest = _smallest_per_encoding(opened, configs)
        for layer, config in configs.items():
            comfy.model_management.throw_exception_if_processing_interrupted()
            _check_layer(opened, layer, config, _module(modules, layer), run=layer in smallest.values())
    return f"Verified: {len(configs)} layers, {how}; ran {', '.join(smallest)}."


def _module(modules: Mapping[str, torch.nn.Module], layer: str) -> torch.nn.Module | None:
    """The layer among the modules of the reloaded model; None without a model, or where it has another name there."""
    return modules.get(f"diffusion_model.{layer}") or modules.get(layer.removeprefix("model."))


def _smallest_per_encoding(opened: SafetensorsFile, configs: Mapping[str, dict]) -> dict[str, str]:
    """Encoding → the smallest layer in it."""
    sizes = {layer: opened.tensors[f"{layer}.weight"].nbytes for layer in configs}
    largest_first = sorted(configs, key=sizes.get, reverse=True)
    return {str(layer_encoding(layer, configs[layer], opened.tensors)): layer for layer in largest_first}


def _check_layer(opened: SafetensorsFile, layer: str, config: dict, module, run: bool) -> None:
    """The layer in ComfyUI holds the file's codes and, where it is to run, multiplies by what they mean."""
    names = [name for name in opened.tensors if name.rpartition(".")[0] == layer]
    tensors = {name.rpartition(".")[2]: opened.read(name) for name in names}
    alone = quantized_linear(layer, dict(tensors), config) if module is None or run else None
    held = (module or alone).weight
    codes = getattr(held, "_qdata", held)
    if codes.dtype is not tensors["weight"].dtype or not torch.equal(_bits(codes), _bits(tensors["weight"])):
        raise VerificationError(f"{layer}: ComfyUI holds other codes than the file.")
    if module is not None and tuple(codes.shape) != (module.out_features, module.in_features):
        raise VerificationError(
            f"{layer}: the weight has shape {tuple(codes.shape)}, and the model needs {(module.out_features, module.in_features)}."
        )
    if run:
        encoding = layer_encoding(layer, config, opened.tensors)
        scale = tensors["weight_scale"].reshape(encoding.scale_shape(codes.shape))
        weight, bias = encoding.decode(tensors["weight"], scale), tensors.get("bias")
        inputs = torch.randn(_TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0))
        expected = torch.nn.functional.linear(inputs, weight, bias if bias is None else bias.float())
        error = float((alone(inputs) - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
        if not error < _TOLERANCE:  # NaN too
            raise VerificationError(f"{layer}: its output in ComfyUI is {error:.3g} off what the file's weights give.")


def _bits(codes: torch.Tensor) -> torch.Tensor:
    return codes.cpu().view(torch.uint8)
