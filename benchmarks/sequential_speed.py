"""Time of calibration and sequential rounding of a model with the shapes of Flux.1 and random weights, through real ComfyUI.

The script runs again in the Python of a host (``--host`` names its folder), makes the model in memory, samples with it as
Calibrate does, and quantizes it as Learned Round Quantize does. ``--profile`` adds the seconds of each phase, with the device
synchronized around it, so that phases add up to more than the whole.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 3072, "num_heads": 24,
    "context_in_dim": 4096, "vec_in_dim": 768, "mlp_ratio": 4.0, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
    "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
# Phase → (module, class or None, function).
PHASES = {
    "calibrated layer by layer": ("quant_core.run.loop", None, "quantize_layer"),
    "inputs, original model": ("quant_core.sequential.block", "BlockRounding", "_sample_original"),
    "inputs, quantized model": ("quant_core.sequential.block", "BlockRounding", "_sample_quantized"),
    "Hessians": ("quant_core.sequential.block", "BlockRounding", "_measure"),
    "compensated weights": ("quant_core.sequential.block", None, "compensate_weight"),
    "rounding": ("quant_core.sequential.block", None, "quantize_layer"),
    "comparison": ("quant_core.sequential.walk", "ModelWalk", "_compare"),
    "calls to the next block": ("quant_core.sequential.walk", "ModelWalk", "_advance"),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--host", type=Path, help="folder of ComfyUI (default: COMFYUI_PATH, else the host of the tests)"
    )
    parser.add_argument("--blocks", default="19,38", help="double and single blocks (default: those of Flux.1)")
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--size", type=int, default=1024, help="pixels of the images")
    parser.add_argument("--calls", type=int, default=64, help="recorded calls")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--format", default="asym_w4a8_int8")
    parser.add_argument("--rounding", nargs="+", default=["calibrated", "sequential"])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def launch(args: argparse.Namespace) -> None:
    """Run this script in the Python of a host."""
    sys.path.insert(0, str(ROOT.parent))
    from learned_rounding.hosts import install_hosts

    host = next(host for host in reversed(install_hosts()) if args.host is None or host.path == args.host)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("custom_nodes", "models", "output", "temp"):
            (Path(folder) / name).mkdir()
        command = [host.python, __file__, *sys.argv[1:], "--inside", folder, "--host", host.path]
        raise SystemExit(subprocess.run(list(map(str, command)), cwd=folder, check=False).returncode)


@contextlib.contextmanager
def measured_phases(torch):
    """Yield phase → seconds, filled in this context."""
    seconds: dict[str, float] = defaultdict(float)
    with contextlib.ExitStack() as restorations:
        for phase, (module, owner, name) in PHASES.items():
            holder = sys.modules[f"pack.{module}"]
            holder = getattr(holder, owner) if owner else holder
            function = getattr(holder, name)

            def timed(*args, phase=phase, function=function, **kwargs):
                torch.cuda.synchronize()
                began = time.perf_counter()
                try:
                    return function(*args, **kwargs)
                finally:
                    torch.cuda.synchronize()
                    seconds[phase] += time.perf_counter() - began

            setattr(holder, name, timed)
            restorations.callback(setattr, holder, name, function)
        yield seconds


def run(args: argparse.Namespace) -> None:
    """Measure inside the host's process."""
    cpu = os.environ.get("LEARNED_ROUNDING_HOST_DEVICE", "cpu") == "cpu"
    sys.argv = ["main.py", *(["--cpu"] if cpu else []), "--base-directory", str(args.inside)]
    sys.path[0] = str(args.host)
    import comfy.options

    comfy.options.enable_args_parsing()
    import importlib.util

    import utils.install_util  # noqa: F401 (ComfyUI's, before a dependency finds another one)

    # isort: split
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    from pack.nodes import host
    from pack.quant_core import Recipe

    device = comfy.model_management.get_torch_device()
    cuda = device.type == "cuda"
    double, single = map(int, args.blocks.split(","))
    heads = args.hidden // 128
    config = CONFIG | {"hidden_size": args.hidden, "num_heads": heads, "depth": double, "depth_single_blocks": single}
    described = comfy.supported_models.Flux(config)
    dtype = torch.bfloat16 if cuda else torch.float32
    described.set_inference_dtype(dtype, None)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    with torch.inference_mode():
        model = described.get_model({}, "", device=device)
        for name, parameter in model.diffusion_model.named_parameters():
            parameter.requires_grad_(False)
            if parameter.ndim > 1:
                gain = 0.1 if ".mod" in name or "modulation" in name or "_mod" in name else 1.0
                parameter.copy_(normal(*parameter.shape) * gain * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(torch.ones_like(parameter) if "scale" in name else 0.01 * normal(*parameter.shape))
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
        pairs = [
            (
                [[normal(1, 512, 4096).cpu(), {"pooled_output": normal(1, 768).cpu(), "guidance": 3.5}]],
                [[normal(1, 512, 4096).cpu(), {"pooled_output": normal(1, 768).cpu(), "guidance": 3.5}]],
            )
            for _ in range(args.prompts)
        ]
        sampling = {"steps": args.steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
        latents = [{"samples": torch.zeros(1, 16, args.size // 8, args.size // 8)}]

        def timed(function):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            result = function()
            if cuda:
                torch.cuda.synchronize()
            return result, time.perf_counter() - began

        def calibrate(calls: int):
            options = {"seed": 0, "samples": 1, "keep": "full", "tokens": 256, "on_event": lambda event: None}
            return host.calibrate_model(patcher, pairs, latents, replay_calls=calls, **options, **sampling)[0]

        rows = []
        weights = sum(parameter.nbytes for parameter in model.diffusion_model.parameters())
        base = {"blocks": args.blocks, "weights GB": weights / 1e9, "calls": args.calls}
        calibration, seconds = timed(lambda: calibrate(args.calls))
        rows.append({"step": "Calibrate", "seconds": seconds, "peak GB": _peak(torch, cuda)})
        for rounding in args.rounding:
            with measured_phases(torch) if args.profile else contextlib.nullcontext({}) as phases:
                recipe = Recipe(args.format, rounding=rounding)
                made, seconds = timed(
                    lambda recipe=recipe: host.quantize(patcher, recipe, lambda event: None, calibration)
                )
            row = {"step": f"Quantize, {rounding}", "seconds": seconds, "peak GB": _peak(torch, cuda)}
            if made.report.sequential:
                row |= {"model output": str(made.report.sequential)}
            rows += [row, *({"step": f"  {phase}", "seconds": spent} for phase, spent in phases.items())]
            for row in rows:
                print(row, flush=True)
        report = {"device": torch.cuda.get_device_name() if cuda else "cpu", **base, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _peak(torch, cuda: bool) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if cuda else None


if __name__ == "__main__":
    arguments = parse()
    run(arguments) if arguments.inside else launch(arguments)
