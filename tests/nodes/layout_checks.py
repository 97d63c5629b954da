"""Checks of this pack's layouts for in_process.py: inside the host's process, with the pack imported as ``pack``."""

import functools
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
from pack.quant_core.convert.dequantize import DecodedSource
from pack.quant_core.formats import detect_layer
from pack.quant_core.formats.layer_json import CONFIG_KEY, config_tensor, layer_configs
from pack.quant_core.output import verify_file
from pack.quant_core.sources import SafetensorsFile

OURS = [name for name, entry in FORMATS.items() if entry.stock_since is None]
# Name → recipe of the formats below 8 bits and of the microscaling ones.
STOCK = {
    "asym_w4a8_int8": {"format": "asym_w4a8_int8"},
    "asym_w4a8_int8 6 bits": {"format": "asym_w4a8_int8", "bits": 6},
    "convrot_w4a4": {"format": "convrot_w4a4"},
    "convrot_w4a4 int4": {"format": "convrot_w4a4", "linear_dtype": "int4"},
    "nvfp4": {"format": "nvfp4"},
    "mxfp8": {"format": "mxfp8"},
}
DEVICE = comfy.model_management.get_torch_device()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


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

    def file(self, source=None, **recipe) -> host.Quantized:
        return host.quantize(
            source or self.original, Recipe(rounding="nearest", **{"convrot": None, **recipe}), lambda event: None
        )

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
    """{tensor: (dtype, shape, bytes)} of a file's quantized layers without their JSON; values as float32 of other tensors."""
    with SafetensorsFile(path) as opened:
        layers = layer_configs(opened)[0]
        found = {}
        for name, info in opened.tensors.items():
            if name.endswith(CONFIG_KEY):
                continue
            tensor = opened.read(name)
            coded = name.rpartition(".")[0].removeprefix("model.diffusion_model.") in {
                layer.removeprefix("model.diffusion_model.") for layer in layers
            } and not name.endswith(".bias")
            value = (
                tensor.contiguous().flatten().view(torch.uint8) if coded else tensor.float().flatten().view(torch.uint8)
            )
            # ComfyUI saves the scales of mxfp8 under the name of their dtype, with the same bytes.
            dtype = torch.uint8 if info.dtype is torch.float8_e8m0fnu else info.dtype
            known = (str(dtype), info.shape) if coded else info.shape
            found[name.removeprefix("model.diffusion_model.")] = known, value.numpy().tobytes()
        return found


def _codecs(path) -> dict[str, str]:
    """{layer: codec and its JSON} of a file."""
    with SafetensorsFile(path) as opened:
        codecs = {
            layer.removeprefix("model.diffusion_model."): detect_layer(layer, config, opened.tensors)
            for layer, config in layer_configs(opened)[0].items()
        }
    return {layer: f"{codec}: {codec.config}" for layer, codec in codecs.items()}


def _weights(path) -> dict[str, torch.Tensor]:
    """{tensor: value} of a file whose quantized layers are dequantized."""
    with SafetensorsFile(path) as opened:
        decoded = DecodedSource(opened)
        return {name.removeprefix("model.diffusion_model."): decoded.read(name) for name in decoded.tensors}


def _has_same_weights(a, b) -> bool:
    weights, others = _weights(a), _weights(b)
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def loading() -> dict:
    """Files in own formats through ComfyUI's own functions, before and after our formats are registered."""
    return _loading({name: {"format": name, **({"block_size": 64} if "block" in name else {})} for name in OURS})


def _loading(recipes: dict[str, dict]) -> dict:
    tiny = TinyModel()
    files = {name: tiny.file(**recipe) for name, recipe in recipes.items()}
    paths = {name: Path(quantized.files[""]) for name, quantized in files.items()}
    before = {name: _raised(lambda path=path: tiny.run(_loaded(path))) for name, path in paths.items()}
    host.add_layouts()
    expected = tiny.run(tiny.original)
    expected_lora = tiny.run(tiny.with_lora(tiny.original))
    moved = distance(expected_lora, expected)
    found = {}
    for name, path in paths.items():
        model = comfy.sd.load_diffusion_model(str(path))
        plain = tiny.run(model)
        patched = tiny.with_lora(model)
        whole, little = tiny.run(patched), tiny.run(patched, lowvram_model_memory=1)
        beside = tiny.run(comfy.sd.load_bypass_lora_for_models(model, None, tiny.lora, 1.0, 0.0)[0])
        alone, unpatched = tiny.run(model, lowvram_model_memory=1), tiny.run(model)
        before_it = tiny.file(source=tiny.with_lora(tiny.original), **recipes[name])
        saved, baked = path.with_name(f"{name}_saved.safetensors"), path.with_name(f"{name}_baked.safetensors")
        comfy.sd.save_checkpoint(str(saved), model)
        comfy.sd.save_checkpoint(str(baked), patched)
        comfy.model_management.unload_all_models()
        (ours,) = host.save_files(files[name], "tiny", "output")
        layers = host.quantized_layers(model)
        found[name] = {
            "before": before[name],
            "runs": host.describe_formats(path),
            "layers": len(layers),
            "codes": sorted(set(layers.values())),
            "error": distance(plain, expected),
            "the LoRA moves by": moved,
            "error with the LoRA": distance(whole, expected_lora),
            "error with the LoRA and little memory": distance(little, expected_lora),
            "error with the LoRA beside": distance(beside, expected_lora),
            "error with the LoRA before": distance(tiny.run(host.build_model(tiny.original, before_it)), expected_lora),
            "little memory alone": torch.equal(alone, plain),
            "unpatched": torch.equal(unpatched, plain),
            "as in the graph": torch.equal(tiny.run(host.build_model(tiny.original, files[name])), plain),
            "saved by stock": _bytes(saved) == _bytes(path) and _codecs(saved) == _codecs(path),
            "same weights saved by stock": _has_same_weights(saved, path),
            "saved by us": ours.read_bytes() == path.read_bytes(),
            "verified": host.verify_saved(files[name], [ours]),
            "loaded from stock's file": torch.equal(tiny.run(_loaded(saved)), plain),
            "problems": [*verify_file(path).problems, *verify_file(saved).problems, *verify_file(baked).problems],
            "baked layers": verify_file(baked).layers,
            "baked codecs": _codecs(baked) == _codecs(saved),
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
    """Classes of the modules; of a layer with our short forward pass, ComfyUI's class that it extends."""
    classes = (
        type(module).__base__ if getattr(module, "is_extended", False) else type(module)
        for module in model.model.modules()
    )
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in classes]


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
    "layout_loading": loading,
    **{f"layout_stock {name}": functools.partial(_loading, {name: recipe}) for name, recipe in STOCK.items()},
    "layout_native": native,
    "layout_damaged": damaged,
    "layout_changed": changed,
    "layout_compiled": compiled,
}
