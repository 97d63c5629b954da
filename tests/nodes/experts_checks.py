"""Checks of in_process.py: banks of experts in a scaled-down GPT-OSS, quantized and read by ComfyUI's ``MoEExperts``."""

import functools
import json
import sys
from pathlib import Path

import comfy.ops
import comfy.sd
import comfy.utils
import torch
from layout_checks import distance
from pack.nodes import host
from pack.quant_core import Recipe
from pack.quant_core.convert.dequantize import DecodedSource
from pack.quant_core.sources import open_safetensors
from safetensors.torch import load_file, save_file
from saving_checks import replaced
from tokenizers import Tokenizer, models, pre_tokenizers

EXPERTS, HIDDEN, INNER, HEADS, HEAD, LAYERS = 4, 64, 80, 4, 16, 2
WORDS = ("a", "red", "apple", "on", "the", "table", "[UNK]")
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


def encode(clip) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize("a red apple on the table"), return_pooled=False)


def banks() -> dict:
    """Each recipe: the loaded experts against the decoded file, and the conditioning against that of the original."""
    path = Path(sys.argv[-1]) / "gpt_oss.safetensors"
    save_file(weights(), path)
    before, found = encode(load(path)), {}
    source = host.FileSource(path, "text_encoders", "lens")
    for name, options in RECIPES.items():
        recipe = Recipe(format=name.split()[0], rounding="nearest", **options)
        quantized = host.quantize(source, recipe, lambda event: None)
        (saved,) = host.save_files(quantized, "gpt_oss", "output")
        with replaced(comfy.sd, "load_clip", functools.partial(load_small, comfy.sd.load_clip)):
            verified = host.verify_saved(quantized, [saved])
        clip = load(saved)
        state, file = clip.cond_stage_model.state_dict(), load_file(saved)
        stock, tensors = clip.cond_stage_model.gpt_oss.transformer, {}
        with open_safetensors(saved) as opened:
            decoded = DecodedSource(opened)
            experts = [layer for layer in file if ".experts." in layer and layer.endswith("_proj.weight")]
            for layer in experts:
                bank = stock.get_submodule(layer.removesuffix(".weight"))
                whole = torch.stack([bank.expert_weight(expert).dequantize() for expert in range(EXPERTS)])
                tensors[layer] = [str(bank.quant_format), distance(whole.float(), decoded.read(layer).float())]
        found[name] = {
            "banks": tensors,
            "notes": sorted({made.note for made in quantized.report.layers if "bank" in made.note}),
            "verified": verified,
            "error": distance(encode(clip), before),
            "saved again": compare_saved(state, file),
        }
    return found


def compare_saved(state, file) -> list[str]:
    """Tensors of banks that ComfyUI would save otherwise than they are in the file; JSON without the keys that it leaves out."""
    different = []
    for name, tensor in file.items():
        if ".experts." not in name:
            continue
        again = state["gpt_oss.transformer." + name]
        if name.endswith(".comfy_quant"):
            written, read = (json.loads(value.numpy().tobytes()) for value in (tensor, again))
            same = all(written[key] == value for key, value in read.items() if key != "linear_dtype")
        else:
            same = (
                tensor.shape == again.shape and torch.equal(tensor.view(torch.uint8), again.view(torch.uint8))
                if tensor.dim()
                else False
            )
        if not same:
            different.append(name)
    return different


CHECKS = {"experts_banks": banks}
