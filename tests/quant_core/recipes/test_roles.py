"""Roles of layers: found by structure alone, in models of every family, and without effect where there is none."""

import re
from collections.abc import Mapping

from learned_rounding.quant_core.recipes import make_plan
from learned_rounding.quant_core.recipes.layers import parse_rules
from learned_rounding.quant_core.recipes.roles import OUTSIDE, find_roles, find_sensitive
from learned_rounding.tests.architectures import architectures
from learned_rounding.tests.architectures.table import examine
from learned_rounding.tests.architectures.table import source as header

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
    "minimax_h3_pruned": r"blocks\.\d+\.adaln_proj\.linear\.weight",
    "qwen_image_21": r"modulation\.1\.weight",
    "qwen_image_21_split": r"modulation\.1\.weight",
    "triposplat": r"cam_refiner\.mlp\.0\.weight",
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


def test_modulations_of_all_blocks_are_found(subtests):
    for name, pattern in MODULATIONS.items():
        with subtests.test(name):
            tensors = header(name).tensors
            assert with_reason(find_roles(tensors), "modulation") == of_pattern(tensors, pattern)


def test_routers_are_found_beside_their_experts(subtests):
    for name, pattern in ROUTERS.items():
        with subtests.test(name):
            tensors = header(name).tensors
            assert with_reason(find_roles(tensors), "router") == of_pattern(tensors, pattern)


def test_roles_do_not_depend_on_words(subtests, layer_names, header_source):
    for name in sorted({*MODULATIONS, *ROUTERS, "minimax_h3_pruned"}):
        with subtests.test(name):
            names, words = layer_names(name), {}
            hidden = {hide(tensor, words): shape for tensor, shape in names.items()}
            assert len(hidden) == len(names)
            roles = find_roles(header_source(names).tensors)
            expected = {hide(tensor, words): role for tensor, role in roles.items()}
            assert find_roles(header_source(hidden).tensors) == expected


def test_roles_are_the_same_in_a_checkpoint(subtests, layer_names, header_source):
    encoder = layer_names("gpt_oss_20b", "text_encoders.gpt_oss.transformer.")
    in_encoder = set(find_roles(header_source(encoder).tensors))
    for name in ("flux2", "hidream", "minimax_h3_pruned", "prism", "qwen_image_21"):
        with subtests.test(name):
            alone = find_roles(header(name).tensors)
            whole = find_roles(header_source({**layer_names(name, CHECKPOINT), **encoder}).tensors)
            assert set(whole) == {CHECKPOINT + tensor for tensor in alone} | in_encoder


def test_roles_change_no_plan_but_those(subtests):
    """A role decides after the rules of a preset: a layer with the reason of its role would be quantized without it."""
    for name in architectures():
        if plan := examine(name).plan:
            with subtests.test(name):
                roles = find_roles(header(name).tensors)
                kept = ((tensor, plan.decisions[tensor]) for tensor in roles)
                changed = {tensor for tensor, decision in kept if decision.reason == roles[tensor]}
                pattern = CHANGED.get(name)
                assert changed == (
                    {tensor for tensor in plan.decisions if re.fullmatch(pattern, tensor)} if pattern else set()
                )


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


EXPERTS = {
    "listed": LISTED,
    "tensors": {"moe.experts.gate_up_proj": (128, 512, 2048), "moe.experts.down_proj": (128, 1024, 512)},
    "modules": {"moe.experts.up.weight": (128, 1024, 512), "moe.experts.down.weight": (128, 512, 1024)},
    "beside": {"moe.up.weight": (128, 1024, 512), "moe.down.weight": (128, 512, 1024)},
}


def test_a_router_has_as_many_outputs_as_experts(subtests, header_source, sentences):
    for name in ["moe.selector", "moe.chooser.linear"]:
        for kind, experts in EXPERTS.items():
            with subtests.test(kind, name=name):
                decision = make_plan(header_source(moe(name, experts))).decisions[f"blocks.0.{name}.weight"]
                assert decision.action == "keep"
                sentences(decision.reason)


def test_layers_beside_experts_are_quantized(header_source):
    made = make_plan(header_source(moe("moe.selector", EXPERTS["beside"])))
    assert made.decisions["blocks.0.q.weight"].action == "quantize"


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


NO_EXPERTS = {
    "none": {},
    "one fewer": {f"moe.experts.{expert}.w1.weight": (1024, 512) for expert in range(127)},
    "convolution": {"moe.conv.weight": (128, 512, 3)},
    "half": {"moe.experts.up": (64, 1024, 512)},
    "width": {"moe.experts.up": (128, 1024, 768)},
    "blocks": {f"moe.layers.{layer}.{part}.weight": (512, 512) for layer in range(128) for part in "qkvo"},
}


def test_a_layer_without_experts_is_no_router(subtests, header_source):
    for kind, experts in NO_EXPERTS.items():
        with subtests.test(kind):
            assert not find_roles(header_source(moe("moe.selector", experts)).tensors)


def test_a_modulation_is_one_layer_of_several_widths_outside_the_blocks(subtests, header_source):
    for shapes, found in [
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
    ]:
        with subtests.test(str(shapes)):
            names = {f"{name}.weight": shape for name, shape in shapes.items()}
            roles = find_roles(header_source(MODEL | names).tensors)
            assert roles.keys() == ({f"{list(shapes)[-1]}.weight"} if found else set())


def test_layers_of_few_inputs_or_outputs_are_kept(subtests, header_source, sentences):
    for shape, narrow in [
        ((96768, 8), True),
        ((4096, 63), True),
        ((4096, 64), False),
        ((32, 4096), True),
        ((63, 1024), True),
        ((63, 1000), False),
        ((1, 33), False),
    ]:
        with subtests.test(str(shape)):
            names = {f"blocks.{block}.layer.weight": shape for block in range(4)}
            made = make_plan(header_source(MODEL | names), preset="none")
            assert {made.decisions[name].action for name in names} == {"keep" if narrow else "quantize"}
            sentences(made.decisions["blocks.0.layer.weight"].reason)


def test_rules_of_the_user_override_roles(subtests, sentences):
    for name, layer, count in [("qwen_image_21", "modulation.1", 1), ("minimax_h3_pruned", "adaln_proj", 51)]:
        with subtests.test(name=name, layer=layer, count=count):
            before = examine(name).plan
            after = make_plan(header(name), rules=parse_rules((), f'{{"{layer}": "int8"}}'))
            more = set(after.names("quantize")) - set(before.names("quantize"))
            assert len(more) == count
            assert all(layer in tensor for tensor in more)
            sentences(before.explanation, *sorted({before.decisions[tensor].reason for tensor in more}))


def test_names_of_many_parts_have_no_role(header_source):
    """Each part could be a list: the work would grow with the square of the length."""
    deep = {f"{'0.' * 20}{index}.weight": (4, 4096) for index in range(4)}
    assert find_roles(header_source(deep).tensors) == {}


def test_a_model_without_tensors_has_no_roles():
    assert find_roles({}) == {}


# Layers whose error weighs most in formats of few bits


def sensitive(header_source, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    found = find_sensitive(header_source({f"{name}.weight": shape for name, shape in shapes.items()}).tensors)
    return {name.removesuffix(".weight"): reason for name, reason in found.items()}


BLOCKS = {f"blocks.{block}.{layer}": (64, 64) for block in range(12) for layer in ("q", "k")}


def test_layers_outside_the_blocks_are_sensitive(header_source):
    assert sensitive(header_source, {"img_in": (64, 64), **BLOCKS})["img_in"] == OUTSIDE


def test_layers_of_the_first_and_last_block_are_sensitive(header_source):
    """By number: block 11 comes after block 9."""
    assert sensitive(header_source, BLOCKS).keys() == {f"blocks.{block}.{layer}" for block in (0, 11) for layer in "qk"}


def test_lists_of_few_blocks_have_no_first_and_last_one(header_source):
    assert (
        sensitive(header_source, {name: shape for name, shape in BLOCKS.items() if name[7:9] in ("0.", "1.", "2.")})
        == {}
    )


def test_down_projections_are_sensitive(subtests, header_source):
    for inputs, found in [(128, True), (127, False)]:
        with subtests.test(inputs=inputs, found=found):
            down = {f"blocks.{block}.down": (64, inputs) for block in range(12)}
            assert ("blocks.5.down" in sensitive(header_source, BLOCKS | down)) is found
