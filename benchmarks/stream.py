"""Benchmark of file-to-file quantization: time compared with ``cp`` of the same file, and peak memory.

The file has the layers of a Flux-like transformer in bfloat16. Each pass runs in a separate process, so that its peak
memory is measured alone. ``cp`` and the passes alternate on the same disk, and outputs are removed after each.
``cp+sync`` includes fsync, as every pass does before it renames its output. All read a file that is in the page cache.

``--node`` measures the node Learned Round Quantize on a MODEL against ``lrq`` on its file instead, with the tensors of Flux.1
dev and RTN: the time of ``lrq`` includes the start of Python, that of the node includes building its MODEL. The server is
started with dynamic VRAM, where the host has it, and without. The GPU is used with LEARNED_ROUNDING_HOST_DEVICE=cuda.
"""

import itertools
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
from learned_rounding.benchmarks.sampling.model import MODELS, write_model
from learned_rounding.hosts import ComfyServer, find_host
from learned_rounding.hosts.server import PACK
from learned_rounding.hosts.workflows import Graph
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.output import SafetensorsWriter, header_bytes
from learned_rounding.quant_core.sources import TensorInfo
from learned_rounding.quant_core.workers import usable_device

PASSES = {
    "fp8 nearest": Recipe(format="float8_e4m3fn", rounding="nearest"),
    "int8 row nearest": Recipe(format="int8_tensorwise", convrot=False, rounding="nearest"),
    "int8 row ConvRot nearest": Recipe(format="int8_tensorwise", convrot=True, rounding="nearest"),
    "fp8 auto": Recipe(format="float8_e4m3fn"),
    "int8 row auto": Recipe(format="int8_tensorwise", convrot=False),
}
QUICK = ("fp8 nearest", "int8 row nearest", "int8 row ConvRot nearest")
# Format and ConvRot of the comparison of node and command line.
NODE_FORMATS = {"fp8": ("float8_e4m3fn", False), "int8 row ConvRot": ("int8_tensorwise", True)}
_WITHOUT_DYNAMIC = "--disable-dynamic-vram"
_FLUX, _FLUX_GB = MODELS["flux"], 24
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


def _time_command(source: Path, target: Path, format: str, convrot: bool, seed: int) -> float:
    """Time of ``lrq`` in s, as a process."""
    options = ["--format", format, *(["--convrot"] if convrot else []), "--rounding", "nearest", "--seed", str(seed)]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, PACK, "quantize", "-i", source, "-o", target, *options], check=True, capture_output=True
    )
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def _time_node(server: ComfyServer, source: Path, format: str, convrot: bool, seed: int) -> float:
    """Time of Learned Round Quantize on a MODEL in s; MODEL and report are connected."""
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=source.name, weight_dtype="default")
    options = {"rounding": "nearest", "convrot": "on" if convrot else "off", "preset": "auto", "seed": seed}
    recipe = graph.add("LearnedRoundingConfigure", format=format, granularity="auto", **options)
    node = graph.add("LearnedRoundingQuantize", source=model[0], recipe=recipe[0])
    for slot in (0, 3):
        graph.add("PreviewAny", source=node[slot])
    events = server.queue(graph, timeout=3600).of("executing")
    begin = next(index for index, event in enumerate(events) if event.data["node"] == node.id)
    return events[begin + 1].at - events[begin].at


def measure_node(folder: Path, size: float, rounds: int) -> tuple[list[dict], dict]:
    """Rows with the medians of node and ``lrq`` on a Flux.1-shaped model of about ``size`` GB, and all times in s."""
    host, source = find_host(), folder / "models" / "diffusion_models" / "flux.safetensors"
    source.parent.mkdir(parents=True)
    blocks = tuple(max(1, round(count * size / _FLUX_GB)) for count in _FLUX.blocks)
    write_model(source, dict(_FLUX.specs(_FLUX.hidden, blocks)), torch.device(usable_device(None)))
    has_dynamic = _WITHOUT_DYNAMIC in (host.path / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    times: dict[str, list[float]] = {}
    for extra in ((), (_WITHOUT_DYNAMIC,)) if has_dynamic else ((),):
        with ComfyServer(host, base=folder, arguments=extra) as server:
            for seed, (name, settings) in itertools.product(range(rounds), NODE_FORMATS.items()):
                label = " ".join(["node", name, *extra])
                times.setdefault(label, []).append(_time_node(server, source, *settings, seed))
                command = _time_command(source, folder / "out.safetensors", *settings, seed)
                times.setdefault(f"lrq {name}", []).append(command)
    medians = {label: statistics.median(seconds) for label, seconds in times.items()}
    rows = [
        {"section": "node", "pass": label, "seconds": seconds, "x lrq": seconds / medians[f"lrq {name}"]}
        for label, seconds in medians.items()
        for name in NODE_FORMATS
        if label.partition(" ")[2].removesuffix(f" {_WITHOUT_DYNAMIC}") == name
    ]
    return rows, {"host": host.version, "source_gb": source.stat().st_size / 1e9, "times": times}


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        ("--gb", {"type": float, "help": "size of the source (default: 12, quick: 1)"}),
        ("--rounds", {"type": int, "default": 3}),
        ("--folder", {"type": Path, "help": "folder for the files (default: the temporary folder)"}),
        ("--node", {"action": "store_true", "help": "measure the node on a MODEL against lrq instead"}),
        ("--pass", {"nargs": 3, "dest": "child", "help": "internal: run one pass in a child process"}),
    )
    if args.child:
        return run_pass(*args.child)
    width = 1536 if args.quick else 3072
    size = (args.gb or (1 if args.quick else 12)) * 1e9
    blocks = max(1, round(size / (2 * sum(a * b for a, b in _BLOCK.values()) * width**2)))
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        if args.node:
            rows, more = measure_node(folder, size / 1e9, args.rounds)
            return finish(args, rows, **more)
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
