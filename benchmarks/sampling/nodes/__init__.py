"""Node pack of ``benchmarks/comfyui.py``: random conditioning, and a MODEL whose sampling steps are timed.

A step begins where the sampler calls the model. Its time is that between two CUDA events on the stream of the model, which
are recorded without synchronization, so the host may run ahead of the GPU as it does for a user. On a CPU host it is the
time of the host's clock.
"""

import gc
import json
import statistics
import sys
import time
import weakref

import comfy.model_management
import comfy.quant_ops
import folder_paths
import psutil
import torch
from aiohttp import web
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file
from server import PromptServer

KEY = "learned_rounding_benchmark"
STEP = "benchmark step"  # name of a step in the trace; also in ../profile.py

_recordings: dict[str, "Recording"] = {}
_models = weakref.WeakSet()  # all models that were timed and are still in memory


def _output_path(name: str) -> str:
    return f"{folder_paths.get_output_directory()}/{name}"


def _on_gpu() -> bool:
    return comfy.model_management.get_torch_device().type == "cuda"


class Recording:
    """Times of the steps of one sampling run.

    Args:
        profile_from: number of the step at which the profiler starts, until sampling ends; None: no profile.
        trace: file of the profiler's trace.
    """

    def __init__(self, profile_from: int | None, trace: str):
        self.profile_from, self.trace = profile_from, trace
        self.host_seconds: list[float] = []
        self._marks: list = []
        self._profiler: torch.profiler.profile | None = None

    def around_step(self, executor, *args, **options):
        """Wrapper of a call of the model."""
        if len(self._marks) == self.profile_from:
            self._start_profiler()
        self._mark()
        start = time.perf_counter()
        if self._profiler is None:
            result = executor(*args, **options)
        else:
            with torch.profiler.record_function(STEP):
                result = executor(*args, **options)
        self.host_seconds.append(time.perf_counter() - start)
        return result

    def around_sampler(self, executor, *args, **options):
        """Wrapper of all steps: the end of the last one, and of the profile."""
        result = executor(*args, **options)
        self._mark()
        if _on_gpu():
            torch.cuda.synchronize()
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(self.trace)
            self._profiler = None
        return result

    def step_seconds(self) -> list[float]:
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [a.elapsed_time(b) / 1e3 if _on_gpu() else b - a for a, b in pairs]

    def _mark(self) -> None:
        if not _on_gpu():
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def _start_profiler(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if _on_gpu():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize()  # the profile has no kernels of earlier steps
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()


def read_memory() -> dict[str, int]:
    """Memory in bytes: peak of torch's allocations, VRAM in use on the card by all processes, RAM of this process."""
    memory = psutil.Process().memory_info()
    result = {"ram": memory.rss, "private_ram": memory.rss - memory.shared}
    if _on_gpu():
        free, total = torch.cuda.mem_get_info()
        result |= {"vram": torch.cuda.max_memory_allocated(), "card_vram": total - free}
    return result


class BenchmarkConditioning:
    """Random text embedding, and a pooled one unless ``pooled`` is 0 channels."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "benchmark"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {name: ("INT", {"max": 1 << 30}) for name in ("seed", "tokens", "channels", "pooled")}}

    def make(self, seed, tokens, channels, pooled):
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.randn(1, tokens, channels, generator=generator)
        options = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        return ([[embedding, options]],)


class BenchmarkSteps:
    """A MODEL whose next sampling run is recorded as ``run``."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "record"
    CATEGORY = "benchmark"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "run": ("STRING",), "profile_from": ("INT", {"min": -1})}}

    def record(self, model, run, profile_from):
        recording = Recording(None if profile_from < 0 else profile_from, _output_path(f"{run}.trace"))
        _recordings[run] = recording
        _models.add(model.model)
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, recording.around_step)
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, recording.around_sampler)
        if _on_gpu():
            torch.cuda.reset_peak_memory_stats()
        return (model,)


class BenchmarkReport:
    """Times and memory of a sampling run as JSON; writes the latent image to the output folder."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "report"
    CATEGORY = "benchmark"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "run": ("STRING",)}}

    def report(self, latent, run):
        recording = _recordings.pop(run)
        save_file({"latent": latent["samples"].float().cpu().contiguous()}, _output_path(f"{run}.latent"))
        times = {"step_seconds": recording.step_seconds(), "host_seconds": recording.host_seconds}
        return {"ui": {"text": [json.dumps({**times, **read_memory()})]}}


_WEIGHTS = {
    "bf16": None,
    "int8_row": {"per_channel": True},
    "int8_convrot": {"per_channel": True, "convrot": True},
}


class BenchmarkHostTime:
    """Host time of ``F.linear`` with a weight in bf16 and in ComfyUI's INT8 layouts, in µs: medians of 1,000 calls."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "measure"
    CATEGORY = "benchmark"
    CALLS, QUEUED = 1000, 20

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"run": ("STRING",)}}

    @torch.inference_mode()
    def measure(self, run):
        device = comfy.model_management.get_torch_device()
        tokens, channels = (512, 3072) if _on_gpu() else (4, 256)
        shapes = (1, tokens, channels), (channels, channels), (channels,)
        x, weight, bias = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
        found = {}
        for name, options in _WEIGHTS.items():
            layer = weight
            if options is not None:
                layer = comfy.quant_ops.QuantizedTensor.from_float(weight, "TensorWiseINT8Layout", **options)
            found[name] = self._time(lambda layer=layer: torch.nn.functional.linear(x, layer, bias))
        return {"ui": {"text": [json.dumps(found)]}}

    def _time(self, call):
        times = []
        for number in range(-self.QUEUED, self.CALLS):
            if number % self.QUEUED == 0 and _on_gpu():  # the queue of the GPU must not fill
                torch.cuda.synchronize()
            start = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - start)
        return statistics.median(times[self.QUEUED :]) / 1e3


@PromptServer.instance.routes.post("/benchmark/collect")
async def collect_models(request):
    """Collect garbage; returns the number of models that remain in memory.

    torch.compile keeps its code, and stops compiling a function after 8 models if that is not reset.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if _on_gpu():
        torch.cuda.empty_cache()
    return web.json_response(len(_models))


NODE_CLASS_MAPPINGS = {
    node.__name__: node for node in (BenchmarkConditioning, BenchmarkSteps, BenchmarkReport, BenchmarkHostTime)
}
