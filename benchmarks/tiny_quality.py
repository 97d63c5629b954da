"""The tiny model in ComfyUI on the CPU: file size, and PSNR of sampled images against full precision.

Every prompt is sampled with each seed in 20 steps; the prompts are the evaluation split of the conditioning file. There is
one row per writable format, granularity and rounding; "worst" is the image with the lowest PSNR.
"""

import tempfile
from pathlib import Path

import numpy as np

from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.benchmarks.tiny_model.graph import MODEL, TinyGraph, pictures, psnr
from learned_rounding.benchmarks.tiny_model.place import ASSETS, place, prompt_splits
from learned_rounding.hosts import ComfyServer, find_host
from learned_rounding.quant_core import FORMATS

CASES = [
    (name, granularity, rounding)
    for name, entry in FORMATS.items()
    for granularity in entry.granularities
    for rounding in ("nearest", "auto")
]


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0], ("--host", {"help": "version of ComfyUI (default: the newest installed)"})
    )
    seeds, count = (2, 2) if args.quick else (16, 4)
    host = find_host(args.host)
    prompts = prompt_splits()["evaluation"][:count]
    original = (ASSETS / MODEL).stat().st_size
    rows = []
    with tempfile.TemporaryDirectory() as base:
        place(base, prompts=prompts)
        with ComfyServer(host, base=base) as server:

            def sample(build_model, prefix: str) -> tuple[np.ndarray, str | None]:
                """Sample the model that ``build_model`` adds to a graph; returns its images and the saved file."""
                graph = TinyGraph()
                model, saved = build_model(graph)
                for seed in range(seeds):
                    graph.sample(model, f"{prefix}-{seed:02}", seed=seed)
                outputs = server.queue(graph, timeout=1800).outputs
                path = outputs[saved.id]["text"][0] if saved else None
                return np.concatenate(
                    [pictures(server.output_dir, f"{prefix}-{seed:02}") for seed in range(seeds)]
                ), path

            full, _ = sample(lambda graph: (graph.load()[0], None), "full")
            for number, (name, granularity, rounding) in enumerate(CASES):

                def build_quantized(graph, name=name, granularity=granularity, rounding=rounding, number=number):
                    node = graph.quantize(graph.load()[0], name, granularity, rounding=rounding)
                    return node[0], graph.save(node, f"case{number}")

                images, path = sample(build_quantized, f"case{number}")
                values = [psnr(a, b) for a, b in zip(full, images, strict=True)]
                size = Path(path).stat().st_size
                rows.append(
                    {
                        "format": name,
                        "per": granularity,
                        "rounding": rounding,
                        "MB": size / 1e6,
                        "of original": size / original,
                        "PSNR mean dB": float(np.mean(values)),
                        "PSNR worst dB": float(np.min(values)),
                    }
                )
    finish(args, rows, comfyui=host.version, original_mb=original / 1e6, seeds=seeds, prompts=prompts)


if __name__ == "__main__":
    main()
