"""Sampling runs on a ComfyUI server whose steps are timed."""

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from learned_rounding.benchmarks.sampling.profile import summarize_trace
from learned_rounding.hosts import ComfyServer, HostError
from learned_rounding.hosts.workflows import Graph

__all__ = ["NODES", "Run", "Session", "Workload"]

NODES = Path(__file__).parent / "nodes"  # node pack that the server needs
SEED = 0
PROFILED_STEPS = 3
UNLOAD_SECONDS = 60


@dataclass(frozen=True)
class Workload:
    """What each run samples.

    Attributes:
        warmup, steps: number of steps before those that are measured, and of these.
        latent_node, latent: class of the node that makes the empty latent image, and its inputs.
        tokens, channels, pooled: shape of the text embedding, and channels of the pooled one or 0.
        timeout: time limit of a run in s.
    """

    warmup: int
    steps: int
    latent_node: str
    latent: Mapping[str, int]
    tokens: int
    channels: int
    pooled: int
    timeout: float

    def build_graph(self, file: str, name: str, *, lora: str | None, compile: bool, profile: bool) -> tuple[Graph, str]:
        """The workflow of a run called ``name``, and the id of its report node.

        Args:
            file: model file in the folder ``diffusion_models``.
            lora: file in the folder ``loras``.
            compile: with TorchCompileModel.
            profile: profile :data:`PROFILED_STEPS` steps after the warm-up, instead of measuring.
        """
        graph = Graph()
        model = graph.add("UNETLoader", unet_name=file, weight_dtype="default")
        if lora is not None:
            model = graph.add("LoraLoaderModelOnly", model=model[0], lora_name=lora, strength_model=1.0)
        if compile:
            model = graph.add("TorchCompileModel", model=model[0], backend="inductor")
        timed = graph.add("BenchmarkSteps", model=model[0], run=name, profile_from=self.warmup if profile else -1)
        text = graph.add(
            "BenchmarkConditioning", seed=SEED, tokens=self.tokens, channels=self.channels, pooled=self.pooled
        )
        sampled = graph.add(
            "KSampler",
            model=timed[0],
            positive=text[0],
            negative=text[0],
            latent_image=graph.add(self.latent_node, **self.latent)[0],
            seed=SEED,
            steps=self.warmup + (PROFILED_STEPS if profile else self.steps),
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )
        return graph, graph.add("BenchmarkReport", latent=sampled[0], run=name).id


@dataclass(frozen=True)
class Run:
    """Measurements of one run, see the node BenchmarkReport.

    Attributes:
        sampler_seconds: from the start of the workflow to the end of KSampler: reading the model and all steps.
        step_seconds: time of each step.
        host_seconds: time of the host in the call of the model, per step.
        ram, private_ram: RAM of the server in bytes; ``ram`` includes the pages of files that it has mapped.
        vram: largest size in bytes of the allocations of torch; None on a CPU.
        card_vram: VRAM in use on the card at the end, by all processes, in bytes; None on a CPU.
        latent: latent image.
    """

    sampler_seconds: float
    step_seconds: list[float]
    host_seconds: list[float]
    ram: int
    private_ram: int
    latent: torch.Tensor
    vram: int | None = None
    card_vram: int | None = None

    def to_json(self) -> dict:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "latent"}


class Session:
    """Runs of a workload on a server with the nodes of :data:`NODES`."""

    def __init__(self, server: ComfyServer, workload: Workload):
        self.server, self.workload = server, workload
        self._runs = 0

    def sample(self, file: str, *, lora: str | None = None, compile: bool = False) -> Run:
        """Sample once.

        Raises:
            HostError: the run failed, or the latent image is not finite.
        """
        name, result, report = self._queue(file, lora=lora, compile=compile, profile=False)
        nodes = [event for event in result.of("executing") if event.data.get("node") is not None]
        seconds = nodes[-1].at - result.of("execution_start")[0].at  # the report node follows KSampler
        path = self.server.output_dir / f"{name}.latent"
        latent = load_file(path)["latent"]
        path.unlink()
        if not latent.isfinite().all():
            raise HostError("the latent image has values that are not finite", kind="execution")
        return Run(sampler_seconds=seconds, latent=latent, **report)

    def profile(self, file: str, *, lora: str | None = None, compile: bool = False) -> dict:
        """Sample with a profile after the warm-up; returns that of :func:`~.profile.summarize_trace`."""
        name, _, _ = self._queue(file, lora=lora, compile=compile, profile=True)
        path = self.server.output_dir / f"{name}.trace"
        summary = summarize_trace(path)
        path.unlink()
        return summary

    def measure_host_time(self) -> dict[str, float]:
        """Host time of one linear layer in µs, by the format of its weight."""
        graph, name = Graph(), f"run-{self._runs}"
        self._runs += 1
        report = graph.add("BenchmarkHostTime", run=name).id
        return json.loads(self.server.queue(graph, timeout=self.workload.timeout).outputs[report]["text"][0])

    def _queue(self, file: str, **options):
        name = f"run-{self._runs}"  # a new one each time: ComfyUI's cache answers no run
        self._runs += 1
        graph, report = self.workload.build_graph(file, name, **options)
        result = self.server.queue(graph, timeout=self.workload.timeout)
        return name, result, json.loads(result.outputs[report]["text"][0])

    def unload(self) -> None:
        """Unload all models, and wait until the server uses no model file.

        Raises:
            HostError: a model remains in memory.
        """
        deadline = time.monotonic() + UNLOAD_SECONDS
        self.server.free()
        while self.server.post("/benchmark/collect"):
            if time.monotonic() > deadline:
                raise HostError(f"a model is still in memory {UNLOAD_SECONDS} s after /free", kind="timeout")
            time.sleep(0.5)
            self.server.free()  # ComfyUI misses a request that comes between its check for requests and its wait
