"""Table of golden cases: command lines of ``lrq`` whose output files are compared between two commits.

Only options of release 0.1.0 and --general are used, so that every commit since then can run every case.
"""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CASES", "OUTPUT", "Case"]

OUTPUT = "out.safetensors"
FOLDER_OF_SOURCES = "../../sources"  # relative to a case's folder, so that no output depends on where the tree is
_GENERAL, _NO_CONVROT, _PARSER = "--general", "--no-convrot", "quant_core/cli/parser.py"
_PACKAGES = {"model.gguf": "gguf", "prodigy": "prodigyplus"}  # source or optimizer → package that it needs


@dataclass(frozen=True)
class Case:
    """One run, or a run that is killed and the one that resumes it.

    Attributes:
        name: folder of the outputs, and the key in ``hashes.json``.
        args: options after the source; names of files in ``sources.py`` are written ``@NAME``.
        source: file name in ``sources.py``.
        command: ``quantize`` or ``migrate``.
        exact: whether all arithmetic is exact or rounded once, so that the output is the same on every machine.
        kill_after: number of printed lines after which a first run is killed; 0 for none.
    """

    name: str
    args: str | Sequence[str] = ""
    source: str = "model.safetensors"
    command: str = "quantize"
    exact: bool = False
    kill_after: int = 0

    @property
    def _args(self) -> list[str]:
        return self.args.split() if isinstance(self.args, str) else list(self.args)

    @property
    def sources(self) -> set[str]:
        """Names of all files it reads."""
        return {self.source, *(arg[1:] for arg in self._args if arg.startswith("@"))}

    @property
    def missing_package(self) -> str | None:
        """A package that the case needs and that is not installed."""
        needed = (_PACKAGES.get(word) for word in (self.source, *self._args))
        return next((name for name in needed if name and importlib.util.find_spec(name) is None), None)

    def argv(self, tree: Path) -> list[str]:
        """Arguments of the ``lrq`` of a source tree, to be run in the case's folder.

        No preset recognizes most of the sources: commits that refuse such models have an option that allows them. Commits that
        rotate INT8 per row by default have an option against it.
        """
        args = [f"{FOLDER_OF_SOURCES}/{arg[1:]}" if arg.startswith("@") else arg for arg in self._args]
        argv = [self.command, "--input", f"{FOLDER_OF_SOURCES}/{self.source}", "--output", OUTPUT, *args]
        if self.command == "quantize":
            argv += ["--device", "cpu", "--verbose", "--report", "report.json"]
            parser = tree / _PARSER
            known = parser.read_text(encoding="utf-8") if parser.exists() else ""
            unrotated = "--format int8_tensorwise" in " ".join(args) and "--convrot" not in args
            argv += [_GENERAL] * (_GENERAL in known) + [_NO_CONVROT] * (unrotated and _NO_CONVROT in known)
        return argv


def _quantize(text: str, **options) -> Case:
    """``NAME: ARGS`` as a case."""
    name, _, args = text.partition(":")
    return Case(name.strip(), args, **options)


def _nearest(text: str, **options) -> Case:
    """A case of round to nearest, which is exact."""
    return _quantize(f"{text} --rounding nearest", exact=True, **options)


_LAYER_CONFIG = json.dumps(
    {
        r"attn\.qkv": {"format": "int8", "convrot": 16},
        r"mlp\.0": {"format": "fp8", "granularity": "block", "block_size": 64},
        r"blocks\.0\.mlp\.2": "skip",
        "blocks.1.mlp.0": {"format": "float8_e5m2"},
    }
)

CASES: tuple[Case, ...] = (
    # format × granularity × rotation, round to nearest
    _nearest("nearest-fp8: --format float8_e4m3fn"),
    _nearest("nearest-fp8-decoded: --fp8 --full_precision_matrix_mult"),
    _nearest("nearest-e5m2: --format float8_e5m2"),
    _nearest("nearest-fp8-row: --format float8_e4m3fn_rowwise"),
    _nearest("nearest-fp8-block: --fp8 --scaling_mode block"),
    _nearest("nearest-fp8-block-32: --format float8_e4m3fn_blockwise --block_size 32"),
    _nearest("nearest-int8-row: --format int8_tensorwise"),
    _nearest("nearest-int8-tensor: --format int8_tensorwise --scaling_mode tensor"),
    _nearest("nearest-int8-block-8: --format int8_blockwise --block_size 8"),
    _nearest("nearest-int8-block-256: --int8 --scaling_mode block --block_size 256"),
    _nearest("nearest-convrot: --int8 --convrot"),
    _nearest("nearest-convrot-64: --int8 --convrot 64"),
    _nearest("nearest-convrot-16: --int8 --convrot-group-size 16"),
    _quantize("nearest-convrot-auto: --int8 --convrot auto --rounding nearest"),
    # which layers
    _nearest("keep-patterns: --format int8_tensorwise --exclude-layers attn\\.proj --exclude-layers ^blocks\\.1"),
    _nearest("custom-layers: --fp8 --custom-layers mlp --custom-type int8_tensorwise"),
    Case("layer-config", ("--fp8", "--layer-config", _LAYER_CONFIG, "--rounding", "nearest"), exact=True),
    _nearest("heur: --format int8_tensorwise --heur", source="wide.safetensors"),
    _nearest("preset-detected: --fp8", source="flux.safetensors"),
    _nearest("preset-named: --format int8_tensorwise --preset chroma", source="flux.safetensors"),
    _nearest("preset-none: --format int8_tensorwise --preset none", source="flux.safetensors"),
    _nearest("checkpoint: --format int8_tensorwise", source="checkpoint.safetensors"),
    _nearest("special-fp8: --fp8", source="special.safetensors"),
    _nearest("special-int8: --format int8_tensorwise", source="special.safetensors"),
    _nearest("recipe: --recipe @recipe.toml"),
    # sources
    _nearest("shards: --format int8_tensorwise", source="shards.safetensors.index.json"),
    _nearest("pickle: --fp8", source="model.pt"),
    _nearest("gguf: --format int8_tensorwise", source="model.gguf"),
    _nearest("requantize-scaled-fp8: --format int8_tensorwise --requantize", source="scaled_fp8.safetensors"),
    _nearest("requantize-plain-fp8: --format int8_tensorwise --requantize", source="plain_fp8.safetensors"),
    _nearest("requantize-mislabelled: --fp8 --requantize", source="mislabelled.safetensors"),
    _nearest("requantize-external: --format int8_tensorwise --requantize", source="external.safetensors"),
    # migrate
    Case("migrate-scaled-fp8", source="scaled_fp8.safetensors", command="migrate", exact=True),
    Case("migrate-decoded", source="scaled_fp8_decoded.safetensors", command="migrate", exact=True),
    Case("migrate-drop", "--drop_input_scale", source="scaled_fp8.safetensors", command="migrate", exact=True),
    Case("migrate-mislabelled", source="mislabelled.safetensors", command="migrate", exact=True),
    Case("migrate-external", source="external.safetensors", command="migrate", exact=True),
    Case("migrate-calibrated", "--calibration @full.calib.safetensors", "scaled_fp8.safetensors", "migrate"),
    # scale search, without activations
    _quantize("auto-default:"),
    _quantize("auto-e5m2: --format float8_e5m2"),
    _quantize("auto-fp8-row: --fp8 --scaling_mode row"),
    _quantize("auto-fp8-block: --fp8 --scaling_mode block --block_size 64"),
    _quantize("auto-int8-tensor: --format int8_tensorwise --scaling_mode tensor"),
    _quantize("auto-int8-block: --int8 --scaling_mode block"),
    _quantize("auto-convrot: --int8 --convrot auto"),
    _quantize("auto-format: --format auto"),
    _quantize("auto-special: --int8 --convrot", source="special.safetensors"),
    _quantize("auto-gguf: --fp8", source="model.gguf"),
    _quantize("synthetic-bias: --fp8 --bias_correction synthetic --calib_samples 256 --seed 5"),
    # principal and stochastic
    _quantize("principal-fp8: --fp8 --rounding principal"),
    _quantize("principal-convrot: --int8 --convrot --rounding principal --top_p 0.1 --min_k 4 --max_k 24"),
    _quantize("principal-block: --int8 --scaling_mode block --block_size 32 --rounding principal --weight_cost 0.1"),
    _quantize("principal-full-matrix: --fp8 --scaling_mode row --rounding principal --full_matrix"),
    _quantize("principal-original: --fp8 --rounding principal --optimizer original --num_iter 40"),
    _quantize("stochastic-fp8: --fp8 --rounding stochastic --seed 7"),
    _quantize("stochastic-int8: --int8 --convrot 64 --rounding stochastic"),
    # calibrated
    _quantize("calibrated-fp8: --fp8 --calibration @full.calib.safetensors"),
    _quantize("calibrated-e5m2: --format float8_e5m2 --calibration @full.calib.safetensors"),
    _quantize("calibrated-fp8-row: --fp8 --scaling_mode row --calibration @full.calib.safetensors"),
    _quantize("calibrated-fp8-block: --fp8 --scaling_mode block --calibration @full.calib.safetensors"),
    _quantize("calibrated-int8: --format int8_tensorwise --calibration @full.calib.safetensors"),
    _quantize(
        "calibrated-int8-tensor: --format int8_tensorwise --scaling_mode tensor --calibration @mixed.calib.safetensors"
    ),
    _quantize(
        "calibrated-int8-block: --int8 --scaling_mode block --block_size 16 --calibration @mixed.calib.safetensors"
    ),
    _quantize("calibrated-convrot: --int8 --convrot --calibration @mixed.calib.safetensors"),
    _quantize("calibrated-convrot-auto: --int8 --convrot auto --calibration @full.calib.safetensors"),
    _quantize("calibrated-paired: --int8 --convrot 64 --calibration @paired.calib.safetensors"),
    _quantize("calibrated-dampening: --fp8 --damping 0.05 --sweeps 3 --calibration @full.calib.safetensors"),
    _quantize(
        "calibrated-one-pass: --format int8_tensorwise --sweeps 0 --bias_correction none --calibration @full.calib.safetensors"
    ),
    _quantize("nearest-bias: --format int8_tensorwise --rounding nearest --calibration @full.calib.safetensors"),
    # gradient steps
    _quantize("original: --fp8 --optimizer original --num_iter 60 --calibration @full.calib.safetensors"),
    _quantize(
        "adamw: --format int8_tensorwise --optimizer adamw --num_iter 60 --lr 0.01 --lr_schedule exponential "
        "--calibration @full.calib.safetensors"
    ),
    _quantize(
        "radam: --int8 --convrot --optimizer radam --num_iter 60 --lr_schedule plateau --early_stop 20 "
        "--calibration @mixed.calib.safetensors"
    ),
    _quantize(
        "prodigy: --fp8 --scaling_mode row --optimizer prodigy --num_iter 40 --calibration @full.calib.safetensors"
    ),
    # mixed precision
    _quantize("measured: --format measured --calibration @full.calib.safetensors"),
    _quantize("measured-size: --format measured --target_size 0.0003 --calibration @full.calib.safetensors"),
    _quantize("measured-error: --format measured --target_error 0.02 --calibration @mixed.calib.safetensors"),
    _quantize(
        "measured-blocks: --format measured --block_formats --rounding nearest --calibration @full.calib.safetensors"
    ),
    # killed, then resumed
    _quantize("resumed: --int8 --convrot", kill_after=9),
    _quantize("resumed-calibrated: --fp8 --calibration @full.calib.safetensors", kill_after=9),
    _quantize("resumed-pickle: --fp8 --rounding nearest", source="model.pt", kill_after=9),
)
