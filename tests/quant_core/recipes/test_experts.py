"""Banks of experts in the plan: those that ComfyUI reads quantized, their formats, and those that it does not read."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS, Recipe
from learned_rounding.quant_core.recipes.eight_bits import BANK_EIGHT_BITS
from learned_rounding.quant_core.recipes.experts import find_banks
from learned_rounding.quant_core.sources import TensorInfo, TensorSource
from learned_rounding.tests.architectures import architectures, read
from learned_rounding.tests.architectures.table import examine

BANKS = ("mlp.experts.gate_up_proj.weight", "mlp.experts.down_proj.weight")
MIDDLE = [f"layers.2.{bank}" for bank in BANKS]
CHECKPOINT = "text_encoders.gpt_oss.transformer."


def test_banks_are_those_of_gpt_oss(subtests, gpt_oss):
    for prefix in ["", "model.", CHECKPOINT]:
        with subtests.test(prefix=prefix):
            tensors = TensorSource({prefix + name: tensor for name, tensor in gpt_oss(2).items()}).tensors
            assert set(find_banks(tensors)) == {
                f"{prefix}layers.{block}.{bank}" for block in range(2) for bank in BANKS
            }


def test_a_bank_has_the_shape_of_one_expert(gpt_oss):
    found = find_banks(TensorSource(gpt_oss(2)).tensors)
    assert found[f"layers.1.{BANKS[0]}"] == TensorInfo(torch.bfloat16, (144, 64))


def test_models_without_attention_sinks_have_no_banks(gpt_oss):
    tensors = TensorSource(gpt_oss(2)).tensors
    assert not find_banks({name: info for name, info in tensors.items() if name != "layers.0.self_attn.sinks"})


@pytest.mark.soak
def test_banks_of_all_models_are_quantized_where_comfyui_reads_them(subtests):
    """Its class ``MoEExperts``, of which the lists have the kind; other tensors of three sides stay."""
    with_three_sides = [name for name in architectures() if any(len(entry.shape) == 3 for entry in read(name).values())]
    for name in with_three_sides:
        with subtests.test(name):
            banks = {
                layer for layer, entry in read(name).items() if entry.kind == "experts" and layer.endswith(".weight")
            }
            assert {layer for layer, shape in examine(name).quantized.items() if len(shape) == 3} == banks


def test_each_format_takes_banks_or_leaves_them_to_int8(subtests, gpt_oss, sentences):
    source = TensorSource(gpt_oss(6))
    for format in (*FORMATS, "int8", "w6a8"):
        with subtests.test(format):
            decisions = [Recipe(format=format).plan(source).decisions[name] for name in MIDDLE]
            assert {decision.action for decision in decisions} == {"quantize"}
            assert all(decision.format == (BANK_EIGHT_BITS if decision.fallback else None) for decision in decisions)
            if reasons := {decision.reason for decision in decisions} - {""}:
                sentences(sorted(reasons))


def test_routers_of_experts_are_kept(gpt_oss):
    plan = Recipe(format="int8").plan(TensorSource(gpt_oss(6)))
    assert plan.decisions["layers.2.mlp.router.weight"].action == "keep"


def test_banks_of_the_first_and_last_block_take_eight_bits_where_others_take_four(gpt_oss):
    decisions = Recipe(format="nvfp4").plan(TensorSource(gpt_oss(6))).decisions
    ends = {name for name, decision in decisions.items() if decision.fallback and "experts" in name}
    assert ends == {f"layers.{block}.{bank}" for block in (0, 5) for bank in BANKS}
    assert all(decisions[name].format == BANK_EIGHT_BITS for name in ends)


@pytest.fixture
def with_rules(gpt_oss):
    """Decisions on (gate_up_proj, down_proj)."""
    config = '{"down_proj": "skip", "gate_up_proj": {"format": "int8", "convrot": true}}'
    decisions = Recipe(format="fp8", layer_config=config).plan(TensorSource(gpt_oss(6))).decisions
    return tuple(decisions[name] for name in MIDDLE)


def test_a_layer_rule_keeps_a_bank(with_rules):
    assert with_rules[1].action == "keep"


def test_a_layer_rule_for_rotated_banks_takes_int8_without_rotation(with_rules):
    assert with_rules[0].fallback
    assert with_rules[0].format == BANK_EIGHT_BITS


def test_mixed_precision_takes_eight_bits_for_banks(gpt_oss, sentences):
    decisions = Recipe(format="measured").plan(TensorSource(gpt_oss(6))).decisions
    assert {decisions[name].format for name in MIDDLE} == {BANK_EIGHT_BITS}
    sentences(decisions[MIDDLE[0]].reason)


def test_other_banks_stay_and_the_plan_says_why(subtests, header_source, sentences):
    for name in [
        "blocks.0.mlp.experts.up.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "blocks.0.moe.w1_experts.weight",
    ]:
        with subtests.test(name=name):
            tensors = {name: (8, 128, 64), "blocks.0.proj.weight": (128, 128), "conv.weight": (64, 64, 3)}
            decisions = Recipe(preset="none").plan(header_source(tensors)).decisions
            assert decisions[name].action == "keep"
            sentences([decisions[name].reason, decisions["conv.weight"].reason])
