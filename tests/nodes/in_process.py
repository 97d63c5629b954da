"""Checks that need ComfyUI's classes in the same process; run by the Python of a host. Prints the result as JSON.

python in_process.py COMFYUI PACK FOLDER CHECK
"""

import functools
import importlib
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

comfyui, pack, folder, check = sys.argv[1:]
cpu = os.environ.get("LEARNED_ROUNDING_HOST_DEVICE", "cpu") == "cpu"
sys.argv = ["main.py", *(["--cpu"] if cpu else []), "--base-directory", folder]
sys.path.insert(0, comfyui)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import utils.install_util  # noqa: E402, F401 (ComfyUI's, before a dependency finds another one)

# isort: split
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

spec = importlib.util.spec_from_file_location("pack", Path(pack) / "__init__.py", submodule_search_locations=[pack])
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from pack.nodes import host  # noqa: E402
from pack.quant_core import FORMATS, Recipe, quantize_tensors  # noqa: E402
from pack.quant_core.formats.layer_json import config_tensor  # noqa: E402
from saving_checks import replaced, without_links  # noqa: E402

RECIPES = {
    "float8_e4m3fn": Recipe(),
    "int8_tensorwise": Recipe(format="int8_tensorwise", convrot=False),
    "int8 convrot": Recipe(format="int8_tensorwise", convrot=True),
    "int8_blockwise": Recipe(format="int8_blockwise", block_size=32),
}
OURS = {
    "int8_blockwise": Recipe(format="int8_blockwise", block_size=32),
    "float8_e4m3fn_blockwise": Recipe(format="float8_e4m3fn_blockwise", block_size=64),
    "float8_e4m3fn_rowwise": Recipe(format="float8_e4m3fn_rowwise"),
}
BELOW_8_BITS = {
    "asym_w4a8_int8": Recipe(format="asym_w4a8_int8"),
    "asym_w4a8_int8 6 bits": Recipe(format="asym_w4a8_int8", bits=6),
    "convrot_w4a4": Recipe(format="convrot_w4a4"),
    "nvfp4": Recipe(format="nvfp4"),
    "mxfp8": Recipe(format="mxfp8"),
}
TINY_T5 = {"t5xxl_model_config": {"d_model": 64, "d_kv": 32, "num_heads": 2}}


def t5_weights() -> dict[str, torch.Tensor]:
    """Random T5-XXL of width 64 in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)

    tensors = {"shared.weight": normal(32128, 64) * 8, "encoder.final_layer_norm.weight": torch.ones(64).bfloat16()}
    for block in range(24):
        layer = f"encoder.block.{block}.layer"
        for name in "qkvo":
            tensors[f"{layer}.0.SelfAttention.{name}.weight"] = normal(64, 64)
        for name, shape in {"wi_0": (10240, 64), "wi_1": (10240, 64), "wo": (64, 10240)}.items():
            tensors[f"{layer}.1.DenseReluDense.{name}.weight"] = normal(*shape)
        for part in (0, 1):
            tensors[f"{layer}.{part}.layer_norm.weight"] = torch.ones(64).bfloat16()
    tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = normal(32, 2)
    return tensors


def load(path, **options):
    return comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.PIXART, model_options={**TINY_T5, **options})


def load_tiny(load_clip, *paths, model_options=None, **options):
    """ComfyUI's own loader with the small width, which it cannot detect in the file."""
    return load_clip(*paths, model_options={**TINY_T5, **(model_options or {})}, **options)


def encode(clip) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize("a red apple on a table"), return_pooled=False)


def text_encoder(recipes=RECIPES) -> dict:
    """Quantize a CLIP, and load its file through ComfyUI's loader, with decoding layers where they are needed."""
    path = Path(folder) / "t5.safetensors"
    save_file(t5_weights(), path)
    clip = load(path)
    before = encode(clip)
    found = {}
    for name, recipe in recipes.items():
        quantized = host.quantize(clip, recipe, lambda event: None)
        ours = host.build_clip(clip, quantized)
        devices = {tensor.device for tensor in ours.cond_stage_model.state_dict().values()}
        (file,) = quantized.files.values()
        (saved,) = host.save_files(quantized, "t5", "output")
        copied = without_links(lambda quantized=quantized: host.save_files(quantized, "t5", "output"))[0]
        ours_reads = bool(host.decoding.layers_to_decode(saved))
        with replaced(comfy.sd, "load_clip", functools.partial(load_tiny, comfy.sd.load_clip)):
            verified = host.verify_saved(quantized, [saved])
        loaded = load(
            saved, **(host.decoding.decoding_options(comfy.sd.load_clip)["model_options"] if ours_reads else {})
        )
        conditioning = encode(ours)
        found[name] = {
            "layers": len(host.quantized_layers(ours.patcher)),
            "offloaded": devices == {ours.patcher.offload_device},
            "stock_layers": not ours_reads,
            "loaded_layers": len(host.quantized_layers(loaded.patcher)),
            "error": float((conditioning - before).norm() / before.norm()),
            "same_as_file": bool(torch.equal(conditioning, encode(loaded))),
            "incoming_unchanged": bool(torch.equal(encode(clip), before)),
            "incoming_layers": len(host.quantized_layers(clip.patcher)),
            "copied": copied != saved and copied.read_bytes() == saved.read_bytes(),
            "leftovers": [path.name for path in copied.parent.glob(".*")],
            "verified": verified,
            "same_file": file.read_bytes() == saved.read_bytes(),
            "saved": str(saved.relative_to(folder_paths.get_output_directory())),
        }
    return found


def taught_text_encoder(recipes) -> dict:
    """The same with our formats on ComfyUI's own layers."""
    host.add_layouts()
    return text_encoder(recipes)


WORDS = (
    ("a photo of a", "an oil painting of one", "many", "a sketch:", "close-up,", "the old", "no"),
    ("red", "deep blue", "golden", "pale green", "black and white"),
    ("apple", "owl", "castle", "bicycle", "wave", "dancer", "robot", "letter A", "fox", "train", "lamp"),
    ("by the sea", "at night", "in a crowded market", "under snow", "on a table", "from above"),
)
# Diverse prompts: a calibration with a few similar ones does not generalize.
PROMPTS = [" ".join(words[index % len(words)] for words in WORDS) for index in range(48)]


def calibrated_text_encoder() -> dict:
    """Calibrate a CLIP; compare its quantizations with and without the calibration on another prompt."""
    path = Path(folder) / "t5.safetensors"
    save_file(t5_weights(), path)
    clip = load(path)
    before = encode(clip)
    events = []
    options = {"keep": "compact", "tokens": 512, "seed": 0, "sensitivity": True, "on_event": events.append}
    calibration, summary = host.calibrate_clip(clip, PROMPTS, **options)
    with calibration.open() as known:
        layers = len(known.layers)
        sensitive = sum(value > 0 for value in known.sensitivities.values())

    def error(rounding, calibration=None):
        recipe = Recipe(
            format="int8_tensorwise", convrot=False, rounding=rounding, keep=(r"\.wo\.",)
        )  # 10,240 inputs take minutes
        made = encode(host.build_clip(clip, host.quantize(clip, recipe, lambda event: None, calibration)))
        return float((made - before).norm() / before.norm())

    return {
        "layers": layers,
        "summary": summary,
        "sensitive": sensitive,
        "advanced": [(event.unit, event.done, event.total) for event in events[:-1]],
        "finished": vars(events[-1]),
        "unchanged": bool(torch.equal(encode(clip), before)),
        "hooks": sum(len(module._forward_pre_hooks) for module in clip.cond_stage_model.modules()),
        "error": {
            "nearest": error("nearest"),
            "auto": error("auto", calibration),
        },
    }


def compared_text_encoders() -> dict:
    """Compare a CLIP with itself and with its quantization."""
    path = Path(folder) / "t5.safetensors"
    save_file(t5_weights(), path)
    clip = load(path)
    recipe = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest")
    ours = host.build_clip(clip, host.quantize(clip, recipe, lambda event: None))
    measured = host.compare_clips(clip, ours, ["a red apple on a table", "an owl"])
    before, after = encode(clip).double(), encode(ours).double()
    ratio = float(before.square().sum() / (after - before).square().sum())
    return {
        "prompts": len(measured.scores),
        "expected SNR": 10 * math.log10(ratio),
        "same": host.compare_clips(clip, clip, ["an owl"]).markdown().split("| ")[8].strip(" |"),
        **measured.scores[0],
    }


def decoding() -> dict:
    """Formats that this ComfyUI cannot run on decoding layers, with and without a LoRA, with full and low VRAM."""
    assets = Path(pack) / "assets"
    original = comfy.sd.load_diffusion_model(str(assets / "tiny_mmdit_emoji.safetensors"))
    lora = comfy.utils.load_torch_file(str(assets / "tiny_lora_red.safetensors"))
    generator = torch.Generator().manual_seed(0)
    device = comfy.model_management.get_torch_device()
    shapes = ((1, 16, 8, 8), (1, 16, 512), (1, 512))
    x, context, pooled = (torch.randn(shape, generator=generator).to(device) for shape in shapes)

    def run(model) -> torch.Tensor:
        return model.model.apply_model(x, torch.tensor([500.0], device=device), c_crossattn=context, y=pooled)

    def patched(model, **options) -> torch.Tensor:
        model.patch_model(device_to=device, **options)
        try:
            return run(model)
        finally:
            model.unpatch_model(device_to=torch.device("cpu"))

    def distance(a, b) -> float:
        return float((a - b).norm() / b.norm())

    with_lora = comfy.sd.load_lora_for_models(original, None, lora, 1.0, 0.0)[0]
    expected, expected_lora = patched(original), patched(with_lora)
    found = {}
    recipes = {name: {"format": name} for name in FORMATS if not host.supports_format(name)}
    recipes["asym_w4a8_int8 6 bits"] = {"format": "asym_w4a8_int8", "bits": 6}  # not expanded without add_layouts
    for name, recipe in recipes.items():
        quantized = host.quantize(
            original, Recipe(rounding="nearest", **{"convrot": None, **recipe}), lambda event: None
        )
        if "decoded as they run" not in host.describe_formats(quantized.files[""]):
            continue  # a newer comfy-kitchen has 6 bits
        model = host.build_model(original, quantized)
        before = patched(model)
        ours = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        whole, little = patched(ours), patched(ours, lowvram_model_memory=1)
        found[name] = {
            "error": distance(before, expected),
            "error with the LoRA": distance(whole, expected_lora),
            "the LoRA moves by": distance(expected_lora, expected),
            "little memory differs by": distance(little, whole),
            "unpatched": bool(torch.equal(patched(model), before)),
            "codes": {
                module.codec.format.name: module.weight.dtype is module.codec.format.storage_dtype
                for module in model.model.modules()
                if getattr(module, "is_quantized", False)
            },
            "decoded": host.describe_formats(quantized.files[""]),
            "kept in float32": all(
                value.dtype is torch.float32
                for key, value in model.model.named_parameters()
                if key.endswith("norm.weight")
            ),
        }
    return found


def nested_rotation() -> dict:
    """Error of the output of a rotated layer whose JSON has the rotation below ``params``."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(64, 64, generator=generator), torch.randn(8, 64, generator=generator)
    made = quantize_tensors(
        {"a.weight": weight}, Recipe(format="int8_tensorwise", convrot=64, rounding="nearest")
    ).tensors
    config = {"format": "int8_tensorwise", "per_row": True, "params": {"convrot": True, "convrot_groupsize": 64}}
    tensors = {name.removeprefix("a."): tensor for name, tensor in made.items()} | {
        "comfy_quant": config_tensor(config)
    }
    linear = host.decoding.make_quantized_linear("a", tensors, config)
    expected = inputs @ weight.T
    return {"error": float((linear(inputs) - expected).norm() / expected.norm())}


def document() -> dict:
    """Run the example in the folder with the file that it names."""
    file = Path(folder) / "by_hand.safetensors"
    with safe_open(file, "pt") as stored:
        layers = sum(name.endswith(".comfy_quant") for name in stored.keys())
    names = {"__name__": "example", "example_file": str(file), "example_layers": layers}
    exec(compile((Path(folder) / "example.py").read_text(), "example.py", "exec"), names)
    return {"layers": len(names["layers"])}


CHECKS = {
    "compared_text_encoders": compared_text_encoders,
    "decoding": decoding,
    "document": document,
    "nested_rotation": nested_rotation,
    "text_encoder": text_encoder,
    "taught_text_encoder": functools.partial(taught_text_encoder, OURS),
    "small_text_encoder": functools.partial(taught_text_encoder, BELOW_8_BITS),
    "calibrated_text_encoder": calibrated_text_encoder,
}
if check not in CHECKS:
    CHECKS = importlib.import_module(f"{check.partition('_')[0]}_checks").CHECKS
with torch.inference_mode():
    print("RESULT" + json.dumps(CHECKS[check]()))
