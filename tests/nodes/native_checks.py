"""Checks of in_process.py: ComfyUI's native INT8 layers on this pack's kernels, with the CPU in the place of a GPU."""

import asyncio
import contextlib
import functools
import io
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import comfy.ops
import comfy.quant_ops
import folder_paths
import torch
from layout_checks import DEVICE, TinyModel, distance
from pack.kernels import tuning
from pack.nodes import host
from pack.quant_core.errors import QuantizationError
from torch.nn.functional import linear

native = sys.modules["pack.nodes.host.native_int8"]
native_layers = sys.modules["pack.nodes.host.native_layers"]
running = sys.modules["pack.nodes.host.running"]
ACCEPTS = native_layers._accepts
LAYOUT = "TensorWiseINT8Layout"
RECIPES = {
    "row": {"format": "int8_tensorwise"},
    "tensor": {"format": "int8_tensorwise", "granularity": "tensor"},
    "convrot": {"format": "int8_tensorwise", "convrot": True},
    "w4a8": {"format": "asym_w4a8_int8"},
}
# Case → layout, its options of a layer with 256 input channels, the options of a recipe, and the modes that can be compiled:
# comfy-kitchen has no operator of torch for W4A8, and tracers fail in its code.
LAYOUTS = {
    "int8": (LAYOUT, {"per_channel": True}, RECIPES["convrot"], ("on", "auto", "off")),
    "w4a8": ("AsymW4A8Int8Layout", {"convrot_groupsize": 256}, RECIPES["w4a8"], ("on", "auto")),
}
LAYOUTS = {name: case for name, case in LAYOUTS.items() if case[2]["format"] in comfy.quant_ops.QUANT_ALGOS}
ROTATED = {"per_channel": True, "convrot": True}


class Recorded:
    """Calls of the implementations, searches of comfy-kitchen's registry, and measurements; ``winner`` is their result."""

    def __init__(self):
        self.ours, self.stock, self.searches, self.measured = 0, 0, 0, []
        self.winner = "ours"
        self.transposed = set()  # how weights reach a handler: not transposed by linear, transposed by mm and addmm

    def counted(self, name: str, function):
        def call(*args, **kwargs):
            setattr(self, name, getattr(self, name) + 1)
            return function(*args, **kwargs)

        return call

    def accepts(self, x, weight, layout: str, transposed: bool) -> bool:
        self.transposed.add(weight._params.transposed)
        return ACCEPTS(x, weight, layout, transposed)

    def fastest(self, key, names, run) -> str:
        if "stock" not in names:  # the choice between our own backends
            return names[0]
        for name in names:  # both must run
            run(name)
        self.measured.append(key)
        return self.winner

    def during(self, call, *args) -> dict[str, int]:
        """Calls and measurements during ``call(*args)``."""
        before = self.ours, self.stock, self.searches, len(self.measured)
        call(*args)
        after = self.ours, self.stock, self.searches, len(self.measured)
        counts = (new - old for new, old in zip(after, before, strict=True))
        return dict(zip(("ours", "stock", "searches", "measured"), counts, strict=True))


@contextlib.contextmanager
def on_cpu():
    """Let our kernels run on the CPU. Stock is comfy-kitchen's eager backend, as below CUDA 13."""
    from comfy_kitchen.constraints import FunctionConstraints
    from comfy_kitchen.registry import registry

    for name in ("cuda", "triton"):
        registry.disable(name)
    recorded = Recorded()
    eager = registry._backends["eager"]
    native_layers.kitchen_registry()
    ours = {
        layer.operation: layer.compute
        for layer in native_layers.NATIVE_LAYERS.values()
        if hasattr(eager, layer.operation)
    }
    registry.register("learned_rounding", SimpleNamespace(**ours), dict.fromkeys(ours, FunctionConstraints()))
    registry.disable("learned_rounding")
    with (
        patch.object(native_layers, "_DEVICES", ("cpu", "cuda")),
        patch.object(native, "_can_run", lambda: True),
        patch.object(native_layers, "_accepts", recorded.accepts),
        contextlib.ExitStack() as counted,
        patch.object(registry, "get_capable_backend", recorded.counted("searches", registry.get_capable_backend)),
        patch.object(tuning, "fastest", recorded.fastest),
        patch.object(tuning, "_describe_machine", lambda device: str(device)),
    ):
        for name in ("_run_int8", "_run_w4a8"):
            counted.enter_context(
                patch.object(native_layers, name, recorded.counted("ours", getattr(native_layers, name)))
            )
        for name in ours:
            counted.enter_context(patch.object(eager, name, recorded.counted("stock", getattr(eager, name))))
        native_layers._kept.clear()
        try:
            yield recorded
        finally:
            native._set_setting("off")


def _set_mode(mode: str) -> None:
    native._set_setting(mode)
    native_layers._kept.clear()


def stored() -> dict:
    """The setting that is stored, with the CPU in the place of a GPU and without."""
    from comfy_kitchen.registry import registry

    settings = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    values = [
        *(json.dumps({native.SETTING: value}) for value in ("on", "off", "auto", True, False, "fast", 3)),
        "damaged",
        "{}",
        "[]",
    ]
    with patch.object(running, "PromptServer", SimpleNamespace()):
        settings.write_text(values[0])
        with patch.object(native, "_can_run", lambda: False):
            host.add_native_int8_setting()
            without = native_layers._mode, registry.is_available("learned_rounding")
        modes = []
        with on_cpu():
            for value in values:
                settings.write_text(value)
                host.add_native_int8_setting()
                modes.append((native_layers._mode, registry.is_available("learned_rounding")))
    return {"without a GPU": without, "modes": modes}


def constraints() -> dict:
    """What the registry may give to our backend, and the order of backends."""
    from comfy_kitchen.registry import registry

    native_layers.kitchen_registry()
    needs = registry.get_constraints("learned_rounding", "int8_linear")
    return {
        "needs": [sorted(needs.default_devices), list(needs.min_compute_capability), sorted(needs.params)],
        "order": [name for name in registry._priority if name in ("learned_rounding", "eager")],
    }


def modes() -> dict:
    """Calls and results of a linear layer in each mode, under inference mode (linear) and without (mm and addmm)."""
    x, weight, bias = (
        torch.randn(3, 5, 256, device=DEVICE),
        torch.randn(32, 256, device=DEVICE),
        torch.randn(32, device=DEVICE),
    )
    found = {}
    with on_cpu() as recorded:
        for options, given, inference in itertools.product(
            ({}, {"per_channel": True}, ROTATED), (None, bias), (True, False)
        ):
            coded = comfy.quant_ops.QuantizedTensor.from_float(weight, LAYOUT, **options)
            results = {}
            recorded.transposed.clear()
            with torch.inference_mode(inference):
                inputs = x.clone()  # made in the same mode

                def run(coded=coded, given=given, inputs=inputs, results=results):
                    results[native_layers._mode] = linear(inputs, coded, None if given is None else given.clone())

                calls = {}
                for mode in ("off", "on", "auto"):
                    _set_mode(mode)
                    calls[mode] = [recorded.during(run), recorded.during(run)]
                recorded.winner = "stock"
                _set_mode("auto")
                calls["auto, stock is faster"] = [recorded.during(run), recorded.during(run)]
                recorded.winner = "ours"
                same = torch.equal(results["auto"], results["off"])
            name = f"{'+'.join(options) or 'tensor'}, bias {given is not None}, inference {inference}"
            found[name] = {
                "calls": calls,
                "distance": distance(results["on"], results["off"]),
                "stock's result": same,
                "transposed": list(recorded.transposed),
            }
    return found


def activations() -> dict:
    """Fused activations, which reach our backend through comfy-kitchen's registry."""
    x, weight = torch.randn(3, 128, device=DEVICE), torch.randn(32, 128, device=DEVICE)
    coded = comfy.quant_ops.QuantizedTensor.from_float(weight, LAYOUT)
    found = {}
    with on_cpu() as recorded:
        for name, act in getattr(comfy.ops, "INPUT_ACT_EAGER", {}).items():
            inputs = torch.cat([x, x], 1) if name == "swiglu" else x
            results = {}

            def run(name=name, inputs=inputs, results=results):
                results[native_layers._mode] = comfy.quant_ops.ck.int8_linear(
                    inputs, coded._qdata, coded._params.scale, None, torch.float32, input_act=name
                )

            calls = {}
            for mode in ("off", "on", "auto"):
                _set_mode(mode)
                calls[mode] = [recorded.during(run), recorded.during(run)]
            found[name] = {"calls": calls, "distance": distance(results["on"], linear(act(inputs), coded))}
    return found


def _run_earlier(x, weight) -> None:
    """Run a layer whose stock implementation has no fused activations, as in earlier releases of comfy-kitchen."""
    from comfy_kitchen.registry import registry

    eager = registry._backends["eager"]
    stock = eager.int8_linear

    def int8_linear(x, weight, weight_scale, bias, out_dtype, convrot, convrot_groupsize):
        return stock(x, weight, weight_scale, bias, out_dtype, convrot, convrot_groupsize)

    with patch.object(eager, "int8_linear", int8_linear):
        linear(x, weight)


def shapes() -> dict:
    """Measurements in the mode auto: one per implementation key, none for layers that our kernels do not support."""
    weight = torch.randn(32, 1024, device=DEVICE)
    quantize = comfy.quant_ops.QuantizedTensor.from_float
    plain, other = quantize(weight, LAYOUT, per_channel=True), quantize(weight[:16].clone(), LAYOUT, per_channel=True)
    wide = quantize(weight, LAYOUT, **ROTATED, convrot_groupsize=1024)
    x = torch.randn(4, 1024, device=DEVICE)
    found = {}
    with on_cpu() as recorded:
        _set_mode("auto")
        cases = {
            "first": (x, plain), "again": (x, plain), "other tokens": (x[:3].clone(), plain), "other weight": (x, other),
            "other dtype": (x.to(torch.bfloat16), plain), "not contiguous": (torch.cat([x, x], 1)[:, :1024], plain),
            "group of 1024": (x, wide),
        }  # fmt: skip
        for name, arguments in cases.items():
            found[name] = recorded.during(linear, *arguments)
        found["names"] = len(set(recorded.measured))
        found["earlier comfy-kitchen"] = recorded.during(_run_earlier, x[:2].clone(), plain)
        _set_mode("on")
        found["group of 1024, on"] = recorded.during(linear, x, wide)
        with patch.object(native_layers._kept, "limit", 2):
            for tokens in range(1, 8):
                linear(x[:1].expand(tokens, -1), plain)
                assert len(native_layers._kept) <= 2
        for mode in ("off", "on", "auto"):  # comfy-kitchen refuses float64 in every mode
            _set_mode(mode)
            try:
                linear(x.double(), plain)
            except ValueError as error:
                found[f"float64, {mode}"] = str(error)
    return found


def models() -> dict:
    """The tiny model in every mode of its node and of the setting; with a LoRA, with low VRAM; after an exception."""
    tiny = TinyModel()
    found = {}
    with on_cpu() as recorded:
        for name, options in RECIPES.items():
            if options["format"] not in comfy.quant_ops.QUANT_ALGOS:
                continue
            file = tiny.file(**options)
            plain = host.build_model(tiny.original, file)
            on, off, auto = (host.build_model(tiny.original, file, mode) for mode in ("on", "off", "auto"))
            expected = tiny.sampled(plain)
            results = {}

            def sample(name, model, results=results):
                results[name] = tiny.sampled(model)

            calls = {
                "on": recorded.during(sample, "on", on),
                "auto, setting off": recorded.during(sample, "auto", auto),
                "mode after it": native_layers._mode,
            }
            _set_mode("on")
            calls["off, setting on"] = recorded.during(sample, "off", off)
            calls["auto, setting on"] = recorded.during(sample, "auto", auto)
            _set_mode("auto")
            calls["auto, setting auto"] = recorded.during(sample, "auto measured", auto)
            calls["again"] = recorded.during(sample, "auto measured", auto)
            _set_mode("off")
            found[name] = {
                "layers": len(host.quantized_layers(on)),
                "calls": calls,
                "distance": distance(results["on"], expected),
                "off is stock": torch.equal(results["off"], expected),
                "auto is on": torch.equal(results["auto"], results["on"])
                and torch.equal(results["auto measured"], results["on"]),
            }
        with_lora = tiny.with_lora(plain)
        whole, little = tiny.run(with_lora), tiny.run(with_lora, lowvram_model_memory=1)
        for mode in ("on", "auto"):
            _set_mode(mode)
            found[f"LoRA, {mode}"] = {
                "distance": distance(tiny.run(with_lora), whole),
                "low VRAM": distance(tiny.run(with_lora, lowvram_model_memory=1), little),
                "low VRAM without": distance(tiny.run(plain, lowvram_model_memory=1), expected),
            }
        _set_mode("auto")
        found["after an exception"] = _mode_after_exception(on)
        found["setting changed during a run"] = _changed_during_run()
        found["parallel runs"] = _run_in_parallel()
    return found


def _mode_after_exception(model) -> list:
    """Modes during and after a call of the model that raises."""
    (wrapper,) = model.wrappers["apply_model"]["learned_rounding"]
    seen = []

    def execute():
        seen.append(native_layers._mode)
        raise RuntimeError

    with contextlib.suppress(RuntimeError):
        wrapper(execute)
    return [*seen, native_layers._mode]


def _changed_during_run() -> list:
    """Modes during and after a run in the mode off, during which the setting changes."""
    native._set_setting("auto")
    with native._running_in("off"):
        native._set_setting("on")
        during = native_layers._mode
    return [during, native_layers._mode]


def _run_in_parallel() -> list:
    """Modes after the start of each of two runs, and after the end of each, the first one first."""
    native._set_setting("auto")
    seen, runs = [], [native._running_in(mode) for mode in ("on", "off")]
    for step in (
        *(run.__enter__ for run in runs),
        *(functools.partial(run.__exit__, None, None, None) for run in runs),
    ):
        step()
        seen.append(native_layers._mode)
    return seen


def compiled() -> dict:
    """Compiled layers and models in the modes on and auto."""
    return {name: _run_compiled(*case) for name, case in LAYOUTS.items()}


def _run_compiled(layout: str, options: dict, recipe: dict, modes: tuple[str, ...]) -> dict:
    tiny = TinyModel()
    model = host.build_model(tiny.original, tiny.file(**recipe))
    weight = torch.randn(32, 256, device=DEVICE)
    coded = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **options)
    x = torch.randn(3, 256, device=DEVICE)
    found = {}
    with on_cpu() as recorded:
        eager, whole = linear(x, coded), tiny.run(model)
        diffusion_model = model.model.diffusion_model
        for backend, mode in itertools.product(("eager", "aot_eager"), modes):
            _set_mode(mode)
            torch.compiler.reset()
            layer = torch.compile(lambda x: linear(x, coded), backend=backend)
            model.model.diffusion_model = torch.compile(diffusion_model, backend=backend)
            layer(x), tiny.run(model)  # compiled, and measured
            results = {}

            def run(layer=layer, results=results):
                results["layer"], results["model"] = layer(x), tiny.run(model)

            found[f"{backend}, {mode}"] = {
                "calls": recorded.during(run),
                "layers": len(host.quantized_layers(model)),
                "layer": distance(results["layer"], eager),
                "model": distance(results["model"], whole),
            }
            model.model.diffusion_model = diffusion_model
    return found


def w4a8() -> dict:
    """A W4A8 layer in each mode, with the number of calls; one with a group size, and one in its transposed form."""
    x, bias = torch.randn(3, 5, 256, device=DEVICE), torch.randn(32, device=DEVICE)
    weight = torch.randn(32, 256, device=DEVICE)
    found = {}
    if "w4a8" not in LAYOUTS:
        return found
    cases = {
        "codebook": {},
        "uniform": {"codebook": False},
        "group of 32": {"group_size": 32},
        "asymmetric": {"symmetric": False, "codebook": False},
    }
    with on_cpu() as recorded:
        for (name, options), inference in itertools.product(cases.items(), (True, False)):
            coded = comfy.quant_ops.QuantizedTensor.from_float(weight, "AsymW4A8Int8Layout", **options)
            results, calls = {}, {}
            recorded.transposed.clear()
            with torch.inference_mode(inference):
                inputs = x.clone()

                def run(coded=coded, inputs=inputs, results=results):
                    results[native_layers._mode] = linear(inputs, coded, bias.clone())

                for mode in ("off", "on", "auto"):
                    _set_mode(mode)
                    calls[mode] = [recorded.during(run), recorded.during(run)]
            found[f"{name}, inference {inference}"] = {
                "calls": calls,
                "distance": distance(results["on"], results["off"]),
                "transposed": list(recorded.transposed),
            }
    return found


def route() -> dict:
    """Answers of the route of the setting, and modes after them; without a server nothing is added."""
    handlers = []

    class Routes:
        def post(self, path):
            return lambda handler: handlers.append((path, handler))

    async def change(handler, value):
        body = io.BytesIO(json.dumps(value).encode())

        async def read(size):
            return body.read(size)

        return await handler(SimpleNamespace(content_type="application/json", content=SimpleNamespace(read=read)))

    found = {}
    with on_cpu(), patch.object(running, "PromptServer", SimpleNamespace(instance=SimpleNamespace(routes=Routes()))):
        host.add_native_int8_setting()
        ((_, handler),) = handlers
        for value in ("on", "off", "auto", True, "fast", None, ["on"]):
            answer = asyncio.run(change(handler, value))
            found[json.dumps(value)] = answer.status, native_layers._mode
    return found


def widget() -> dict:
    """Modes of values of the node's widget, and its validation."""

    def mode(value):
        try:
            return host.native_int8_mode(value)
        except QuantizationError as error:
            return str(error)

    node = sys.modules["pack.nodes.quantize"].LearnedRoundQuantize
    values = ("on", "off", "auto", True, False, "fast", 1, None, ["on"])
    return {json.dumps(value): (mode(value), node.validate_inputs(value)) for value in values}


def layers() -> dict:
    """The checks that need no model: starting a process takes longer than any of them."""
    return {check.__name__: check() for check in (constraints, stored, modes, w4a8, activations, shapes, route)}


CHECKS = {f"native_{check.__name__}": check for check in (layers, models, compiled, widget)}
