"""Banks of experts (GPT-OSS) in ComfyUI: what this pack writes is what ComfyUI's ``MoEExperts`` computes with."""

import dataclasses
import functools
import json
import random
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_weight
from learned_rounding.quant_core.formats import detect_layers
from learned_rounding.quant_core.formats.layer_json import config_tensor
from learned_rounding.quant_core.sources import TensorSource
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    import comfy.ops
    import comfy.sd
    from comfy.quant_ops import QuantizedTensor
    from tokenizers import Tokenizer, models, pre_tokenizers

    from learned_rounding.nodes import host as pack
    from learned_rounding.tests.nodes.host.tiny_model import distance

pytestmark = pytest.mark.usefixtures("in_comfyui", "_has_banks")

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


# Format → largest relative error of the output of a bank with unquantized activations, of random weights.
WEIGHTS = {
    "float8_e4m3fn": 0.03,
    "float8_e5m2": 0.06,
    "int8_tensorwise": 0.015,
    "mxfp8": 0.03,
    "nvfp4": 0.1,
    "convrot_w4a4": 0.15,
}
# Recipe → its options, format of the banks, and largest relative error of the conditioning.
BANKS = {
    "float8_e4m3fn": ({}, "float8_e4m3fn", 0.15),
    "float8_e5m2": ({}, "float8_e5m2", 0.3),
    "int8_tensorwise": ({}, "int8_tensorwise", 0.06),
    "int8_tensorwise per tensor": ({"granularity": "tensor"}, "int8_tensorwise", 0.12),
    "int8_tensorwise rotated": ({"convrot": True}, "int8_tensorwise", 0.06),
    "mxfp8": ({}, "mxfp8", 0.2),
    "nvfp4": ({}, "nvfp4", 0.6),
    "convrot_w4a4": ({}, "convrot_w4a4", 0.8),
    "asym_w4a8_int8": ({}, "int8_tensorwise", 0.4),
}


@pytest.fixture
def _has_banks(host):
    if "class MoEExperts" not in (host.path / "comfy" / "ops.py").read_text():
        pytest.skip("this ComfyUI has no banks of experts")


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


def compute_bank(bank, original: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The weights that ComfyUI computes with, in float32, and the error of its output against the original."""
    x = torch.randn(8, original.shape[2], generator=torch.Generator().manual_seed(1)).to(bank.weight.dtype)
    whole, outputs, expected = [], [], []
    for expert in range(EXPERTS):
        weight = bank.expert_weight(expert)
        exact = dataclasses.replace(weight._params, orig_dtype=torch.float32)
        whole.append(QuantizedTensor(weight._qdata, weight._layout_cls, exact).dequantize())
        outputs.append(bank.expert_linear(x, expert) - bank.bias[expert])
        expected.append(x.float() @ original[expert].float().t())
    return torch.stack(whole), distance(torch.stack(outputs), torch.stack(expected))


def compare_saved(state, file) -> list[str]:
    """Tensors of banks that ComfyUI would save otherwise than they are in the file; its JSON lacks keys that it does not read."""
    different = []
    for name, tensor in file.items():
        again = state[f"gpt_oss.transformer.{name}"].cpu() if ".experts." in name else tensor
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


@pytest.mark.parametrize("recipe", BANKS)
def test_comfyui_computes_with_the_banks_that_are_in_the_file(tmp_path, recipe, sentences, subtests):
    path, original = tmp_path / "gpt_oss.safetensors", weights()
    save_file(original, path)
    options, format, bound = BANKS[recipe]
    given = {"format": recipe.split()[0], **options}
    rules = json.dumps({"_proj": given})  # the first and the last block too
    quantized = pack.quantize(
        pack.FileSource(path, "text_encoders", "lens"),
        Recipe(rounding="nearest", layer_config=rules, **{"convrot": None, **given}),
        lambda event: None,
    )
    (saved,) = pack.save_files(quantized, "gpt_oss", "output")
    clip, file = load(saved), load_file(saved)
    model = clip.cond_stage_model.gpt_oss.transformer
    banks = [layer for layer in detect_layers(TensorSource(file)) if layer.is_bank]
    assert len(banks) == 4
    for layer in banks:
        with subtests.test(layer.name):
            parts = {suffix: file[tensor] for suffix, tensor in layer.parts.items()}
            decoded = layer.dequantize(parts.pop("weight"), parts)
            bank = model.get_submodule(layer.name)
            computed, error = compute_bank(bank, original[f"{layer.name}.weight"])
            # 80 input channels are not a multiple of 64
            fallback = format == "convrot_w4a4" and "down" in layer.name
            assert bank.quant_format == ("int8_tensorwise" if fallback else format)
            assert distance(computed, decoded) < 1e-6
            assert error < WEIGHTS[bank.quant_format]
    assert 0 < distance(encode(clip), encode(load(path))) < bound
    assert compare_saved(clip.cond_stage_model.state_dict(), file) == []
    notes = sorted({layer.note for layer in quantized.report.layers if "bank" in layer.note})
    with patch.object(comfy.sd, "load_clip", functools.partial(load_small, comfy.sd.load_clip)):
        sentences([*notes, pack.verify_saved(quantized, [saved])])


def load_bank(weight: torch.Tensor, format: str):
    """A rotated bank in ComfyUI, which this pack does not write."""
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)
    made = [quantize_weight(matrix, format, rounding="nearest", convrot=64) for matrix in weight]
    names = [name for name in made[0].tensors("a") if not name.endswith("comfy_quant")]
    state = {name: torch.stack([one.tensors("a")[name] for one in made]) for name in names}
    state["a.comfy_quant"] = config_tensor({**made[0].config, "num_experts": EXPERTS})
    bank = operations.MoEExperts(EXPERTS, HIDDEN, HIDDEN, bias=False)
    bank._load_from_state_dict(state, "a.", {}, True, [], [], [])
    return bank


def test_comfyui_loses_what_these_banks_need():
    """Why they are not written; a release that reads them fails here."""
    weight = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))
    rotated = load_bank(weight, "int8_tensorwise").expert_weight(0).dequantize()
    assert distance(rotated, weight[0]) > 0.5
    with pytest.raises(ValueError):
        load_bank(weight, "asym_w4a8_int8").expert_weight(0).dequantize()


def test_experts_are_calibrated_with_the_tokens_that_reach_them(tmp_path, sentences):
    """Quantized with and without the calibration; errors on another prompt."""
    path = tmp_path / "gpt_oss.safetensors"
    save_file(weights(), path)
    clip, draw = load(path), random.Random(0)
    *prompts, other = (" ".join(draw.choices(WORDS, k=60)) for _ in range(33))
    before = encode(clip, other)
    options = {"keep": "full", "tokens": 512, "seed": 0, "sensitivity": True, "on_event": lambda event: None}
    calibration, _ = pack.calibrate_clip(clip, prompts, **options)
    shapes = {"gate_up_proj": (160, 64), "down_proj": (64, 80)}
    banks = {f"layers.{block}.mlp.experts.{name}": shape for block in range(2) for name, shape in shapes.items()}
    with calibration.open() as known:
        assert len(known.layers) == 12
        assert {name: tuple(known.layers[name]) for name in banks} == banks
        assert len(known.sensitivities) == 8
        assert not banks.keys() & set(known.sensitivities)
    assert torch.equal(encode(clip, other), before)
    assert [module for module in clip.cond_stage_model.modules() if "expert_linear" in vars(module)] == []

    def quantize(rounding: str, known=None) -> tuple[float, list[str]]:
        """The error, and the notes of the banks."""
        recipe = Recipe(format="nvfp4", rounding=rounding, layer_config=json.dumps({"_proj": "nvfp4"}))
        quantized = pack.quantize(clip, recipe, lambda event: None, known)
        made = encode(pack.build_clip(clip, quantized), other)
        (saved,) = pack.save_files(quantized, "calibrated", "output")
        assert torch.equal(made, encode(load(saved), other))
        return distance(made, before), sorted({layer.note for layer in quantized.report.layers if "bank" in layer.note})

    calibrated, notes = quantize("calibrated", calibration)
    assert calibrated < 0.8 * quantize("nearest")[0]
    sentences(notes)
