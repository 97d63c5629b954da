"""Roles of layers: found by structure alone, in models of every family, and without effect where there is none."""

import re
from collections.abc import Mapping

import pytest

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.errors import NothingToQuantizeError
from learned_rounding.quant_core.recipes import make_plan, plan
from learned_rounding.quant_core.recipes.layers import parse_rules
from learned_rounding.quant_core.recipes.roles import find_roles
from learned_rounding.tests.architectures import architectures

CHECKPOINT = "model.diffusion_model."

# Models → the layers that have the role; as many as there are in the model.
MODULATIONS = {
    "ace_step": r"t_block\.1",
    "ernie_image": r"(adaLN_modulation\.1|final_norm\.linear)",
    "flux2": r"((double_stream_modulation_(img|txt)|single_stream_modulation)\.lin|final_layer\.adaLN_modulation\.1)",
    "joyimage": r"condition_embedder\.time_proj",
    "kandinsky6_pro": r"(out_layer|audio_outLayer)\.modulation\.out_layer",
    "krea2": r"tproj\.1",
    "ltx25": r"((audio_)?(prompt_)?|av_ca_(video_scale_shift|a2v_gate|audio_scale_shift)_)adaln_single\.linear",
    "pixart_sigma": r"t_block\.1",
    "prism": r"(video_dit|video_dit_2|audio_dit)\.time_projection\.1",
    "qwen_image_21": r"modulation\.1",
    "qwen_image_21_split": r"modulation\.1",
    "trellis2": r"(img2shape|img2shape_512|shape2txt|structure_model)\.adaLN_modulation\.1",
    "wan_22_5b": r"time_projection\.1",
}
ROUTERS = {
    "gpt_oss_20b": r"layers\.\d+\.mlp\.router",
    "hidream": r"(double|single)_stream_blocks\.\d+\.block\.ff_i\.gate",
    "hunyuan3d_2_1": r"blocks\.\d+\.moe\.gate",
}
# Model → layers that its preset alone, or the general rule, would quantize.
CHANGED = {
    "minimax_h3_pruned": r"blocks\.\d+\.adaln_proj\.linear",
    "qwen_image_21": r"modulation\.1",
    "qwen_image_21_split": r"modulation\.1",
    "triposplat": r"cam_refiner\.mlp\.0",
}


def hide(name: str, words: dict[str, str]) -> str:
    """The name with a number for each of its words, in the same structure."""
    parts = name.removesuffix(".weight").split(".")
    hidden = [part if part.isdecimal() else words.setdefault(part, f"module{len(words)}") for part in parts]
    return ".".join(hidden) + ".weight" * name.endswith(".weight")


def with_reason(roles: Mapping[str, str], start: str) -> set[str]:
    return {name.removesuffix(".weight") for name, reason in roles.items() if reason.startswith(start)}


def of_pattern(names: Mapping[str, object], pattern: str) -> set[str]:
    return {name.removesuffix(".weight") for name in names if re.fullmatch(rf"{pattern}\.weight", name)}


@pytest.mark.parametrize("name", MODULATIONS)
def test_modulations_of_all_blocks_are_found(layer_names, header_source, name):
    tensors = header_source(layer_names(name)).tensors
    assert with_reason(find_roles(tensors), "modulation") == of_pattern(tensors, MODULATIONS[name])


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_are_found_beside_their_experts(layer_names, header_source, name):
    tensors = header_source(layer_names(name)).tensors
    assert with_reason(find_roles(tensors), "router") == of_pattern(tensors, ROUTERS[name])


@pytest.mark.parametrize("name", sorted({*MODULATIONS, *ROUTERS, "minimax_h3_pruned"}))
def test_roles_do_not_depend_on_words(layer_names, header_source, name):
    names, words = layer_names(name), {}
    hidden = {hide(tensor, words): shape for tensor, shape in names.items()}
    assert len(hidden) == len(names)
    roles = find_roles(header_source(names).tensors)
    assert find_roles(header_source(hidden).tensors) == {hide(tensor, words): role for tensor, role in roles.items()}


@pytest.mark.parametrize("name", ["flux2", "hidream", "minimax_h3_pruned", "prism", "qwen_image_21"])
def test_roles_are_the_same_in_a_checkpoint(layer_names, header_source, name):
    alone = find_roles(header_source(layer_names(name)).tensors)
    encoder = layer_names("gpt_oss_20b", "text_encoders.gpt_oss.transformer.")
    whole = find_roles(header_source({**layer_names(name, CHECKPOINT), **encoder}).tensors)
    assert {tensor for tensor in whole if tensor.startswith(CHECKPOINT)} == {CHECKPOINT + tensor for tensor in alone}
    assert {tensor for tensor in whole if not tensor.startswith(CHECKPOINT)} == set(
        find_roles(header_source(encoder).tensors)
    )


@pytest.mark.parametrize("name", architectures())
def test_roles_change_no_plan_but_those(layer_names, header_source, monkeypatch, name):
    source = header_source(layer_names(name))

    def quantized() -> set[str]:
        try:
            return {layer.removesuffix(".weight") for layer in make_plan(source).names("quantize")}
        except NothingToQuantizeError:
            return set()

    now = quantized()
    monkeypatch.setattr(plan, "find_roles", lambda tensors: {})
    before = quantized()
    assert now <= before
    pattern = CHANGED.get(name, r"(?!)")
    assert before - now == {layer for layer in before if re.fullmatch(pattern, layer)}
    assert bool(before - now) is (name in CHANGED)


MODEL = {f"blocks.{block}.{layer}.weight": (512, 512) for block in range(4) for layer in ("q", "k", "v", "o")}


def moe(name: str, experts: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A model with a router of that name beside experts in each block."""
    beside = {f"blocks.{block}.{expert}": shape for block in range(4) for expert, shape in experts.items()}
    return MODEL | beside | {f"blocks.{block}.{name}.weight": (128, 512) for block in range(4)}


LISTED = {
    f"moe.experts.{expert}.{layer}.weight": shape
    for expert in range(128)
    for layer, shape in {"w1": (1024, 512), "w2": (512, 1024), "w3": (1024, 512)}.items()
}


@pytest.mark.parametrize(
    "experts",
    [
        LISTED,
        {"moe.experts.gate_up_proj": (128, 512, 2048), "moe.experts.down_proj": (128, 1024, 512)},
        {"moe.experts.up.weight": (128, 1024, 512), "moe.experts.down.weight": (128, 512, 1024)},
        {"moe.up.weight": (128, 1024, 512), "moe.down.weight": (128, 512, 1024)},
    ],
    ids=["listed", "tensors", "modules", "beside"],
)
@pytest.mark.parametrize("name", ["moe.selector", "moe.chooser.linear"])
def test_a_router_has_as_many_outputs_as_experts(header_source, experts, name, sentences):
    made = make_plan(header_source(moe(name, experts)))
    decision = made.decisions[f"blocks.0.{name}.weight"]
    assert decision.action == "keep"
    assert made.decisions["blocks.0.q.weight"].action == "quantize"
    sentences(decision.reason)


# Blocks of the text encoder of Ming-Image, which no preset knows: layer → shape.
MING = {
    "attention.query_key_value": (3072, 2048),
    "attention.dense": (2048, 2048),
    "mlp.gate.proj": (256, 2048),
    "mlp.image_gate.proj": (256, 2048),
    "mlp.experts.gate_up_proj": (256, 1024, 2048),
    "mlp.experts.down_proj": (256, 2048, 512),
    "mlp.shared_experts.gate_proj": (512, 2048),
    "mlp.shared_experts.down_proj": (2048, 512),
}


def test_two_routers_of_a_model_without_a_preset_are_found(header_source):
    names = {f"thinker.layers.{block}.{layer}.weight": shape for block in range(1, 20) for layer, shape in MING.items()}
    made = make_plan(header_source(names), preset="none")
    kept = {name.split(".", 3)[3] for name in made.names("keep")}
    assert kept == {
        f"mlp.{layer}.weight" for layer in ("gate.proj", "image_gate.proj", "experts.gate_up_proj", "experts.down_proj")
    }


@pytest.mark.parametrize(
    "experts",
    [
        {},
        {f"moe.experts.{expert}.w1.weight": (1024, 512) for expert in range(127)},
        {"moe.conv.weight": (128, 512, 3)},
        {"moe.experts.up": (64, 1024, 512)},
        {"moe.experts.up": (128, 1024, 768)},
        {f"moe.layers.{layer}.{part}.weight": (512, 512) for layer in range(128) for part in "qkvo"},
    ],
    ids=["none", "one fewer", "convolution", "half", "width", "blocks"],
)
def test_a_layer_without_experts_is_no_router(header_source, experts):
    made = make_plan(header_source(moe("moe.selector", experts)), preset="none")
    reason = (
        make_plan(header_source(moe("moe.selector", {})), preset="none")
        .decisions["blocks.0.moe.selector.weight"]
        .reason
    )
    assert made.decisions["blocks.0.moe.selector.weight"].reason == reason
    assert not find_roles(header_source(moe("moe.selector", experts)).tensors)


@pytest.mark.parametrize(
    "shapes, found",
    [
        ({"steer.1": (2048, 512)}, True),
        ({"steer": (2048, 512)}, True),
        ({"embed.0": (256, 128), "embed.2": (256, 256), "steer.1": (3072, 256)}, True),
        ({"steer.1": (2048, 768)}, False),  # reads what no layer writes: another model's output
        ({"steer.1": (512, 512)}, False),  # as wide as the blocks
        ({"steer.1": (2000, 512)}, False),
        ({"steer.0": (2048, 512), "steer.2": (512, 2048)}, False),  # an MLP
        ({"steer.qkv": (1536, 512), "steer.proj": (512, 512)}, False),  # an attention
        ({"steer.0.sub": (2048, 512)}, False),  # in a list
        ({"head": (512 * 64, 512)}, False),  # a vocabulary
    ],
)
def test_a_modulation_is_one_layer_of_several_widths_outside_the_blocks(header_source, shapes, found):
    names = {f"{name}.weight": shape for name, shape in shapes.items()}
    roles = find_roles(header_source(MODEL | names).tensors)
    assert roles.keys() == ({f"{list(shapes)[-1]}.weight"} if found else set())


@pytest.mark.parametrize(
    "shape, narrow",
    [((96768, 8), True), ((4096, 63), True), ((4096, 64), False), ((32, 4096), True), ((63, 1024), True), ((63, 1000), False), ((1, 33), False)],
)  # fmt: skip
def test_layers_of_few_inputs_or_outputs_are_kept(header_source, shape, narrow, sentences):
    names = {f"blocks.{block}.layer.weight": shape for block in range(4)}
    made = make_plan(header_source(MODEL | names), preset="none")
    assert {made.decisions[name].action for name in names} == {"keep" if narrow else "quantize"}
    sentences(made.decisions["blocks.0.layer.weight"].reason)


@pytest.mark.parametrize("name, layer", [("qwen_image_21", "modulation.1"), ("minimax_h3_pruned", "adaln_proj")])
def test_rules_of_the_user_override_roles(layer_names, header_source, name, layer, sentences):
    source = header_source(layer_names(name))
    before = Recipe().plan(source)
    after = make_plan(source, rules=parse_rules((), f'{{"{layer}": "int8"}}'))
    more = set(after.names("quantize")) - set(before.names("quantize"))
    assert more == {tensor for tensor in source.tensors if layer in tensor and tensor.endswith("weight")} - {
        tensor for tensor in before.names("keep") if after.decisions[tensor].action == "keep"
    }
    assert len(more) == (1 if layer == "modulation.1" else 51)
    sentences(before.explanation, *sorted({before.decisions[tensor].reason for tensor in more}))


def test_names_of_many_parts_have_no_role(header_source):
    """Each part could be a list: the work would grow with the square of the length."""
    deep = {f"{'0.' * 20}{index}.weight": (4, 4096) for index in range(4)}
    assert find_roles(header_source(deep).tensors) == {}
    assert find_roles({}) == {}
