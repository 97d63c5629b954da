"""Cost of calibration and run time of GPTQ, on a transformer with the shapes of Flux.1 and random weights.

``capture`` runs blocks of linear layers, attention and activation functions on random tokens, with and without a
:class:`Collector` whose Hessians are on the device, in low rank, or in files. A run is ``--calls`` calls, as in sampling,
and includes all updates of the Hessians. Runs with and without alternate; reported is the median time of a run divided by
its calls. ``rounding`` quantizes a layer of each shape, with a packed Hessian of its true size and 512 validation activations, which
choose the dampening; reading the Hessians from disk is not included. Its seconds are the sum over all layers of the model of
the median time of their shape. ``measured`` is the time to choose the formats of all layers.

``file`` quantizes a model file with a calibration file, both written by this script, as ``lrq`` does, on ``--fraction`` of
the layers of each shape. Its seconds are divided by the fraction. The first run is for warm-up, the second is timed as a
whole, and the third is synchronized around each phase, so that phases add up to more than the whole.
"""

import itertools
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.benchmarks.phases import measure_phases
from learned_rounding.benchmarks.transformer import Transformer
from learned_rounding.quant_core import Recipe, quantize_file, quantize_weight
from learned_rounding.quant_core.calibration import (
    CalibrationFile,
    Collector,
    InMemoryCalibration,
    LayerStatistics,
    LowRankHessian,
    PackedHessian,
)
from learned_rounding.quant_core.calibration.accumulate import PackedHessianAccumulator
from learned_rounding.quant_core.calibration.file import write_calibration
from learned_rounding.quant_core.calibration.hessian import pack_triangle
from learned_rounding.quant_core.calibration.panels import packed_size
from learned_rounding.quant_core.output import SafetensorsWriter, header_bytes
from learned_rounding.quant_core.run.allocate import allocate_formats
from learned_rounding.quant_core.sources import TensorInfo, TensorSource
from learned_rounding.quant_core.workers import InProcess

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DOUBLE, SINGLE = 19, 38  # blocks of Flux.1
VALIDATION_TOKENS = 512
_ROUNDS = 3
CASES = (
    ("float8_e4m3fn", "tensor", None),
    ("int8_tensorwise", "row", None),
    ("int8_tensorwise", "row", True),
    ("asym_w4a8_int8", "group", None),
    ("nvfp4", "group", None),
)


def _measure_seconds(call) -> float:
    start = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def capture(args) -> list[dict]:
    width, tokens, blocks = (128, 128, (1, 2)) if args.quick else (3072, 4096, (args.blocks, 2 * args.blocks))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Transformer(width, *blocks).to(torch.bfloat16).requires_grad_(False)
    text, image = (torch.randn(1, count, width, device=DEVICE, dtype=torch.bfloat16) for count in (tokens // 8, tokens))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    rows = []
    for place, device_bytes in (("device", 1 << 40), ("files", 0)):
        for rank in (None, 32) if place == "device" else (None,):
            options = {"device": DEVICE, "device_bytes": device_bytes, "rank": rank}
            with tempfile.TemporaryDirectory() as folder, Collector(layers, folder, **options) as collector:

                def run():
                    for _ in range(args.calls):
                        model(text, image)

                def collect(collector=collector, run=run):
                    with collector.watching(model):
                        run()

                for call in (run, collect):
                    _measure_seconds(call)  # warm-up; the second call also creates the files
                times = [[_measure_seconds(call) / args.calls for call in (run, collect)] for _ in range(_ROUNDS)]
                plain, captured = map(statistics.median, zip(*times, strict=True))
                rows.append(
                    {
                        "section": "capture",
                        "Hessians": "low rank" if rank else f"on the {place}" if place == "device" else "in files",
                        "blocks": f"{blocks[0]} + {blocks[1]}",
                        "plain s": plain,
                        "captured s": captured,
                        "ratio": captured / plain,
                        "disk GB": collector.disk_bytes / 1e9,
                    }
                )
    return rows


def layer_shapes(width: int, double: int, single: int):
    """Yield (name, (out, in)) for each linear layer."""
    for block in range(double):
        for stream in range(2):
            yield from (
                (f"double.{block}.{stream}.{name}", shape)
                for name, shape in (
                    ("qkv", (3 * width, width)),
                    ("proj", (width, width)),
                    ("mlp.0", (4 * width, width)),
                    ("mlp.2", (width, 4 * width)),
                    ("mod", (6 * width, width)),
                )
            )
    for block in range(single):
        yield f"single.{block}.linear1", (7 * width, width)
        yield f"single.{block}.linear2", (width, 5 * width)
        yield f"single.{block}.mod", (3 * width, width)


def make_statistics(channels: int) -> LayerStatistics:
    """Make a packed Hessian and validation activations, on the device, from activations with a decaying spectrum."""
    generator = torch.Generator(DEVICE).manual_seed(channels)
    packed = torch.zeros(packed_size(channels), dtype=torch.float16, device=DEVICE)
    hessian = PackedHessianAccumulator(channels, packed, DEVICE)
    scale = torch.rand(channels, generator=generator, device=DEVICE) + 0.1
    mixing = torch.randn(channels // 8, channels, generator=generator, device=DEVICE) / channels**0.5

    def activations(count: int) -> torch.Tensor:
        x = torch.randn(count, channels // 8, generator=generator, device=DEVICE) @ mixing
        return (x + 0.3 * torch.randn(count, channels, generator=generator, device=DEVICE)) * scale

    for _ in range(4):
        hessian.add(activations(channels))
    validation = LowRankHessian(activations(VALIDATION_TOKENS).t() / VALIDATION_TOKENS**0.5, torch.zeros(channels))
    return LayerStatistics(hessian.result(), validation, sensitivity=1.0)


def _make_layers(args) -> tuple[list, dict, dict]:
    """(name, shape) of every layer, the statistics by number of channels, and the weight of each shape."""
    width, double, single = (128, 1, 2) if args.quick else (3072, DOUBLE, SINGLE)
    shapes = list(layer_shapes(width, double, single))
    layer_statistics = {channels: make_statistics(channels) for channels in {shape[1] for _, shape in shapes}}
    weights = {
        shape: (0.02 * torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)).bfloat16()
        for shape in {shape for _, shape in shapes}
    }
    return shapes, layer_statistics, weights


def rounding(args) -> list[dict]:
    shapes, layer_statistics, weights = _make_layers(args)
    counts = Counter(shape for _, shape in shapes)
    rows = []
    for format, granularity, convrot in CASES:

        def quantize(shape, format=format, granularity=granularity, convrot=convrot):
            quantize_weight(
                weights[shape],
                format,
                granularity=granularity,
                convrot=convrot,
                hessian=layer_statistics[shape[1]].hessian,
                validation_hessian=layer_statistics[shape[1]].validation_hessian,
                rounding="calibrated",
            )

        seconds = {}
        for shape in counts:
            quantize(shape)
            seconds[shape] = statistics.median(
                _measure_seconds(lambda shape=shape: quantize(shape)) for _ in range(_ROUNDS)
            )
        width = min(inner for _, inner in counts)
        rows.append(
            {
                "section": "rounding",
                "format": format,
                "per": granularity + (", rotated" if convrot else ""),
                "layers": len(shapes),
                "weights GB": sum(out * channels for _, (out, channels) in shapes) * 2 / 1e9,
                "seconds": sum(seconds[shape] * count for shape, count in counts.items()),
                "slowest": max(seconds.values()),
                f"{width}×{4 * width}": seconds[width, 4 * width],
            }
        )
    return rows


def choose_formats(args) -> list[dict]:
    shapes, layer_statistics, weights = _make_layers(args)
    source = TensorSource({f"{name}.weight": weights[shape] for name, shape in shapes})
    calibration = InMemoryCalibration({name: layer_statistics[shape[1]] for name, shape in shapes})
    recipe = Recipe(format="measured")
    nothing = {"emit": lambda event: None, "check": lambda: None}
    pool = InProcess(DEVICE, **nothing)
    seconds = _measure_seconds(
        lambda: allocate_formats(source, recipe, calibration, pool=pool, device=DEVICE, **nothing)
    )
    return [{"section": "measured", "layers": len(shapes), "seconds": seconds}]


def quantize_files(args) -> list[dict]:
    width, double, single = (128, 1, 2) if args.quick else (3072, DOUBLE, SINGLE)
    shapes = list(layer_shapes(width, double, single))
    period = max(1, round(1 / args.fraction))
    selected = {
        f"blocks.{name}": shape for index, (name, shape) in enumerate(shapes) if _in_sample(index, double, period)
    }
    share = sum(out * inner for out, inner in selected.values()) / sum(out * inner for _, (out, inner) in shapes)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, calibration = Path(folder) / "model.safetensors", Path(folder) / "c.calib.safetensors"
        write_model(source, selected)
        for bits in args.bits:
            write_statistics(calibration, selected, bits)
            options = {"format": "int8_tensorwise", "granularity": "row", "convrot": True, "preset": "none"}

            def quantize(options=options):
                target = Path(folder) / "quantized.safetensors"
                target.unlink(missing_ok=True)
                with CalibrationFile(calibration) as opened:
                    quantize_file(source, target, Recipe(**options), calibration=opened, device=DEVICE)

            quantize()
            row = {
                "section": "file",
                "Hessians": f"{bits} bits",
                "layers": len(selected),
                "statistics GB": calibration.stat().st_size / 1e9 / share,
                "seconds": _measure_seconds(quantize) / share,
            }
            with measure_phases(DEVICE) as phases:
                synchronized = _measure_seconds(quantize)
            row["synchronized"] = synchronized / share
            rows.append(row)
            for phase, seconds in phases.items():
                rows.append({"section": f"phases, {bits} bits", "phase": phase, "seconds": seconds / share})
    return rows


def _in_sample(index: int, double: int, period: int) -> bool:
    """Whether a layer is in a block, or a stream of a double block, that is measured."""
    group = index // 5 if index < 10 * double else 2 * double + (index - 10 * double) // 3
    return group % period == 0


def write_model(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """Write random bfloat16 weights."""
    infos = [(f"{name}.weight", TensorInfo(torch.bfloat16, shape)) for name, shape in shapes.items()]
    generator = torch.Generator(DEVICE).manual_seed(0)
    with SafetensorsWriter(path, header_bytes(infos, {})) as writer:
        for name, info in infos:
            writer.add(name, (0.02 * torch.randn(info.shape, generator=generator, device=DEVICE)).bfloat16())
        writer.finish({})


def write_statistics(path: Path, shapes: dict[str, tuple[int, int]], bits: int) -> None:
    """Write statistics of each layer; layers of a width have equal ones, stored for each."""
    by_width = {}
    for channels in {inner for _, inner in shapes.values()}:
        found = make_statistics(channels)
        assert isinstance(found.hessian, PackedHessian)
        hessian = pack_triangle(found.hessian, DEVICE) if bits == 8 else found.hessian
        by_width[channels] = LayerStatistics(hessian, found.validation_hessian)
    owners = {name: name for name in shapes}
    write_calibration(path, {name: by_width[shape[1]] for name, shape in shapes.items()}, owners, shapes, {}, {})


SECTIONS = {"capture": capture, "rounding": rounding, "measured": choose_formats, "file": quantize_files}


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        (
            "--blocks",
            {
                "type": int,
                "default": 2,
                "help": "double blocks of the capture section; twice as many single blocks are added",
            },
        ),
        (
            "--calls",
            {
                "type": int,
                "default": 24,
                "help": "calls in a run of the capture section (default: 24; Hessians in files are updated in every eighth)",
            },
        ),
        ("--only", {"nargs": "+", "choices": list(SECTIONS), "default": list(SECTIONS), "help": "sections to run"}),
        ("--fraction", {"type": float, "default": 0.25, "help": "of the layers, in section file (default: 0.25)"}),
        (
            "--bits",
            {"nargs": "+", "type": int, "choices": (8, 16), "default": (8,), "help": "of Hessians in section file"},
        ),
        ("--folder", {"type": Path, "help": "where section file writes its files (default: the temporary folder)"}),
    )
    with torch.no_grad():
        finish(args, list(itertools.chain.from_iterable(SECTIONS[name](args) for name in args.only)))


if __name__ == "__main__":
    main()
