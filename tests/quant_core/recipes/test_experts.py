"""Banks of experts in the plan: those that ComfyUI reads quantized, their formats, and those that it does not read."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS, Recipe
from learned_rounding.quant_core.recipes.eight_bits import BANK_EIGHT_BITS
from learned_rounding.quant_core.recipes.experts import find_banks
from learned_rounding.quant_core.sources import TensorInfo, TensorSource

BANKS = ("mlp.experts.gate_up_proj.weight", "mlp.experts.down_proj.weight")
MIDDLE = [f"layers.2.{bank}" for bank in BANKS]
CHECKPOINT = "text_encoders.gpt_oss.transformer."


@pytest.mark.parametrize("prefix", ["", "model.", CHECKPOINT])
def test_banks_are_those_of_gpt_oss(gpt_oss, prefix):
    tensors = TensorSource({prefix + name: tensor for name, tensor in gpt_oss(2).items()}).tensors
    found = find_banks(tensors)
    assert set(found) == {f"{prefix}layers.{block}.{bank}" for block in range(2) for bank in BANKS}
    assert found[f"{prefix}layers.1.{BANKS[0]}"] == TensorInfo(torch.bfloat16, (144, 64))
    without = {name: info for name, info in tensors.items() if not name.endswith("layers.0.self_attn.sinks")}
    assert not find_banks(without)


@pytest.mark.parametrize("format", [*FORMATS, "int8", "w6a8"])
def test_each_format_takes_banks_or_leaves_them_to_int8(gpt_oss, format, sentences):
    plan = Recipe(format=format).plan(TensorSource(gpt_oss(6)))
    reasons = {plan.decisions[name].reason for name in MIDDLE} - {""}
    for name in MIDDLE:
        decision = plan.decisions[name]
        assert decision.action == "quantize"
        assert decision.format == (BANK_EIGHT_BITS if decision.fallback else None)
    assert plan.decisions["layers.2.mlp.router.weight"].action == "keep"
    if reasons:
        sentences(sorted(reasons))


def test_banks_of_the_first_and_last_block_take_eight_bits_where_others_take_four(gpt_oss):
    decisions = Recipe(format="nvfp4").plan(TensorSource(gpt_oss(6))).decisions
    ends = {name for name, decision in decisions.items() if decision.fallback and "experts" in name}
    assert ends == {f"layers.{block}.{bank}" for block in (0, 5) for bank in BANKS}
    assert all(decisions[name].format == BANK_EIGHT_BITS for name in ends)


def test_layer_rules_decide_over_banks(gpt_oss):
    config = '{"down_proj": "skip", "gate_up_proj": {"format": "int8", "convrot": true}}'
    decisions = Recipe(format="fp8", layer_config=config).plan(TensorSource(gpt_oss(6))).decisions
    gate_up, down = (decisions[name] for name in MIDDLE)
    assert down.action == "keep" and gate_up.format == BANK_EIGHT_BITS and gate_up.fallback


def test_mixed_precision_takes_eight_bits_for_banks(gpt_oss, sentences):
    decisions = Recipe(format="measured").plan(TensorSource(gpt_oss(6))).decisions
    assert {decisions[name].format for name in MIDDLE} == {BANK_EIGHT_BITS}
    sentences(decisions[MIDDLE[0]].reason)


@pytest.mark.parametrize(
    "name",
    ["blocks.0.mlp.experts.up.weight", "model.layers.0.mlp.experts.gate_up_proj", "blocks.0.moe.w1_experts.weight"],
)
def test_other_banks_stay_and_the_plan_says_why(header_source, name, sentences):
    tensors = {name: (8, 128, 64), "blocks.0.proj.weight": (128, 128), "conv.weight": (64, 64, 3)}
    decisions = Recipe(preset="none").plan(header_source(tensors)).decisions
    assert decisions[name].action == "keep"
    sentences([decisions[name].reason, decisions["conv.weight"].reason])
