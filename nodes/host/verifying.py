"""Verify saved files: ComfyUI's loaders report few errors of a file themselves.

Three comparisons: the file with what was quantized; the model that ComfyUI's own loader makes of the file with the file,
tensor by tensor; and the output of one of its layers in each format with that of the file's weights.

Memory: the unquantized tensors in ComfyUI's dtype, plus the largest tensor; quantized values stay in the file. Time: loading
the file and reading it twice more, and twice more where it was copied from another disk.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch

from ...quant_core.errors import QuantizationError, VerificationError
from ...quant_core.formats import detect_layer
from ...quant_core.formats.layer_json import layer_configs
from ...quant_core.output import inspect_file, verify_file
from ...quant_core.run.report import Report
from ...quant_core.sources import SafetensorsFile
from .decoding import layers_to_decode
from .expanding import kitchen_version
from .folders import TEXT_ENCODERS, remove_files
from .loaded_layers import (
    JSON_SUFFIX,
    compare_tensors,
    match_diffusion_model,
    match_single_layers,
    match_text_encoder,
    run_layers,
)
from .loading import reload_file
from .quantizing import Quantized
from .running import is_interrupt

__all__ = ["verify_saved"]

_CHUNK = 1 << 24  # bytes
_NAMED = 3  # most names of tensors in one sentence


def verify_saved(quantized: Quantized, paths: list[Path]) -> str:
    """Reload the saved files of ``quantized`` as ComfyUI does and compare them with what was quantized; returns a summary.

    Raises:
        VerificationError: a file differs from what was quantized. All files are then renamed to NAME.failed.safetensors, unless
            Windows refuses.
    """
    warnings: list[str] = []
    try:
        for path, original in zip(paths, quantized.files.values(), strict=True):
            _check_copy(path, original)
            warnings += _check_file(path)
        _check_contents(quantized.report, paths)
        try:
            return "\n".join([*(_verify_loading(path, quantized) for path in paths), *warnings[:_NAMED]])
        except (MemoryError, torch.OutOfMemoryError):
            return "Not verified: not enough memory to load the model. The file is byte for byte what was quantized."
    except BaseException as error:  # any error of a loader that cannot read the file
        if is_interrupt(error) or not isinstance(error, Exception):
            remove_files(paths)
            raise
        reason = str(error) if isinstance(error, QuantizationError) else f"ComfyUI's loader raised {error!r}."
        try:
            names = ", ".join(_rename_failed(path).name for path in paths)
        except PermissionError:  # Windows renames no file that the failed loader still maps
            names = ", ".join(path.name for path in paths)
            raise VerificationError(
                f"The saved file failed verification; it is still open, so restart ComfyUI and delete {names}: {reason}"
            ) from error
        raise VerificationError(f"The saved file failed verification and was renamed to {names}: {reason}") from error


def _rename_failed(path: Path) -> Path:
    """Rename a file that failed verification, so that no loader lists it as a good one."""
    numbers = itertools.chain([""], map(str, itertools.count(2)))
    target = next(
        free for number in numbers if not (free := path.with_name(f"{path.stem}.failed{number}{path.suffix}")).exists()
    )
    return path.rename(target)


def _check_copy(path: Path, original: Path) -> None:
    """Raise VerificationError unless the saved file is the file that was quantized, or has the same bytes."""
    if path.samefile(original):
        return
    with open(path, "rb") as saved, open(original, "rb") as quantized:
        for chunk in iter(lambda: saved.read(_CHUNK), b""):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if chunk != quantized.read(_CHUNK):
                break
        else:
            if not quantized.read(1):
                return
    raise VerificationError(f"{path.name} differs from what was quantized; check the disk, and save again.")


def _check_file(path: Path) -> list[str]:
    """Raise VerificationError unless ComfyUI can load the file and its values are finite; returns notes and warnings."""
    bar = comfy.utils.ProgressBar(1)
    check = comfy.model_management.throw_exception_if_processing_interrupted
    result = verify_file(path, check=check, progress=bar.update_absolute)
    if result.problems:
        raise VerificationError(result.problems[0])
    notes = [f"Rounded with the running model: {result.model_run}."] if result.model_run else []
    return notes + result.warnings


def _check_contents(report: Report, paths: list[Path]) -> None:
    """Raise VerificationError unless the files have exactly the tensors of the report, in its shapes and formats."""
    if report.already_done:  # such a report lists no layers
        return
    tensors, configs = {}, {}
    for path in paths:
        with SafetensorsFile(path) as file:
            tensors |= file.tensors
            configs |= layer_configs(file)[0]
    shapes = {kept.name: kept.shape for kept in report.kept if not kept.removed}
    expected, optional = set(shapes), set()
    for made in report.layers:
        layer = made.name.removesuffix(".weight")
        expected |= {made.name, layer + JSON_SUFFIX}
        if layer not in configs:
            continue
        codec = detect_layer(layer, configs[layer], tensors)
        shape = codec.original_shape(tensors[made.name].shape, configs[layer])
        expected |= {f"{layer}.{suffix}" for suffix in codec.specs(shape[-2:])}
        optional |= {f"{layer}.{suffix}" for suffix in codec.file_specs(shape, calibrated=True)}
        convrot = codec.rotation and codec.rotation.size
        if (codec.format.name, codec.granularity, convrot) != (made.format, made.granularity, made.convrot):
            raise VerificationError(
                f"{layer}: {codec} in the file, but it was quantized as {made.format} per {made.granularity}."
            )
    if lost := expected - tensors.keys():
        raise VerificationError(f"The file lacks {_list_names(lost)}; please report the model.")
    if added := tensors.keys() - expected - optional:
        raise VerificationError(f"The file has {_list_names(added)} that the run did not write.")
    for name, shape in shapes.items():
        if tensors[name].shape != tuple(shape):
            raise VerificationError(f"{name}: shape {tensors[name].shape} in the file, {tuple(shape)} in the source.")


def _list_names(names: Iterable[str]) -> str:
    """ "1 tensor (a.bias)", "4 tensors (a.bias, b.bias, c.bias …)"."""
    names = sorted(names)
    some = ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({some})"


def _verify_loading(path: Path, quantized: Quantized) -> str:
    """Compare a file with the model that ComfyUI loads from it, and run layers of it; returns a summary.

    Raises:
        VerificationError: they differ.
    """
    # Read apart from the tensors that the loader gets, which it may change.
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    patcher = reload_file(path, quantized.kind, quantized.clip_type)
    if patcher is None:
        loaded = match_single_layers(tensors)
        how = "each loaded by itself because ComfyUI does not recognize the model"
        device = comfy.model_management.get_torch_device()
    else:
        match = match_text_encoder if quantized.kind == TEXT_ENCODERS else match_diffusion_model
        loaded, device = match(tensors, patcher.model), patcher.load_device
        how = "reloaded by ComfyUI's own loader and compared tensor by tensor"
    unused = compare_tensors(loaded)
    ran = run_layers(loaded, device)
    others = len(loaded.file) - sum(name.rpartition(".")[0] in loaded.configs for name in loaded.file) - len(unused)
    if decoded := layers_to_decode(path):
        how += ", with decoding layers of this node pack because this ComfyUI cannot run the format"
    elif loaded.expanded:
        how += (
            f", which gets INT8 layers of the same values from this node pack because comfy-kitchen {kitchen_version()} cannot "
            "run the format"
        )
    remarks = {
        "Not compared because ComfyUI's model has no such tensor": unused,
        "Outside the reloaded model, and as written": loaded.elsewhere,
        "Only in ComfyUI's model, because the source lacks them or a rule removed them": loaded.model.keys()
        - loaded.file.keys(),
    }
    summary = [f"Verified: {len(loaded.configs)} layers and {others} other tensors, {how}; ran {', '.join(ran)}."]
    if decoded or loaded.expanded:
        summary.append(inspect_file(path).stock)
    return " ".join(summary + [f"{remark}: {_list_names(names)}." for remark, names in remarks.items() if names])
