"""A node pack for tests in the server: inspect a MODEL, make runs wait after a number of layers, report the memory in use."""

import json
import sys
import threading

import torch
from aiohttp import web
from server import PromptServer

CODES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def _quantized_layers(model):
    """{module: dtype of its quantized values}, for ComfyUI's quantized tensors and for decoding layers."""
    found = {}
    for name, module in model.model.named_modules():
        weight = getattr(module, "weight", None)
        codes = getattr(weight, "_qdata", weight)
        if isinstance(weight, torch.Tensor) and codes.dtype in CODES:
            found[name.removeprefix("diffusion_model.")] = str(codes.dtype).removeprefix("torch.")
    return found


class ProbeModel:
    """Shows the quantized layers, the sampling shift, the number of patches and the dtype of a MODEL."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "probe"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def probe(self, model):
        sampling = model.get_model_object("model_sampling")
        found = {
            "layers": _quantized_layers(model),
            "shift": float(sampling.shift),
            "patches": len(model.patches),
            "dtype": str(next(model.model.diffusion_model.parameters()).dtype).removeprefix("torch."),
        }
        return {"ui": {"text": [json.dumps(found)]}}


class Gate:
    """Lets a number of layers be quantized, then blocks; None lets all layers pass."""

    def __init__(self):
        self.made = 0
        self._left, self._changed, self._wrapped = None, threading.Condition(), False

    def set(self, layers: int | None) -> None:
        with self._changed:
            self._left = layers
            self.made = 0
            self._changed.notify_all()
        if not self._wrapped:
            layer_task = next(
                module
                for name, module in sys.modules.items()
                if name.endswith("learned_rounding.quant_core.run.layer_task")
            )
            layer_task.quantize_layer, self._wrapped = self._behind(layer_task.quantize_layer), True

    def _behind(self, quantize_layer):
        def waiting(*args, check, **options):
            with self._changed:
                while self._left == 0:
                    self._changed.wait(0.1)
                    check()
                if self._left:
                    self._left -= 1
                self.made += 1
            return quantize_layer(*args, check=check, **options)

        return waiting


gate = Gate()


@PromptServer.instance.routes.post("/probe/gate")
async def set_gate(request):
    made = gate.made
    gate.set((await request.json())["layers"])
    return web.json_response({"made": made})


@PromptServer.instance.routes.get("/probe/memory")
async def get_memory(request):
    """Bytes of the GPU in tensors, and bytes of pinned memory, unused blocks included; nothing without a GPU."""
    if not torch.cuda.is_available():
        return web.json_response({})
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    return web.json_response({"tensors": torch.cuda.memory_allocated(), "pinned": pinned})


NODE_CLASS_MAPPINGS = {"ProbeModel": ProbeModel}
