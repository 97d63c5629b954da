"""Let this pack's kernels run native INT8 and W4A8 layers on a CPU. Imported by tests in ComfyUI's process."""

import contextlib
from types import SimpleNamespace
from unittest.mock import patch

from learned_rounding.kernels import tuning
from learned_rounding.nodes.host import native_int8, native_layers

__all__ = ["Recorded", "on_cpu", "set_mode"]

ACCEPTS = native_layers._accepts


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
        patch.object(native_int8, "_can_run", lambda: True),
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
            native_int8._set_setting("off")


def set_mode(mode: str) -> None:
    """Set the mode off, on or auto, and forget what was measured."""
    native_int8._set_setting(mode)
    native_layers._kept.clear()
