"""Run time of ``lrq plan`` for Flux.1 dev, and its estimates compared with a run.

The first file has the names and shapes of Flux.1 dev in its header and a sparse data section, because a plan reads only the
header. Each command runs in a separate process; one that only imports torch is the baseline. The second file has random
weights in the shapes of Flux.1 dev, reduced with ``--quick``. Size and run time of each recipe are estimated as by
``lrq plan --time``, then measured.
"""

import json
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.output import SafetensorsWriter, header_bytes
from learned_rounding.quant_core.run.estimate import estimate_seconds, estimate_size
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo
from learned_rounding.quant_core.sources.dtypes import DTYPE_NAMES
from learned_rounding.quant_core.workers import usable_device
from learned_rounding.tests.architectures import read

__all__ = ["flux", "make_header", "make_weights"]

ROOT = Path(__file__).parents[1]
RECIPES = {
    "int8 row nearest": Recipe(format="int8_tensorwise", convrot=False, rounding="nearest"),
    "fp8 auto": Recipe(),
    "int8 block auto": Recipe(format="int8_blockwise"),
    "int8 row ConvRot principal": Recipe(format="int8_tensorwise", convrot=True, rounding="principal"),
}
_COMMANDS = {
    "import torch": ["-c", "import torch"],
    "lrq plan": [ROOT, "plan", "-i"],
    "lrq plan --int8 --convrot": [ROOT, "plan", "--int8", "--convrot", "-i"],
}
_QUICK_DIVISOR = 8  # of each side with --quick


def flux(divisor: int = 1) -> dict[str, TensorInfo]:
    """Tensors of Flux.1 dev in bfloat16, each side divided by ``divisor``."""
    return {
        name: TensorInfo(torch.bfloat16, tuple(max(side // divisor, 1) for side in entry.shape))
        for name, entry in read("flux").items()
    }


def make_header(path: Path) -> None:
    """Write a sparse file with the header of Flux.1 dev."""
    entries, end = {}, 0
    for name, info in flux().items():
        entries[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": info.shape,
            "data_offsets": [end, end := end + info.nbytes],
        }
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + end)


def make_weights(path: Path, infos: dict[str, TensorInfo], device: torch.device) -> None:
    """Write a file of random weights with the given shapes."""
    generator = torch.Generator(device).manual_seed(0)
    with SafetensorsWriter(path, header_bytes(infos.items(), {})) as writer:
        for name, info in infos.items():
            writer.add(name, (torch.randn(info.shape, generator=generator, device=device) * 0.02).to(info.dtype).cpu())
        writer.finish({})


def _measure_process(words: list) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _measure_commands(path: Path, rounds: int) -> list[dict]:
    """Run the commands alternately on a file; returns the median run time of each."""
    times = {name: [] for name in _COMMANDS}
    for _ in range(rounds):
        for name, words in _COMMANDS.items():
            times[name].append(_measure_process([*words, path] if words[-1] == "-i" else words))
    return [{"command": name, "seconds": statistics.median(measured)} for name, measured in times.items()]


def _compare_estimates(source: Path, target: Path, recipe: Recipe, device: torch.device) -> dict:
    """Estimate size and run time of a recipe, then run it."""
    with SafetensorsFile(source) as opened:
        plan = recipe.plan(opened)
        size, seconds = estimate_size(opened, recipe, plan), estimate_seconds(opened, recipe, plan, device)
    start = time.perf_counter()
    quantize_file(source, target, recipe, device=device, overwrite=True)
    measured = time.perf_counter() - start
    with SafetensorsFile(target) as output:
        stored = sum(info.nbytes for info in output.tensors.values())
    target.unlink()
    return {"size foreseen MB": size / 1e6, "size MB": stored / 1e6, "seconds foreseen": seconds, "seconds": measured}


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        ("--rounds", {"type": int, "default": 3}),
        ("--folder", {"type": Path, "help": "folder for the files (default: the temporary folder)"}),
    )
    device, folder = usable_device(None), Path(tempfile.mkdtemp(dir=args.folder))
    try:
        make_header(folder / "header.safetensors")
        commands = _measure_commands(folder / "header.safetensors", args.rounds)
        source = folder / "model.safetensors"
        make_weights(source, flux(_QUICK_DIVISOR if args.quick else 1), device)
        rows = [
            {"recipe": name, **_compare_estimates(source, folder / "out.safetensors", recipe, device)}
            for name, recipe in RECIPES.items()
        ]
        finish(args, rows, commands=commands, source_gb=source.stat().st_size / 1e9)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
