"""Several formats of one model at once, and one model on several GPUs, in the shapes of Flux.1 at reduced depth.

``nearest`` makes five formats by rounding to nearest in one run, and each by itself. A source that counts shows how often the
file is read; what the process reads in all (``/proc/self/io``, Linux) has the check of the finished outputs too. The time is
compared with that of reading the source once, tensor by tensor to the device as a run does, and that of writing the bytes of all
outputs to the same disk and flushing them. ``calibrated`` is the same by GPTQ with statistics of realistic size. ``devices``
quantizes with one GPU and with several. The first run of each kind is for warm-up, that of ``devices`` on one block of each kind;
the median of ``--rounds`` further ones is reported, all of them are in the JSON. Files that are read are in the page cache.
"""

import contextlib
import functools
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from learned_rounding.benchmarks.calibration_speed import layer_shapes, write_model, write_statistics
from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.calibration import CalibrationFile
from learned_rounding.quant_core.run.quantize import Target, quantize_files
from learned_rounding.quant_core.sources import Source, open_source
from learned_rounding.quant_core.sources.source import CPU
from learned_rounding.quant_core.workers import usable_device

FORMATS: dict[str, dict[str, Any]] = {
    "fp8": {"format": "float8_e4m3fn"},
    "int8": {"format": "int8_tensorwise", "convrot": True},
    "w4a8": {"format": "asym_w4a8_int8"},
    "nvfp4": {"format": "nvfp4"},
    "mxfp8": {"format": "mxfp8"},
}
ON_DEVICES = ("w4a8", "int8")  # of section devices
NOT_MEASURED = "not measured"  # with fewer GPUs than asked for
GOAL_NEAREST, GOAL_CALIBRATED = 1.1, 0.6
_WIDTH, _QUICK_WIDTH = 3072, 128

Row = dict[str, Any]


class CountingSource:
    """A source that counts the bytes of each tensor that is read.

    Attributes:
        reads: name of a tensor → number of times that it was read.
        bytes_read: of all reads.
    """

    def __init__(self, source: Source):
        self._source = source
        self.reads: Counter[str] = Counter()
        self.bytes_read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        tensor = self._source.read(name, device)
        self.reads[name] += 1
        self.bytes_read += tensor.nbytes
        return tensor


class Bench:
    """Files of the measurements, in a temporary folder.

    Attributes:
        device: of the arithmetic.
        runs: label → all times in s after the warm-up.
        source, calibration: path of the model and of its statistics.
    """

    def __init__(self, args, folder: Path, blocks: tuple[int, int]):
        folder.mkdir(exist_ok=True)
        self.device = usable_device(None)
        self.runs: dict[str, list[float]] = {}
        self.source, self.calibration = folder / "model.safetensors", folder / "model.calib.safetensors"
        self._rounds, self._out = args.rounds, folder / "out"
        width = _QUICK_WIDTH if args.quick else _WIDTH
        self._shapes = {f"blocks.{name}": shape for name, shape in layer_shapes(width, *blocks)}
        write_model(self.source, self._shapes)

    def write_calibration(self) -> None:
        """Write the statistics of all layers, unless that was done."""
        if not self.calibration.exists():
            write_statistics(self.calibration, self._shapes, 8)

    def time(self, label: str, work: Callable[[], object], first: Callable[[], object] | None = None) -> float:
        """Median time in s of ``work``, each time with an empty folder of outputs; ``first``: what is done for warm-up."""
        times = []
        for call in (first or work, *[work] * self._rounds):
            shutil.rmtree(self._out, ignore_errors=True)
            self._out.mkdir()
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
            print(f"{label}: {times[-1]:.2f} s", file=sys.stderr)
        self.runs[label] = times[1:]
        return statistics.median(times[1:])

    def _wait(self) -> None:
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)

    def make(self, names, rounding: str, calibration: CalibrationFile | None = None) -> CountingSource:
        """Make outputs of these formats in one run; returns the source that was read."""
        targets = [Target(self._out / f"{name}.safetensors", recipe(name, rounding), calibration) for name in names]
        with open_source(self.source) as opened:
            counting = CountingSource(opened)
            for result in quantize_files(counting, targets, device=self.device):
                if isinstance(result, Exception):
                    raise result
        return counting

    def read_source(self) -> None:
        """Read each tensor of the source once, to the device."""
        with open_source(self.source) as opened:
            for name in opened.tensors:
                opened.read(name, self.device)

    def outputs(self) -> list[bytes]:
        """Content of all outputs of the last run."""
        return [path.read_bytes() for path in sorted(self._out.iterdir())]

    def write(self, contents: list[bytes]) -> None:
        """Write files, and flush them to the disk."""
        for index, content in enumerate(contents):
            with open(self._out / str(index), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def statistics(self) -> Iterator[CalibrationFile]:
        """The open calibration file."""
        self.write_calibration()
        with CalibrationFile(self.calibration) as opened:
            yield opened

    def quantize(self, source: Path, name: str, calibration: CalibrationFile, devices: str) -> None:
        """Make one output on these devices."""
        target = self._out / f"{name}.safetensors"
        quantize_file(source, target, recipe(name, "calibrated"), calibration=calibration, device=devices)


def recipe(name: str, rounding: str) -> Recipe:
    """The recipe of a name of ``FORMATS``; the layers have no names of a model family."""
    return Recipe(**FORMATS[name], rounding=rounding, preset="none")


def count_process_reads() -> int | None:
    """Bytes that this process has read by system calls; None where that is not known."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return int(dict(line.split(": ") for line in lines)["rchar"])
    except (OSError, KeyError, ValueError):
        return None


def measure_nearest(bench: Bench, args) -> list[Row]:
    size, section = bench.source.stat().st_size, "nearest"
    counted: list[CountingSource] = []
    before = count_process_reads()
    together = bench.time(f"{section}: together", lambda: counted.append(bench.make(FORMATS, "nearest")))
    after = count_process_reads()
    writing, written = _measure_writing(bench, section)
    reading = bench.time(f"{section}: read the source", bench.read_source)
    single = sum(bench.time(f"{section}: {name}", lambda name=name: bench.make([name], "nearest")) for name in FORMATS)
    most = max(reading, writing)
    process = None if before is None or after is None else (after - before) / len(counted)
    return [
        {"section": section, "step": "read the source", "seconds": reading, "GB": size / 1e9},
        {"section": section, "step": "write the outputs", "seconds": writing, "GB": written / 1e9},
        {
            "section": section,
            "step": f"{len(FORMATS)} formats together",
            "seconds": together,
            "x the larger": together / most,
            "goal": GOAL_NEAREST,
            "source read": counted[-1].bytes_read / size,
            "most reads of a tensor": max(counted[-1].reads.values()),
            "process read GB": NOT_MEASURED if process is None else process / 1e9,
        },
        {"section": section, "step": f"{len(FORMATS)} runs", "seconds": single, "x the larger": single / most},
    ]


def _measure_writing(bench: Bench, section: str) -> tuple[float, int]:
    """Time in s to write what the last run has written, and its bytes."""
    contents = bench.outputs()
    return bench.time(f"{section}: write the outputs", lambda: bench.write(contents)), sum(map(len, contents))


def measure_calibrated(bench: Bench, args) -> list[Row]:
    section = "calibrated"
    with bench.statistics() as calibration:
        together = bench.time(f"{section}: together", lambda: bench.make(FORMATS, "calibrated", calibration))
        rows = []
        for name in FORMATS:
            seconds = bench.time(f"{section}: {name}", lambda name=name: bench.make([name], "calibrated", calibration))
            rows.append({"section": section, "step": name, "seconds": seconds})
    single = sum(row["seconds"] for row in rows)
    return [
        *rows,
        {"section": section, "step": f"{len(FORMATS)} runs", "seconds": single},
        {
            "section": section,
            "step": f"{len(FORMATS)} formats together",
            "seconds": together,
            "x the runs": together / single,
            "goal": GOAL_CALIBRATED,
        },
    ]


def measure_devices(bench: Bench, args) -> list[Row]:
    rows, few = [], Bench(args, bench.source.with_name("few"), (1, 1))
    with bench.statistics() as calibration, few.statistics() as few_statistics:
        for name in args.formats:
            one = None
            for count in args.devices:
                row: Row = {"section": "devices", "format": name, "GPUs": count}
                if count > torch.cuda.device_count():
                    rows.append(row | {"seconds": NOT_MEASURED})
                    continue
                devices = ",".join(f"cuda:{index}" for index in range(count))
                work, first = (
                    functools.partial(bench.quantize, source, name, known, devices)
                    for source, known in ((bench.source, calibration), (few.source, few_statistics))
                )
                seconds = bench.time(f"devices: {name} on {count}", work, first)
                one = one or seconds
                rows.append(row | {"seconds": seconds, "x the first": seconds / one})
    return rows


SECTIONS = {"nearest": measure_nearest, "calibrated": measure_calibrated, "devices": measure_devices}


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        ("--only", {"nargs": "+", "choices": list(SECTIONS), "default": list(SECTIONS), "help": "sections to run"}),
        (
            "--blocks",
            {
                "nargs": 2,
                "type": int,
                "default": (4, 8),
                "help": "double and single blocks of Flux.1's 19 and 38 (default: 4 8)",
            },
        ),
        ("--devices", {"nargs": "+", "type": int, "default": (1, 2), "help": "numbers of GPUs (default: 1 2)"}),
        (
            "--formats",
            {
                "nargs": "+",
                "choices": list(FORMATS),
                "default": ON_DEVICES,
                "help": f"of section devices (default: {' '.join(ON_DEVICES)})",
            },
        ),
        ("--rounds", {"type": int, "default": 3, "help": "runs of each kind after the first (default: 3)"}),
        ("--folder", {"type": Path, "help": "folder for the files (default: the temporary folder)"}),
    )
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        bench = Bench(args, folder, (1, 1) if args.quick else args.blocks)
        rows = list(itertools.chain.from_iterable(SECTIONS[name](bench, args) for name in args.only))
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        finish(args, rows, source_gb=bench.source.stat().st_size / 1e9, gpus=gpus, runs=bench.runs)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
