"""Benchmark of sampling steps in ComfyUI, end to end: a model of random weights in bf16 and in each format.

A ComfyUI server samples with stock nodes: UNETLoader → [LoraLoaderModelOnly] → [TorchCompileModel] → KSampler (euler,
cfg 1). The steps are timed by CUDA events (``sampling/nodes``). Reported is the median of the steps after the warm-up, and
its ratio to that of bf16 in the same server and setting. ``--settings`` measures several settings of ComfyUI; those that
differ only in nodes share a server. The model is unloaded before each run, and a quantized file is removed after its runs.

``--free-vram GB`` makes ComfyUI run as on a card of that size; ``--profile`` adds a run under torch.profiler;
``--first-step`` runs each variant a second time, when tuned kernels are cached.
``--model``, ``--hidden`` and ``--blocks`` select the model; ``--quick`` takes a tiny one, for a CPU.
"""

import contextlib
import dataclasses
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path

import torch

from learned_rounding.benchmarks.harness import arguments, finish, save
from learned_rounding.benchmarks.sampling.model import MODELS, lora_specs, write_model
from learned_rounding.benchmarks.sampling.profile import format_profile
from learned_rounding.benchmarks.sampling.session import NODES, PROFILED_STEPS, Run, Session, Workload
from learned_rounding.benchmarks.sampling.variants import (
    FORMATS,
    KERNELS,
    SETTINGS,
    SOURCE,
    Setting,
    Variant,
    make_file,
    parse_variants,
)
from learned_rounding.hosts import ComfyServer, HostError, find_host
from learned_rounding.hosts.server import PACK, PACK_NAME

LORA_FILE, LORA_RANK = "benchmark_lora.safetensors", 16
TEXT_TOKENS, QUICK_TEXT_TOKENS = 512, 16
QUICK_HIDDEN = 256  # two heads
GIB = 1 << 30

_START = time.monotonic()


def log(text: str) -> None:
    """Print a line with the time since the start."""
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", flush=True)


@contextlib.contextmanager
def limited_vram(free: float | None) -> Iterator[None]:
    """Leave ``free`` GiB of the card to processes that are started inside; None: all.

    ComfyUI and its dynamic VRAM decide by the free memory that the driver reports, not by the size of the card. Memory of
    another process is missing there as on a smaller card: the server's context and caches come out of the rest, and an
    allocation beyond it fails. A tensor in the server would also count in the statistics of its allocator, and
    ``--reserve-vram`` only changes ComfyUI's estimates.
    """
    ballast = None
    if free is not None:
        ballast = torch.empty(max(torch.cuda.mem_get_info()[0] - int(free * GIB), 0), dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del ballast
        empty_cache()


def empty_cache() -> None:
    """Return the VRAM that this process does not use to the card."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def used_vram() -> int:
    """VRAM in use on the card, by all processes, in bytes; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


class Benchmark:
    """One call of the script.

    Attributes:
        rows: a row per setting and variant, for the table.
        runs: all measurements of each.
    """

    def __init__(self, args):
        self.args = args
        self.host = find_host(args.host_version)
        self.cpu = args.cpu or not torch.cuda.is_available()
        architecture, quick = MODELS[args.model], args.quick
        hidden = args.hidden or (QUICK_HIDDEN if quick else architecture.hidden)
        blocks = args.blocks or ((2,) * len(architecture.blocks) if quick else architecture.blocks)
        self.specs = dict(architecture.specs(hidden, blocks))
        self.about = {"comfyui": self.host.version, "model": args.model, "hidden": hidden, "blocks": blocks}
        self.workload = Workload(
            warmup=args.warmup if args.warmup is not None else (1 if quick else 5),
            steps=args.steps or (2 if quick else 20),
            latent_node=architecture.latent_node,
            latent={**architecture.latent, **(architecture.small if quick else {})},
            tokens=QUICK_TEXT_TOKENS if quick else TEXT_TOKENS,
            channels=architecture.text,
            pooled=architecture.pooled,
            timeout=args.timeout,
        )
        self.folder = Path(tempfile.mkdtemp(prefix="comfyui-benchmark-", dir=args.folder))
        self.rows: list[dict] = []
        self.runs: list[dict] = []
        self._source_runs: dict[str, Run] = {}  # setting → run of the source

    # ------------------------------------------------------------------------------------------------ files

    def model_path(self, name: str) -> Path:
        """Model file in a format."""
        return self.folder / "models" / "diffusion_models" / f"benchmark_{name}.safetensors"

    def make_source(self, *, lora: bool) -> None:
        """Write the bf16 model, and a LoRA for it."""
        device = torch.device("cpu" if self.cpu else "cuda")
        path = self.model_path(SOURCE)
        write_model(path, self.specs, device)
        log(f"{self.args.model}: {path.stat().st_size / 1e9:.2f} GB of bf16 written")
        if lora:
            path = self.folder / "models" / "loras" / LORA_FILE
            write_model(path, dict(lora_specs(self.specs, LORA_RANK)), device)
        empty_cache()

    @contextlib.contextmanager
    def quantized(self, name: str) -> Iterator[None]:
        """Make the file of a format, and remove it at the end; the source exists already."""
        if name == SOURCE:
            yield
            return
        start, path = time.monotonic(), self.model_path(name)
        try:
            make_file(self.model_path(SOURCE), path, name)
            empty_cache()
            log(f"{name}: quantized in {time.monotonic() - start:.1f} s, {path.stat().st_size / 1e9:.2f} GB")
            yield
        finally:
            path.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------- runs

    def measure(self, settings: dict[str, Setting], variants: list[Variant]) -> None:
        """Measure every variant in every setting."""

        def order(item: tuple[str, Setting]) -> str:
            return repr(item[1].server_key)

        for _, group in itertools.groupby(sorted(settings.items(), key=order), key=order):
            shared = dict(group)
            try:
                self._measure_on_server(shared, variants)
            except Exception as error:  # the server does not start; others may
                done = {(row["section"], row["variant"]) for row in self.rows}
                for key, variant in itertools.product(shared, variants):
                    if (key, str(variant)) not in done:
                        self._add(key, variant, *_describe_failure(error))

    def _measure_on_server(self, settings: dict[str, Setting], variants: list[Variant]) -> None:
        """Measure the variants in settings that one server serves."""
        setting = next(iter(settings.values()))
        with limited_vram(setting.free_vram):
            before = used_vram()
            links = {PACK_NAME: PACK, "benchmark": NODES}
            with ComfyServer(
                self.host, base=self.folder, links=links, arguments=setting.arguments(self.host), cpu=self.cpu
            ) as server:
                log(f"ComfyUI {self.host.version} started in {server.start_seconds:.1f} s for {', '.join(settings)}")
                session = Session(server, self.workload)
                if self.args.host_time:
                    self._measure_host_time(session, next(iter(settings)))
                for name in dict.fromkeys(variant.format for variant in variants):
                    pairs = [(key, variant) for variant in variants if variant.format == name for key in settings]
                    refusal = None if self.cpu else FORMATS[name].refusal()
                    for key, variant in pairs if refusal else ():
                        self._add(key, variant, {"skipped": refusal})
                    if not refusal:
                        self._measure_format(session, settings, name, pairs, before)

    def _measure_host_time(self, session: Session, key: str) -> None:
        """Add rows of the host time of one linear layer, by kernels."""
        for kernels, mode in KERNELS.items():
            session.server.post("/learned_rounding/native_int8", mode)
            times = session.measure_host_time()
            row = {f"{name} µs": time for name, time in times.items()}
            row |= {f"{name} ratio": time / times[SOURCE] for name, time in times.items() if name != SOURCE}
            self._add(f"{key}, host time", Variant("F.linear", kernels), row)

    def _measure_format(self, session, settings, name: str, pairs: list[tuple[str, Variant]], before: int) -> None:
        """Make the file of a format and measure its (setting, variant) pairs."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.quantized(name))
            except Exception as error:
                for key, variant in pairs:
                    self._add(key, variant, *_describe_failure(error))
                return
            for key, variant in pairs:
                row: dict = {}
                details: dict = dataclasses.asdict(settings[key])
                try:
                    self._measure_variant(session, key, settings[key], variant, before, row, details)
                except Exception as error:  # what is measured is kept, and the others are measured in a new process
                    for part, more in zip((row, details), _describe_failure(error), strict=True):
                        part |= more
                    details["log"] = session.server.log_tail()
                    with contextlib.suppress(HostError):
                        session.server.restart()
                self._add(key, variant, row, details)
            if not self.args.keep_models:
                with contextlib.suppress(HostError):
                    session.unload()

    def _measure_variant(
        self, session: Session, key: str, setting: Setting, variant: Variant, before: int, row: dict, details: dict
    ) -> None:
        """Add the columns of a variant to ``row`` and all its measurements to ``details``."""
        self._select_kernels(session, variant)
        file = self.model_path(variant.format).name
        options = {"lora": LORA_FILE if setting.lora else None, "compile": setting.compile}
        if not self.args.keep_models:
            session.unload()
        run = session.sample(file, **options)
        if variant.format == SOURCE:
            self._source_runs[key] = run
        row |= self._make_row(run, self._source_runs.get(key), before)
        details |= run.to_json()
        if self.args.profile:
            profile = details["profile"] = session.profile(file, **options)
            row |= _profile_columns(profile, row["step s"])
            print(format_profile(f"{key} {variant}", profile), flush=True)
        if self.args.first_step:
            session.unload()
            if self.args.first_step == "restart":
                session.server.restart()
                self._select_kernels(session, variant)
            again = session.sample(file, **options)
            row |= {"again: first step s": again.step_seconds[0], "again: sampler s": again.sampler_seconds}
            details["again"] = again.to_json()

    def _select_kernels(self, session: Session, variant: Variant) -> None:
        """Change the setting of the kernels, which the server keeps until it ends; auto for a variant without a choice."""
        session.server.post("/learned_rounding/native_int8", KERNELS[variant.kernels or "auto"])

    def _make_row(self, run: Run, source: Run | None, before: int) -> dict:
        measured = slice(self.workload.warmup, None)
        seconds = statistics.median(run.step_seconds[measured])
        row = {"step s": seconds}
        if source is not None:
            row["ratio"] = seconds / statistics.median(source.step_seconds[measured])
        row["host s"] = statistics.median(run.host_seconds[measured])
        row |= {"first step s": run.step_seconds[0], "sampler s": run.sampler_seconds}
        if run.vram is not None and run.card_vram is not None:
            row |= {"VRAM GB": run.vram / 1e9, "card GB": (run.card_vram - before) / 1e9}
        row |= {"RAM GB": run.ram / 1e9, "private GB": run.private_ram / 1e9}
        if source is not None:
            row["latent error"] = float((run.latent - source.latent).norm() / source.latent.norm())
        return row

    def _add(self, key: str, variant: Variant, row: dict, details: dict | None = None) -> None:
        """Add a row, print it and write all results so far."""
        names = {"section": key, "variant": str(variant)}
        self.rows.append(names | row)
        self.runs.append(names | (details or row))
        log(f"{key} {variant}: " + ", ".join(f"{name} {_format(value)}" for name, value in row.items()))
        save(self.args, self.rows, **self.about, runs=self.runs)


def _describe_failure(error: Exception) -> tuple[dict, dict]:
    """Columns of the table and details of a failure."""
    text = str(error) or type(error).__name__
    return {"error": text.partition("\n")[0]}, {"error": text, "traceback": getattr(error, "traceback", "")}


def _format(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _profile_columns(profile: dict, step_seconds: float) -> dict:
    """Columns of the table: GPU and host time of a step, and the idle fraction of the GPU with and without the profiler."""
    row = {"host busy ms": profile["host_ms"]}
    if "gpu_busy_ms" in profile:
        row |= {"GPU busy ms": profile["gpu_busy_ms"], "GPU idle, profiled": profile["gpu_idle"]}
        row["GPU idle"] = 1 - profile["gpu_busy_ms"] / 1e3 / step_seconds
    return row


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def choose_settings(args) -> dict[str, Setting]:
    """The named settings, with the options of the command line that change all of them."""
    dynamic = None if args.dynamic_vram is None else args.dynamic_vram == "on"
    given = {"dynamic_vram": dynamic, "free_vram": args.free_vram, "reserve_vram": args.reserve_vram}
    given |= {"compile": args.compile or None, "lora": args.lora or None}
    changes = {name: value for name, value in given.items() if value is not None}
    return {name: dataclasses.replace(SETTINGS[name], **changes) for name in args.settings}


def _setting_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SETTINGS]:
        raise ArgumentTypeError(f"unknown setting {unknown[0]}; use {', '.join(SETTINGS)}")
    return names


OPTIONS = (
    (
        "--variants",
        {
            "type": parse_variants,
            "default": ",".join(FORMATS),
            "metavar": "FORMAT[:KERNELS],…",
            "help": f"formats {', '.join(FORMATS)}, those of INT8 with kernels {', '.join(KERNELS)} (default: all)",
        },
    ),
    (
        "--settings",
        {
            "type": _setting_names,
            "default": "eager",
            "metavar": "NAME,…",
            "help": f"settings of ComfyUI: {', '.join(SETTINGS)} (default: eager)",
        },
    ),
    ("--compile", {"action": "store_true", "help": "use TorchCompileModel in all settings"}),
    ("--lora", {"action": "store_true", "help": f"use a LoRA of rank {LORA_RANK} in all settings"}),
    ("--dynamic-vram", {"choices": ("on", "off"), "help": "ComfyUI's dynamic VRAM in all settings"}),
    ("--free-vram", {"type": float, "metavar": "GB", "help": "VRAM left to ComfyUI, in 2³⁰ bytes, in all settings"}),
    ("--reserve-vram", {"type": float, "metavar": "GB", "help": "ComfyUI's --reserve-vram in all settings"}),
    ("--model", {"choices": list(MODELS), "default": "flux"}),
    ("--blocks", {"type": _integers, "metavar": "N,…", "help": "number of blocks by kind: DOUBLE,SINGLE for flux"}),
    ("--hidden", {"type": int, "metavar": "CHANNELS", "help": "channels of the model, a multiple of 128"}),
    ("--steps", {"type": int, "help": "measured steps (default: 20, quick: 2)"}),
    ("--warmup", {"type": int, "help": "steps before them (default: 5, quick: 1)"}),
    (
        "--keep-models",
        {
            "action": "store_true",
            "help": "do not unload the model before the next one; then VRAM is that of all models",
        },
    ),
    ("--host-time", {"action": "store_true", "help": "measure the host time of one linear layer too"}),
    ("--profile", {"action": "store_true", "help": f"profile {PROFILED_STEPS} steps in another run"}),
    (
        "--first-step",
        {
            "nargs": "?",
            "const": "unload",
            "choices": ("unload", "restart"),
            "help": "run each variant again after its model is unloaded, or in a new process",
        },
    ),
    ("--cpu", {"action": "store_true", "help": "run ComfyUI on the CPU"}),
    ("--host-version", {"metavar": "VERSION", "help": "version of ComfyUI (default: the newest installed)"}),
    ("--folder", {"type": Path, "help": "folder for the files (default: the temporary folder)"}),
    ("--timeout", {"type": float, "default": 900, "metavar": "S", "help": "time limit of a run (default: 900)"}),
)


def main() -> int:
    """Measure and report; returns 1 if a variant failed."""
    args = arguments((__doc__ or "").partition("\n")[0], *OPTIONS)
    settings = choose_settings(args)
    benchmark = Benchmark(args)
    try:
        benchmark.make_source(lora=any(setting.lora for setting in settings.values()))
        benchmark.measure(settings, args.variants)
    finally:
        shutil.rmtree(benchmark.folder, ignore_errors=True)
        rows = sorted(benchmark.rows, key=lambda row: list(settings).index(row["section"].partition(",")[0]))
        finish(args, rows, **benchmark.about, runs=benchmark.runs)
    return int(any("error" in row for row in benchmark.rows))


if __name__ == "__main__":
    sys.exit(main())
