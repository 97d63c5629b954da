"""Benchmark of file-to-file quantization: time compared with ``cp`` of the same file, and peak memory.

The file has the layers of a Flux-like transformer in bfloat16. Each pass runs in a separate process, so that its peak
memory is measured alone. ``cp`` and the passes alternate on the same disk, and outputs are removed after each.
``cp+sync`` includes fsync, as every pass does before it renames its output.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.benchmarks.memory import peak_memory
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.output import SafetensorsWriter, header_bytes
from learned_rounding.quant_core.sources import TensorInfo

PASSES = {
    "fp8 nearest": Recipe(format="float8_e4m3fn", rounding="nearest"),
    "int8 row nearest": Recipe(format="int8_tensorwise", rounding="nearest"),
    "fp8 auto": Recipe(format="float8_e4m3fn"),
    "int8 row auto": Recipe(format="int8_tensorwise"),
}
QUICK = ("fp8 nearest", "int8 row nearest")
_BLOCK = {"qkv": (3, 1), "proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4), "mod.lin": (6, 1)}


def make_file(path: Path, width: int, blocks: int, device: str) -> None:
    """Write a model of Gaussian weights with a standard deviation per row, as real layers have."""
    infos = {}
    for block in range(blocks):
        for name, (rows, columns) in _BLOCK.items():
            infos[f"blocks.{block}.{name}.weight"] = TensorInfo(torch.bfloat16, (rows * width, columns * width))
            infos[f"blocks.{block}.{name}.bias"] = TensorInfo(torch.bfloat16, (rows * width,))
    generator = torch.Generator(device).manual_seed(0)
    with SafetensorsWriter(path, header_bytes(infos.items(), {})) as writer:
        for name, info in infos.items():
            tensor = torch.randn(info.shape, generator=generator, device=device)
            if len(info.shape) == 2:
                tensor *= 0.02 * torch.rand(info.shape[0], 1, generator=generator, device=device).add_(0.5)
            writer.add(name, tensor.to(info.dtype).cpu())
        writer.finish({})


def run_pass(source: str, target: str, name: str) -> None:
    """Run one pass, in a child process, and print its measurements as JSON."""
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # initialize CUDA before the measurement
    before = peak_memory()
    start = time.perf_counter()
    report = quantize_file(source, target, PASSES[name])
    seconds = time.perf_counter() - start
    peak = peak_memory()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak_rss_mb": peak / 1e6,
                "rss_before_mb": before / 1e6,
                "bytes_out": report.bytes_out,
            }
        )
    )


def _copy(source: Path, target: Path, sync: bool) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    if sync:
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        ("--gb", {"type": float, "help": "size of the source (default: 12, quick: 1)"}),
        ("--rounds", {"type": int, "default": 3}),
        ("--folder", {"type": Path, "help": "folder for the files (default: the temporary folder)"}),
        ("--pass", {"nargs": 3, "dest": "child", "help": "internal: run one pass in a child process"}),
    )
    if args.child:
        return run_pass(*args.child)
    width = 1536 if args.quick else 3072
    size = (args.gb or (1 if args.quick else 12)) * 1e9
    blocks = max(1, round(size / (2 * sum(a * b for a, b in _BLOCK.values()) * width**2)))
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        source, target = folder / "model.safetensors", folder / "out.safetensors"
        make_file(source, width, blocks, "cuda" if torch.cuda.is_available() else "cpu")
        runs: dict[str, list[dict]] = {}
        for _ in range(args.rounds):
            for sync in (False, True):
                runs.setdefault("cp+sync" if sync else "cp", []).append({"seconds": _copy(source, target, sync)})
                target.unlink()
            for name in QUICK if args.quick else PASSES:
                command = [sys.executable, __file__, "--pass", source, target, name]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs.setdefault(name, []).append(json.loads(output))
                target.unlink()
        copied = statistics.median(run["seconds"] for run in runs["cp"])
        synced = statistics.median(run["seconds"] for run in runs["cp+sync"])
        rows = []
        for name, results in runs.items():
            seconds = statistics.median(run["seconds"] for run in results)
            row = {
                "pass": name,
                "seconds": seconds,
                "GB/s in": source.stat().st_size / 1e9 / seconds,
                "x cp": seconds / copied,
                "x cp+sync": seconds / synced,
            }
            if "peak_rss_mb" in results[0]:
                row["peak RSS MB"] = max(run["peak_rss_mb"] for run in results)
            rows.append(row)
        finish(
            args, rows, source_gb=source.stat().st_size / 1e9, largest_tensor_mb=6 * width * width * 2 / 1e6, runs=runs
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
