"""A model with nested arguments, the arguments of its calls, and recorders of these calls."""

import uuid

import torch

from learned_rounding.quant_core.calibration import ReplayRecorder

CPU = torch.device("cpu")


LARGE = 1 << 30


class Nested(torch.nn.Module):
    """Model that uses all of its nested arguments, and changes them in place as ComfyUI's U-Net does."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, timestep, context=None, control=None, options=None, **others):
        options["blocks"] = 2  # a key that the caller does not pass
        x.mul_(2)
        hidden = self.layer(x) + context.mean() * timestep.float()
        while control["output"]:
            hint = control["output"].pop()
            hidden = hidden if hint is None else hidden + hint
        for patch in options["patches"].get("attn1", ()):
            hidden = patch(hidden)
        assert options["same"] is options["also"][0]
        assert isinstance(options["shape"], torch.Size)
        scale = options["replace"][("block", 3)] * options["scale"]
        return hidden * scale * (1 if options["device"].type == "cpu" else 0)


def double(x):
    return x * 2


def make_call(number, context):
    """Arguments of call ``number``; the context has equal values in all calls."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(2, 4, 6, 5, generator=generator).to(memory_format=torch.channels_last)
    same = torch.randn(3, generator=generator)
    options = {
        "patches": {"attn1": [double]},
        "replace": {("block", 3): 0.5 + number},
        "ids": [uuid.UUID(int=number)],
        "same": same,
        "also": (same,),
        "scale": torch.tensor(1.5, dtype=torch.bfloat16),
        "shape": x.shape,
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "raw": b"\x00\xff",
        "empty": torch.zeros(0, 3),
        "callbacks": {"on_load": [print]},
    }
    control = {"output": [torch.randn(1, 4, 1, 1, generator=generator).expand(2, 4, 6, 5), None]}
    timestep = torch.tensor([number, number])
    timestep = timestep[:1]
    return (x, timestep), {"context": context.clone(), "control": control, "options": options, "flag": True}


LIVE = {"options": {"patches": {"attn1": [double]}}}


def record(model, recorder, runs=1, calls=6, flags=None):
    """Run the model; returns the outputs of all calls."""
    outputs = []
    context = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(99))
    for run in range(runs):
        with torch.inference_mode(), recorder.watching(model, None if flags is None else flags[run]):
            for _ in range(calls):
                args, kwargs = make_call(len(outputs), context)
                outputs.append(model(*args, **kwargs))
    return outputs


def make_recorder(folder, calls=100, **options):
    options = {"seed": 0, "ram_bytes": LARGE, "ignored": [("options", "callbacks")]} | options
    return ReplayRecorder(calls, folder=folder, **options)


def recorded_number(replays, index):
    """Number of the recorded call in the order of all calls."""
    return int(replays.arguments(index, CPU, LIVE)[0][1])
