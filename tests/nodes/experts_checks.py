"""Checks of in_process.py: banks of experts in a scaled-down GPT-OSS, quantized and read by ComfyUI's ``MoEExperts``."""

import dataclasses
import functools
import json
import random
import sys
from pathlib import Path

import comfy.ops
import comfy.sd
import torch
from comfy.quant_ops import QuantizedTensor
from layout_checks import distance
from pack.nodes import host
from pack.quant_core import Recipe, quantize_weight
from pack.quant_core.formats import detect_layers
from pack.quant_core.formats.layer_json import config_tensor
from pack.quant_core.sources import TensorSource
from safetensors.torch import load_file, save_file
from saving_checks import replaced
from tokenizers import Tokenizer, models, pre_tokenizers

EXPERTS, HIDDEN, INNER, HEADS, HEAD, LAYERS = 4, 64, 80, 4, 16, 2
WORDS = ("[UNK]", *(f"word{index}" for index in range(60)))
SMALL = {
    "gpt_oss_config": {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
    },
    "selected_layers": (0, 1),
    "txt_offset": 0,
}
RECIPES = {
    "float8_e4m3fn": {},
    "float8_e5m2": {},
    "int8_tensorwise": {},
    "int8_tensorwise per tensor": {"granularity": "tensor"},
    "int8_tensorwise rotated": {"convrot": True},
    "mxfp8": {},
    "nvfp4": {},
    "convrot_w4a4": {},
    "asym_w4a8_int8": {},
}


def weights() -> dict[str, torch.Tensor]:
    """Random GPT-OSS of width 64 in bfloat16, with a tokenizer of a few words."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = torch.tensor(list(tokenizer.to_str().encode()), dtype=torch.uint8)
    tensors = {"tokenizer_json": text, "embed_tokens.weight": normal(64, HIDDEN), "norm.weight": normal(HIDDEN)}
    for index in range(LAYERS):
        layer = f"layers.{index}"
        for name, shape in {
            **{f"{part}_proj": (HEADS * HEAD, HIDDEN) for part in "qkv"},
            "o_proj": (HIDDEN, HEADS * HEAD),
        }.items():
            tensors[f"{layer}.self_attn.{name}.weight"] = normal(*shape)
            tensors[f"{layer}.self_attn.{name}.bias"] = normal(shape[0])
        tensors[f"{layer}.self_attn.sinks"] = normal(HEADS)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        tensors[f"{layer}.mlp.router.weight"] = normal(EXPERTS, HIDDEN)
        tensors[f"{layer}.mlp.router.bias"] = normal(EXPERTS)
        for name, shape in {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items():
            tensors[f"{layer}.mlp.experts.{name}.weight"] = normal(EXPERTS, *shape)
            tensors[f"{layer}.mlp.experts.{name}.bias"] = normal(EXPERTS, shape[0])
    return tensors


def load(path):
    return comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.LENS, model_options=SMALL)


def load_small(load_clip, *paths, model_options=None, **options):
    """ComfyUI's own loader with the small sizes, which it does not detect in the file."""
    return load_clip(*paths, model_options={**SMALL, **(model_options or {})}, **options)


def encode(clip, prompt: str = "word1 word2 word3") -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=False)


def inspect_bank(bank, name: str, decoded: torch.Tensor, original: torch.Tensor) -> dict:
    """What ComfyUI makes of a bank, against our reading of the file, and against the original."""
    x = torch.randn(8, original.shape[2], generator=torch.Generator().manual_seed(1)).to(bank.weight.dtype)
    whole, outputs, expected = [], [], []
    for expert in range(EXPERTS):
        weight = bank.expert_weight(expert)
        exact = dataclasses.replace(weight._params, orig_dtype=torch.float32)
        whole.append(QuantizedTensor(weight._qdata, weight._layout_cls, exact).dequantize())
        outputs.append(bank.expert_linear(x, expert) - bank.bias[expert])
        expected.append(x.float() @ original[expert].float().t())
    return {
        "format": bank.quant_format,
        "weights": distance(torch.stack(whole), decoded),
        "output": distance(torch.stack(outputs), torch.stack(expected)),
    }


def compare_saved(state, file) -> list[str]:
    """Tensors of banks that ComfyUI would save otherwise than they are in the file; its JSON lacks keys that it does not read."""
    different = []
    for name, tensor in file.items():
        again = state[f"gpt_oss.transformer.{name}"] if ".experts." in name else tensor
        if name.endswith(".comfy_quant"):
            written, read = (json.loads(value.numpy().tobytes()) for value in (tensor, again))
            same = read.items() <= written.items() and read.get("num_experts") == written.get("num_experts")
        elif name.endswith(".bias"):
            same = torch.equal(again, tensor.to(again.dtype))
        else:
            same = tensor.shape == again.shape and torch.equal(
                *(each.reshape(-1).view(torch.uint8) for each in (tensor, again))
            )
        if not same:
            different.append(name)
    return different


def banks() -> dict:
    """Each recipe: the banks as ComfyUI loads them, its conditioning, and what it would save."""
    path = Path(sys.argv[-1]) / "gpt_oss.safetensors"
    original = weights()
    save_file(original, path)
    before, found = encode(load(path)), {}
    source = host.FileSource(path, "text_encoders", "lens")
    for name, options in RECIPES.items():
        format = name.split()[0]
        rules = json.dumps({"_proj": {"format": format, **options}})  # the first and the last block too
        recipe = Recipe(format=format, rounding="nearest", layer_config=rules, **{"convrot": None, **options})
        quantized = host.quantize(source, recipe, lambda event: None)
        (saved,) = host.save_files(quantized, "gpt_oss", "output")
        with replaced(comfy.sd, "load_clip", functools.partial(load_small, comfy.sd.load_clip)):
            verified = host.verify_saved(quantized, [saved])
        clip, file = load(saved), load_file(saved)
        model = clip.cond_stage_model.gpt_oss.transformer
        layers = {layer.name: layer for layer in detect_layers(TensorSource(file)) if layer.is_bank}
        found[name] = {
            "banks": {},
            "notes": sorted({made.note for made in quantized.report.layers if "bank" in made.note}),
            "verified": verified,
            "error": distance(encode(clip), before),
            "saved otherwise": compare_saved(clip.cond_stage_model.state_dict(), file),
        }
        for layer, stored in layers.items():
            parts = {suffix: file[tensor] for suffix, tensor in stored.parts.items()}
            decoded = stored.dequantize(parts.pop("weight"), parts)
            bank = model.get_submodule(layer)
            found[name]["banks"][layer] = inspect_bank(bank, layer, decoded, original[f"{layer}.weight"])
    return found


def unread() -> dict:
    """What ComfyUI makes of banks that this pack does not write: a rotated one, and one of asym_w4a8_int8."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator)
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)

    def load_bank(format: str, **options):
        made = [quantize_weight(matrix, format, rounding="nearest", convrot=64, **options) for matrix in weight]
        state = {
            name: torch.stack([one.tensors("a")[name] for one in made])
            for name in made[0].tensors("a")
            if not name.endswith("comfy_quant")
        }
        state["a.comfy_quant"] = config_tensor({**made[0].config, "num_experts": EXPERTS})
        bank = operations.MoEExperts(EXPERTS, HIDDEN, HIDDEN, bias=False)
        bank._load_from_state_dict(state, "a.", {}, True, [], [], [])
        return bank

    rotated = load_bank("int8_tensorwise").expert_weight(0).dequantize()
    try:
        asym = distance(load_bank("asym_w4a8_int8").expert_weight(0).dequantize(), weight[0])
    except Exception as error:
        asym = f"{type(error).__name__}: {error}"
    return {"rotated": distance(rotated, weight[0]), "asym": asym}


def calibrated() -> dict:
    """Calibrate the encoder, and quantize it with and without the calibration; errors on another prompt."""
    path = Path(sys.argv[-1]) / "gpt_oss.safetensors"
    save_file(weights(), path)
    clip, draw = load(path), random.Random(0)
    prompts = [" ".join(draw.choices(WORDS, k=60)) for _ in range(33)]
    before = encode(clip, prompts[-1])
    options = {"keep": "full", "tokens": 512, "seed": 0, "sensitivity": True, "on_event": lambda event: None}
    calibration, summary = host.calibrate_clip(clip, prompts[:-1], **options)
    with calibration.open() as known:
        layers = {name: list(shape) for name, shape in known.layers.items()}
        sensitive = sorted(known.sensitivities)
    rules = json.dumps({"_proj": "nvfp4"})

    def error(rounding: str, known=None) -> tuple[float, list[str]]:
        recipe = Recipe(format="nvfp4", rounding=rounding, layer_config=rules)
        quantized = host.quantize(clip, recipe, lambda event: None, known)
        made = encode(host.build_clip(clip, quantized), prompts[-1])
        (saved,) = host.save_files(quantized, "calibrated", "output")
        assert torch.equal(made, encode(load(saved), prompts[-1]))
        return distance(made, before), sorted({layer.note for layer in quantized.report.layers if "bank" in layer.note})

    return {
        "layers": layers,
        "sensitive": sensitive,
        "summary": summary,
        "hidden": sum("expert_linear" in vars(module) for module in clip.cond_stage_model.modules()),
        "unchanged": bool(torch.equal(encode(clip, prompts[-1]), before)),
        "nearest": error("nearest"),
        "calibrated": error("calibrated", calibration),
    }


CHECKS = {"experts_banks": banks, "experts_calibrated": calibrated, "experts_unread": unread}
