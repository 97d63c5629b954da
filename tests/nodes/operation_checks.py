"""Checks of in_process.py: every operation of this pack's layouts on quantized tensors."""

import comfy.ops
import comfy.quant_ops
import torch
from layout_checks import DEVICE, distance
from pack.nodes import host
from pack.quant_core import FORMATS
from pack.quant_core.formats import make_codec
from pack.quant_core.formats.layer_json import config_tensor
from torch.nn.functional import linear

SHAPE, BLOCK = (70, 100), 32
INPUTS = ((5, 100), (2, 5, 100), (100,), (2, 3, 4, 100))


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def operations() -> dict:
    """{format: {dtype: {what is checked: whether it holds}}} of every layout."""
    host.add_layouts()
    from pack.nodes.runtime.layouts import LAYOUTS

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    with torch.inference_mode(False):
        return {name: {str(dtype): _operations(layout, dtype) for dtype in dtypes} for name, layout in LAYOUTS.items()}


def _operations(layout, dtype: torch.dtype) -> dict[str, bool]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    options = {"block_size": BLOCK} if "block" in FORMATS[layout.format].granularities else {}
    codec = make_codec(layout.format, **options)
    weight, bias = normal(*SHAPE), normal(SHAPE[0])
    quantize = comfy.quant_ops.QuantizedTensor.from_float

    def decode(tensor) -> torch.Tensor:
        return codec.dequantize({"weight": tensor._qdata, "weight_scale": tensor._params.scale}, SHAPE)

    coded = quantize(weight, layout.__name__, **options)
    decoded = coded.dequantize()
    near = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    holds = {
        "the weight is what its codes mean": torch.equal(decoded, decode(coded).to(dtype)),
        "the weight is near the original": 0 < distance(decoded, weight) < 0.03,
        "has shape and dtype of the original": (coded.shape, coded.dtype) == (weight.shape, dtype),
    }
    inputs = [normal(*shape) for shape in INPUTS]
    for x in inputs:
        for b in (None, bias):
            case = f"inputs {tuple(x.shape)}{'' if b is None else ' and a bias'}"
            with torch.inference_mode():
                whole = linear(x, coded, b)
            with torch.no_grad():
                parts = linear(x, coded, b)
            learning = linear(x.clone().requires_grad_(), coded, b)
            holds[f"{case}: linear is t and mm"] = torch.equal(whole, parts) and torch.equal(whole, learning.detach())
            seen = codec.quantize_activations(x.reshape(-1, SHAPE[1])).reshape(x.shape)
            means = linear(seen, decode(coded), None if b is None else b.float())
            holds[f"{case}: inputs are quantized"] = whole.dtype is dtype and distance(whole, means) < near
    x = inputs[0]
    product = linear(x, coded)
    holds |= {
        "t": torch.equal(coded.t().dequantize(), decoded.t()) and coded.t().shape == weight.t().shape,
        "t twice": torch.equal(linear(x, coded.t().t()), product),
        "t of a clone": torch.equal(coded.t().clone().dequantize(), decoded.t()),
        "linear with the transpose": torch.equal(linear(x[:, :70], coded.t()), linear(x[:, :70], decoded.t())),
        "mm": torch.equal(torch.mm(x, coded.t()), product),
        "mm from the left": torch.equal(torch.mm(coded, x.t()), torch.mm(decoded, x.t())),
        "mm with the weight itself": torch.equal(torch.mm(x[:, :70], coded), torch.mm(x[:, :70], decoded)),
        "addmm": torch.equal(torch.addmm(bias, x, coded.t()), linear(x, coded, bias)),
        "addmm with factors": torch.equal(
            torch.addmm(bias, x, coded.t(), beta=0.5), torch.addmm(bias, x, decoded.t(), beta=0.5)
        ),
        "addmm of a matrix": torch.equal(torch.addmm(product, x, coded.t()), torch.addmm(product, x, decoded.t())),
        "view of the same shape": coded.view(-1, 100)._qdata.data_ptr() == coded._qdata.data_ptr(),
        "view of another shape": torch.equal(coded.view(100, 70), decoded.view(100, 70)),
        "reshape": torch.equal(coded.reshape(-1), decoded.reshape(-1)),
        "other operations": torch.equal(coded + 1, decoded + 1),
    }
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    cast, moved = coded.to(other), coded.to("meta")
    copy = coded.clone()
    copy._params.scale.zero_()
    target = torch.empty_like(coded, dtype=other)
    target.copy_(coded)
    holds |= {
        "to a dtype": cast.dtype is other and _same_bytes(cast._qdata, coded._qdata),
        "to a device": {tensor.device.type for tensor in (moved, moved._qdata, moved._params.scale)} == {"meta"},
        "clone": torch.equal(coded.dequantize(), decoded) and not copy.dequantize().any(),
        "copy_": target.dtype is other and torch.equal(target.to(dtype).dequantize(), decoded),
        "detach": torch.equal(coded.detach().dequantize(), decoded),
        "state dict": {name: tensor.dtype for name, tensor in coded.state_dict("a.weight").items()}
        == {"a.weight": FORMATS[layout.format].storage_dtype, "a.weight_scale": torch.float32},
        "streamed": torch.equal(linear(x, _streamed(coded)), product),
    }
    again = coded.requantize_from_float(decoded, scale="recalculate", stochastic_rounding=0)
    draws = [
        coded.requantize_from_float(weight, scale="recalculate", stochastic_rounding=seed)
        for seed in (*range(1, 65), 1)
    ]
    mean = torch.stack([draw.dequantize().float() for draw in draws[:64]]).mean(0)
    holds |= {
        "requantized": again._params.block_size == codec.block_size and distance(again.dequantize(), decoded) < near,
        "same seed, same codes": torch.equal(draws[0].dequantize(), draws[-1].dequantize()),
        "other seed, other codes": not torch.equal(draws[0].dequantize(), draws[1].dequantize()),
        "stochastic rounding is right on average": distance(mean, weight) < 0.5 * distance(decoded, weight),
    }
    learned = x.clone().requires_grad_()
    linear(learned, coded, bias).sum().backward()
    holds["gradient"] = torch.allclose(learned.grad.float(), decoded.float().sum(0).expand_as(x), rtol=0.02, atol=0.1)
    holds |= _layer(coded, codec, normal(2, 100, 5).transpose(1, 2))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: linear(x, coded, bias), backend="aot_eager", fullgraph=True)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            holds[f"compiled, {mode.__name__}"] = all(
                torch.equal(compiled(x), linear(x, coded, bias)) for x in inputs[:2]
            )
    return holds


def _layer(coded, codec, crooked) -> dict[str, bool]:
    """ComfyUI's layer, loaded from these quantized values. ``crooked``: activations that are not contiguous."""
    state = {**coded.state_dict("a.weight"), "a.comfy_quant": config_tensor(codec.config)}
    layer = comfy.ops.mixed_precision_ops({}, coded.dtype).Linear(*reversed(coded.shape), bias=False)
    layer._load_from_state_dict(dict(state), "a.", {}, True, [], [], [])
    with torch.no_grad():
        parts = layer(crooked)
    with torch.inference_mode():
        whole = layer(crooked)
    saved = layer.state_dict(prefix="a.")
    layer._load_from_state_dict(dict(state), "a.", {}, True, [], [], [])
    again = layer.state_dict(prefix="a.")
    kind = type(layer)
    layer._load_from_state_dict({"a.weight": coded.dequantize()}, "a.", {}, True, [], [], [])
    plain = layer.state_dict(prefix="a.")
    layer._load_from_state_dict(dict(state), "a.", {}, True, [], [], [])
    return {
        "layer: linear is mm, whatever the strides": torch.equal(whole, parts)
        and torch.equal(whole, linear(crooked.contiguous(), coded)),
        "layer: saved as loaded": saved.keys() == state.keys()
        and all(_same_bytes(saved[name], state[name]) for name in state),
        "layer: loaded again": all(_same_bytes(again[name], state[name]) for name in state) and type(layer) is kind,
        "layer: loaded with a plain weight": plain.keys() == {"a.weight"},
        "layer: moved": layer.to("meta").weight._params.scale.device.type == "meta",
    }


def _streamed(coded):
    """Copy through a flat buffer, as ComfyUI streams weights from main memory."""
    import comfy.memory_management  # not in every release

    buffer = torch.zeros(comfy.memory_management.vram_aligned_size([coded]), dtype=torch.uint8, device=DEVICE)
    (view,) = comfy.memory_management.interpret_gathered_like([coded], buffer)
    view.copy_(coded)
    return view


CHECKS = {"operation_layouts": operations}
