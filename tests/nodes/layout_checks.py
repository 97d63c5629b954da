"""Checks of this pack's layouts for in_process.py: inside the host's process, with the pack imported as ``pack``."""

import logging
import sys
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.sd
import comfy.utils
import torch
from pack.nodes import host
from pack.quant_core import FORMATS, Recipe
from pack.quant_core.formats import make_codec
from pack.quant_core.formats.layer_json import config_tensor, layer_configs
from pack.quant_core.output import verify_file
from pack.quant_core.sources import SafetensorsFile
from torch.nn.functional import linear

OURS = [name for name, entry in FORMATS.items() if entry.stock_since is None]
SHAPE, BLOCK = (70, 100), 32
DEVICE = comfy.model_management.get_torch_device()
INPUTS = ((5, 100), (2, 5, 100), (100,), (2, 3, 4, 100))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


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
        "stands for the original": (coded.shape, coded.dtype) == (weight.shape, dtype),
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


class TinyModel:
    """The tiny model, a LoRA for it, and its predictions for fixed random inputs."""

    def __init__(self):
        assets = Path(host.__file__).parents[2] / "assets"
        self.original = comfy.sd.load_diffusion_model(str(assets / "tiny_mmdit_emoji.safetensors"))
        self.lora = comfy.utils.load_torch_file(str(assets / "tiny_lora_red.safetensors"))
        generator = torch.Generator().manual_seed(0)
        shapes = ((1, 16, 8, 8), (1, 16, 512), (1, 512))
        self.x, context, pooled = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
        self.time = torch.tensor([500.0], device=DEVICE)
        self.context = {"c_crossattn": context, "y": pooled}

    def file(self, **recipe) -> host.Quantized:
        return host.quantize(self.original, Recipe(rounding="nearest", **recipe), lambda event: None)

    def with_lora(self, model):
        return comfy.sd.load_lora_for_models(model, None, self.lora, 1.0, 0.0)[0]

    def sampled(self, model) -> torch.Tensor:
        """Call the model as a sampler does, with its attachments."""
        model.pre_run()
        options = comfy.model_patcher.create_model_options_clone(model.model_options)
        options = comfy.patcher_extension.copy_nested_dicts(options["transformer_options"])
        options["wrappers"] = comfy.patcher_extension.copy_nested_dicts(model.wrappers)
        return self._applied(model, {}, transformer_options=options)

    def run(self, model, **options) -> torch.Tensor:
        return self._applied(model, options)

    def _applied(self, model, patching: dict, **options) -> torch.Tensor:
        model.patch_model(device_to=DEVICE, **patching)
        try:
            return model.model.apply_model(self.x, self.time, **self.context, **options)
        finally:
            model.unpatch_model(device_to=torch.device("cpu"))


def _raised(call, *arguments) -> str:
    try:
        call(*arguments)
    except Exception as error:
        return repr(error)
    return ""


def _bytes(path) -> dict[str, tuple]:
    """{tensor: (dtype, shape, bytes)} of a file's quantized layers; values as float32 of other tensors."""
    with SafetensorsFile(path) as opened:
        layers = layer_configs(opened)[0]
        found = {}
        for name, info in opened.tensors.items():
            tensor = opened.read(name)
            coded = name.rpartition(".")[0].removeprefix("model.diffusion_model.") in {
                layer.removeprefix("model.diffusion_model.") for layer in layers
            } and not name.endswith(".bias")
            value = (
                tensor.contiguous().flatten().view(torch.uint8) if coded else tensor.float().flatten().view(torch.uint8)
            )
            known = (str(info.dtype), info.shape) if coded else info.shape
            found[name.removeprefix("model.diffusion_model.")] = known, value.numpy().tobytes()
        return found


def loading() -> dict:
    """Files in own formats through ComfyUI's own functions, before and after the formats are registered."""
    tiny = TinyModel()
    files = {name: tiny.file(format=name, **({"block_size": 64} if "block" in name else {})) for name in OURS}
    paths = {name: str(quantized.files[""]) for name, quantized in files.items()}
    before = {name: _raised(comfy.sd.load_diffusion_model, path) for name, path in paths.items()}
    host.add_layouts()
    expected = tiny.run(tiny.original)
    expected_lora = tiny.run(tiny.with_lora(tiny.original))
    found = {}
    for name, path in paths.items():
        model = comfy.sd.load_diffusion_model(path)
        plain = tiny.run(model)
        patched = tiny.with_lora(model)
        whole, little = tiny.run(patched), tiny.run(patched, lowvram_model_memory=1)
        alone, unpatched = tiny.run(model, lowvram_model_memory=1), tiny.run(model)
        saved, baked = (
            Path(path).with_name(f"{name}_saved.safetensors"),
            Path(path).with_name(f"{name}_baked.safetensors"),
        )
        comfy.sd.save_checkpoint(str(saved), model)
        comfy.sd.save_checkpoint(str(baked), patched)
        comfy.model_management.unload_all_models()
        (ours,) = host.save_files(files[name], "tiny", "output")
        layers = host.quantized_layers(model)
        found[name] = {
            "before": before[name],
            "knows": host.supports_format(name),
            "layers": len(layers),
            "codes": sorted(set(layers.values())),
            "error": distance(plain, expected),
            "the LoRA moves by": distance(expected_lora, expected),
            "error with the LoRA": distance(whole, expected_lora),
            "error with the LoRA and little memory": distance(little, expected_lora),
            "little memory alone": torch.equal(alone, plain),
            "unpatched": torch.equal(unpatched, plain) and torch.equal(tiny.run(model), plain),
            "as in the graph": torch.equal(tiny.run(host.build_model(tiny.original, files[name])), plain),
            "saved by stock": _bytes(saved) == _bytes(path),
            "saved by us": ours.read_bytes() == Path(path).read_bytes(),
            "loaded from stock's file": torch.equal(tiny.run(_loaded(saved)), plain),
            "baked": verify_file(baked).problems,
            "baked layers": verify_file(baked).layers,
            "baked formats": len(
                {str(config) for config in _configs(baked).values()}
                | {str(config) for config in _configs(path).values()}
            ),
            "baked is as patched": torch.equal(tiny.run(_loaded(baked)), whole),
        }
    return found


def _loaded(path):
    """The model of a file with plain weights copied: products depend on the alignment, which is random in a mapped file."""
    model = comfy.sd.load_diffusion_model(str(path))
    for weight in model.model.parameters():
        if type(weight.data) is torch.Tensor:
            weight.data = weight.data.clone()
    return model


def _configs(path) -> dict:
    with SafetensorsFile(path) as opened:
        return layer_configs(opened)[0]


def native() -> dict:
    """Functions of this pack that run while a native file is loaded and sampled, and whether its results change."""
    tiny = TinyModel()
    recipes = {
        "float8_e4m3fn": {"format": "float8_e4m3fn"},
        "float8_e5m2": {"format": "float8_e5m2"},
        "int8 row": {"format": "int8_tensorwise"},
        "int8 tensor": {"format": "int8_tensorwise", "granularity": "tensor"},
        "int8 convrot": {"format": "int8_tensorwise", "convrot": True},
        "int8_blockwise": {"format": "int8_blockwise"},
    }
    files = {name: tiny.file(**recipe) for name, recipe in recipes.items()}
    stock = {
        name: comfy.sd.load_diffusion_model(str(file.files[""])) for name, file in files.items() if name not in OURS
    }
    before = {name: tiny.run(model) for name, model in stock.items()}
    classes = {name: _class_names(model) for name, model in stock.items()}
    algorithms = dict(comfy.quant_ops.QUANT_ALGOS)
    host.add_layouts()
    found = {}
    for name, file in files.items():
        ran = set()

        def watch(frame, event, _, ran=ran):
            if event == "call" and Path(frame.f_code.co_filename).name == "layouts.py":
                ran.add(frame.f_code.co_name)

        sys.setprofile(watch)
        try:
            model = comfy.sd.load_diffusion_model(str(file.files[""]))
            after = tiny.run(model)
        finally:
            sys.setprofile(None)
        same = name not in before or (torch.equal(after, before[name]) and _class_names(model) == classes[name])
        found[name] = {"ran": sorted(ran), "same": same}
    kept = all(comfy.quant_ops.QUANT_ALGOS[name] is entry for name, entry in algorithms.items())
    return {"files": found, "entries kept": kept, "twice": _loader_stays(host.add_layouts)}


def _class_names(model) -> list[str]:
    return [f"{type(module).__module__}.{type(module).__qualname__}" for module in model.model.modules()]


def _loader_stays(call) -> bool:
    before = comfy.ops._load_quantized_module
    call()
    return comfy.ops._load_quantized_module is before


def damaged() -> dict[str, str]:
    """Errors of ComfyUI's loader for layers whose tensors contradict their JSON."""
    host.add_layouts()
    operations = comfy.ops.mixed_precision_ops({}, torch.float32)
    layout = "LearnedRoundingInt8Blockwise"
    coded = comfy.quant_ops.QuantizedTensor.from_float(torch.randn(64, 96), layout, block_size=32)
    valid = {
        **coded.state_dict("a.weight"),
        "a.comfy_quant": config_tensor({"format": "int8_blockwise", "group_size": 32}),
    }
    cases = {
        "valid": valid,
        "no scale": {name: tensor for name, tensor in valid.items() if name != "a.weight_scale"},
        "no weight": {name: tensor for name, tensor in valid.items() if name != "a.weight"},
        "another block size": {**valid, "a.comfy_quant": config_tensor({"format": "int8_blockwise", "group_size": 64})},
        "FP8 codes": {**valid, "a.weight": valid["a.weight"].view(torch.float8_e4m3fn)},
        "a bank of matrices": {**valid, "a.weight": valid["a.weight"][None]},
    }

    def load(state_dict):
        layer = operations.Linear(96, 64, bias=False)
        layer._load_from_state_dict(dict(state_dict), "a.", {}, True, [], [], [])

    return {name: _raised(load, state_dict) for name, state_dict in cases.items()}


class _Listener(logging.Handler):
    def __init__(self, said: list[str]):
        super().__init__()
        self.emit = lambda record: said.append(record.getMessage())


def compiled() -> dict[str, dict]:
    """The tiny model through torch.compile in own formats and in a native one."""
    tiny = TinyModel()
    files = {name: tiny.file(format=name) for name in (*OURS, "int8_tensorwise")}
    host.add_layouts()
    found = {}
    for name, quantized in files.items():
        model = comfy.sd.load_diffusion_model(str(quantized.files[""]))
        plain = tiny.run(model)
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model.model.diffusion_model = torch.compile(model.model.diffusion_model, backend="aot_eager")
        same = torch.equal(tiny.run(model), plain)
        found[name] = {"same": same, "breaks": len(torch._dynamo.utils.counters["graph_break"])}
    return found


def changed() -> dict[str, dict]:
    """ComfyUI with other internals: nothing is changed, one warning is logged, and decoding layers run."""
    tiny = TinyModel()
    loader = getattr(comfy.ops, "_load_quantized_module", None)

    def other(module, state_dict, prefix):
        raise AssertionError("not ours to call")

    changes = {"as it is": None} if loader is None else {"gone": None, "other arguments": other}
    found = {}
    for name, changed_loader in changes.items():
        said = []
        logging.getLogger("pack.nodes.host.layouts").handlers = [_Listener(said)]
        if loader is not None:
            comfy.ops._load_quantized_module = changed_loader
            if changed_loader is None:
                del comfy.ops._load_quantized_module
        host.add_layouts()
        still = getattr(comfy.ops, "_load_quantized_module", None) is changed_loader
        if loader is not None:
            comfy.ops._load_quantized_module = loader
        file = tiny.file(format="int8_blockwise")
        model = host.build_model(tiny.original, file)
        found[name] = {
            "said": said,
            "untouched": still and not any(host.supports_format(format) for format in OURS),
            "layers": len(host.quantized_layers(model)),
            "error": distance(tiny.run(model), tiny.run(tiny.original)),
        }
    return found


CHECKS = {
    "layout_operations": operations,
    "layout_loading": loading,
    "layout_native": native,
    "layout_damaged": damaged,
    "layout_changed": changed,
    "layout_compiled": compiled,
}
