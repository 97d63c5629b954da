"""Small models with recorded calls, and the statistics of their layers."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics, LowRankHessian
from learned_rounding.quant_core.calibration.histogram import histogram
from learned_rounding.quant_core.layer import Layer
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.run.layer_task import _static_input_scale
from learned_rounding.quant_core.sequential import PendingLayer, ReplayedModel

CPU = torch.device("cpu")
WIDTH, TOKENS, CALLS = 32, 48, 6


class Block(nn.Module):
    """A transformer block: q, k and v share their input; ``modulation`` is computed outside of the blocks.

    With ``in_place`` it changes its input, as some blocks of ComfyUI do.
    """

    def __init__(self, width: int = WIDTH, in_place: bool = False):
        super().__init__()
        self.norm, self.in_place = nn.LayerNorm(width), in_place
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, modulation=None):
        h = self.norm(x)
        h = h if modulation is None else h * (1 + modulation)
        h = self.out(functional.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        x = x.add_(h) if self.in_place else x + h
        return x + self.mlp(self.norm(x))


class Transformer(nn.Module):
    """Blocks in a list, with layers before, beside and after them."""

    def __init__(self, blocks: int = 3, *, in_place: bool = False, keywords: bool = False):
        super().__init__()
        self.embed, self.modulation, self.final = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.blocks = nn.ModuleList(Block(in_place=in_place) for _ in range(blocks))
        self.keywords = keywords

    def forward(self, x, time):
        x, modulation = self.embed(x), self.modulation(time)
        for block in self.blocks:
            x = block(x=x, modulation=modulation) if self.keywords else block(x, modulation)
        return self.final(x)


class PairBlock(nn.Module):
    """Two streams in, two streams out."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, image, text):
        return image + self.image(image) + text.mean(1, keepdim=True), text + self.text(text).tanh()


class Pairs(nn.Module):
    """Blocks with two outputs, and a model with nested outputs."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(PairBlock() for _ in range(2))

    def forward(self, x, time):
        text = time.expand(-1, 4, -1) + x[:, :4]
        for block in self.blocks:
            x, text = block(x, text)
        return {"sample": x, "extra": (text, "not a tensor")}


class Residual(nn.Module):
    """The residual block of a U-Net."""

    def __init__(self, inner: int = WIDTH):
        super().__init__()
        self.time, self.body, self.shortcut = nn.Linear(WIDTH, WIDTH), nn.Linear(inner, WIDTH), nn.Linear(inner, WIDTH)

    def forward(self, x, time):
        return self.shortcut(x) + functional.silu(self.body(x) + self.time(time))


class TimedSequential(nn.Sequential):
    """A member of a list whose own call passes the time to some of its children, as in ComfyUI's U-Nets."""

    def forward(self, x, time):
        for layer in self:
            x = layer(x, time) if isinstance(layer, Residual) else layer(x)
        return x


class UNet(nn.Module):
    """Skip connections across all blocks. ``children``: the model calls the children of a list's members itself."""

    def __init__(self, children: bool = False):
        super().__init__()
        self.children_called = children

        def member(*layers: nn.Module) -> nn.Module:
            return nn.ModuleList(layers) if children else TimedSequential(*layers)

        self.time_embed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.input_blocks = nn.ModuleList([member(Residual(), Block()), member(Residual())])
        self.middle_block = TimedSequential(Residual(), nn.GELU())
        self.output_blocks = nn.ModuleList(member(Residual(2 * WIDTH)) for _ in range(2))

    def _call(self, member, x, time):
        if not self.children_called:
            return member(x, time)
        for layer in member:
            x = layer(x, time) if isinstance(layer, Residual) else layer(x)
        return x

    def forward(self, x, time):
        time, skips = self.time_embed(time), []
        for member in self.input_blocks:
            x = self._call(member, x, time)
            skips.append(x)
        x = self.middle_block(x, time)
        for member in self.output_blocks:
            x = self._call(member, torch.cat([x, skips.pop()], dim=-1), time)
        return x


def make(kind, *args, seed: int = 0, **options) -> nn.Module:
    """A model with seeded weights."""
    torch.manual_seed(seed)
    return kind(*args, **options).requires_grad_(False).eval()


def make_arguments(calls: int = CALLS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Correlated inputs x (1, tokens, width) and time (1, 1, width) of each call."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / 6
    return [
        (torch.randn(1, TOKENS, WIDTH, generator=generator) @ mixing, torch.randn(1, 1, WIDTH, generator=generator))
        for _ in range(calls)
    ]


def linear_layers(root: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in root.named_modules() if isinstance(module, nn.Linear)}


def replay(root: nn.Module, folder: Path | None = None, **options) -> ReplayedModel:
    """The model with recorded calls, of which the last two are validation calls. ``options``: fields of ReplayedModel."""
    arguments = options.pop("arguments", None)
    arguments = make_arguments() if arguments is None else arguments
    count = len(arguments)
    fields = {
        "root": root,
        "layers": linear_layers(root),
        "run": lambda index: root(*(tensor.clone() for tensor in arguments[index])),
        "validation": [index >= count - 2 for index in range(count)],
        "positions": [index / CALLS for index in range(count)],
        "device": CPU,
        "device_bytes": 1 << 30,
        "ram_bytes": 0,
        "folder": folder or Path("unused"),
        "fingerprint": "recorded calls",
    }
    return ReplayedModel(**{**fields, **options})


def calibrate(model: ReplayedModel) -> InMemoryCalibration:
    """Statistics of all layers that the recorded calls run."""
    inputs, judging = {name: ([], []) for name in model.layers}, False
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs[name][judging].append(args[0].flatten(0, -2))
        )
        for name, module in model.layers.items()
    ]
    try:
        for index, judging in enumerate(model.validation):  # noqa: B007 (the hooks read it)
            model.run(index)
    finally:
        for hook in hooks:
            hook.remove()
    return InMemoryCalibration({name: _measure(*rows) for name, rows in inputs.items() if rows[0] and rows[1]})


def _measure(calibration: list[torch.Tensor], validation: list[torch.Tensor]) -> LayerStatistics:
    rows, judged = torch.cat(calibration), torch.cat(validation)
    return LayerStatistics(
        rows.t() @ rows / len(rows),
        LowRankHessian(judged.t() / len(judged) ** 0.5, torch.zeros(rows.shape[1])),
        rows.mean(dim=0),
        amax=rows.abs().amax(dim=0),
        histogram=histogram(rows),
    )


def pend(model: ReplayedModel, calibration: InMemoryCalibration, recipe: Recipe, names) -> dict[str, PendingLayer]:
    """Layers with their calibrated results, as a run has them."""
    pending = {}
    for name in names:
        module = model.layers[name]
        layer = Layer(module.weight, module.bias, calibration.layer_statistics(name) or LayerStatistics())
        rounding = recipe.rounding.layerwise()
        plain = quantize_layer(
            layer,
            recipe.format.codecs(module.weight.shape[1]),
            rounding if layer.statistics.hessian is not None else rounding.uncalibrated(),
            input_scale=_static_input_scale(recipe, layer.statistics),
            seed=recipe.seed,
        )
        pending[name] = PendingLayer(layer, plain, rounding, recipe.seed)
    return pending


def outputs(value) -> list[torch.Tensor]:
    """Tensors of a model's output."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in values for tensor in outputs(each)]
