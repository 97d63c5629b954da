"""``lrq plan`` of a model as large as Flux.1 dev, and what it foresees beside what a run takes.

The first file has Flux.1 dev's true names and shapes and no data on the disk (holes), since a plan reads the header alone; each
command runs in a process of its own, beside one that only imports torch. The second has Flux.1 dev's tensors in small (quick) or in
full, random; each recipe is foreseen with ``--time`` and run.
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
from learned_rounding.quant_core.run.quantize import usable_device
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo
from learned_rounding.quant_core.sources.dtypes import DTYPE_NAMES
from learned_rounding.tests.architectures import read

__all__ = ["flux", "make_header", "make_weights"]

ROOT = Path(__file__).parents[1]
RECIPES = {
    "int8 row nearest": Recipe(format="int8_tensorwise", rounding="nearest"),
    "fp8 auto": Recipe(),
    "int8 block auto": Recipe(format="int8_blockwise"),
    "int8 row ConvRot principal": Recipe(format="int8_tensorwise", convrot=True, rounding="principal"),
}
_COMMANDS = {
    "import torch": ["-c", "import torch"],
    "lrq plan": [ROOT, "plan", "-i"],
    "lrq plan --int8 --convrot": [ROOT, "plan", "--int8", "--convrot", "-i"],
}
_SMALL = 8  # of each side, in quick


def flux(parts: int = 1) -> dict[str, TensorInfo]:
    """Flux.1 dev's tensors in bfloat16, each side divided by ``parts``."""
    return {
        name: TensorInfo(torch.bfloat16, tuple(max(side // parts, 1) for side in entry.shape))
        for name, entry in read("flux").items()
    }


def make_header(path: Path) -> None:
    """A file of Flux.1 dev's header and holes."""
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
    """A file of random weights of those shapes."""
    generator = torch.Generator(device).manual_seed(0)
    with SafetensorsWriter(path, header_bytes(infos.items(), {})) as writer:
        for name, info in infos.items():
            writer.add(name, (torch.randn(info.shape, generator=generator, device=device) * 0.02).to(info.dtype).cpu())
        writer.finish({})


def _seconds(words: list) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _planned(path: Path, rounds: int) -> list[dict]:
    taken = {name: [] for name in _COMMANDS}
    for _ in range(rounds):  # the commands take turns
        for name, words in _COMMANDS.items():
            taken[name].append(_seconds([*words, path] if words[-1] == "-i" else words))
    return [{"command": name, "seconds": statistics.median(times)} for name, times in taken.items()]


def _foreseen(source: Path, target: Path, recipe: Recipe, device: torch.device) -> dict:
    with SafetensorsFile(source) as opened:
        plan = recipe.plan(opened)
        size, seconds = estimate_size(opened, recipe, plan), estimate_seconds(opened, recipe, plan, device)
    start = time.perf_counter()
    quantize_file(source, target, recipe, device=device, overwrite=True)
    taken = time.perf_counter() - start
    with SafetensorsFile(target) as made:
        stored = sum(info.nbytes for info in made.tensors.values())
    target.unlink()
    return {"size foreseen MB": size / 1e6, "size MB": stored / 1e6, "seconds foreseen": seconds, "seconds": taken}


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        ("--rounds", {"type": int, "default": 3}),
        ("--folder", {"type": Path, "help": "where to put the files (default: the temporary folder)"}),
    )
    device, folder = usable_device(None), Path(tempfile.mkdtemp(dir=args.folder))
    try:
        make_header(folder / "header.safetensors")
        commands = _planned(folder / "header.safetensors", args.rounds)
        source = folder / "model.safetensors"
        make_weights(source, flux(_SMALL if args.quick else 1), device)
        rows = [
            {"recipe": name, **_foreseen(source, folder / "out.safetensors", recipe, device)}
            for name, recipe in RECIPES.items()
        ]
        finish(args, rows, commands=commands, source_gb=source.stat().st_size / 1e9)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
