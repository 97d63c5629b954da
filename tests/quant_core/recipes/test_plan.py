"""Plans for real layer names and shapes: what is quantized, what is kept and why, what is left out."""

import pytest
import torch

from learned_rounding.quant_core import PRESETS, Recipe
from learned_rounding.quant_core.errors import AlreadyQuantizedError, NothingToQuantizeError
from learned_rounding.quant_core.recipes import make_plan
from learned_rounding.quant_core.recipes.layers import parse_rules
from learned_rounding.quant_core.recipes.presets import COMMON
from learned_rounding.quant_core.sources import TensorInfo, TensorSource
from learned_rounding.tests.architectures import architectures, read, table
from learned_rounding.tests.architectures.table import examine

EXPECTED = {
    "flux": {
        "keep": """
            img_in txt_in time_in.in_layer time_in.out_layer vector_in.in_layer vector_in.out_layer
            guidance_in.in_layer guidance_in.out_layer final_layer.linear final_layer.adaLN_modulation.1
            double_blocks.0.img_attn.norm.query_norm double_blocks.0.txt_attn.norm.key_norm
            single_blocks.0.norm.query_norm
        """,
        "quantize": """
            double_blocks.0.img_attn.qkv double_blocks.0.img_attn.proj double_blocks.0.img_mlp.0
            double_blocks.0.img_mlp.2 double_blocks.0.txt_attn.qkv double_blocks.0.txt_mlp.2
            double_blocks.0.img_mod.lin double_blocks.0.txt_mod.lin single_blocks.0.linear1
            single_blocks.0.linear2 single_blocks.0.modulation.lin
        """,
    },
    "t5": {
        "keep": """
            shared encoder.final_layer_norm encoder.block.0.layer.0.layer_norm
            encoder.block.0.layer.0.SelfAttention.relative_attention_bias
        """,
        "quantize": """
            encoder.block.0.layer.0.SelfAttention.q encoder.block.0.layer.0.SelfAttention.k
            encoder.block.0.layer.0.SelfAttention.v encoder.block.0.layer.0.SelfAttention.o
            encoder.block.0.layer.1.DenseReluDense.wi_0 encoder.block.0.layer.1.DenseReluDense.wi_1
            encoder.block.0.layer.1.DenseReluDense.wo
        """,
    },
    "wan_t2v": {
        "keep": """
            text_embedding.0 text_embedding.2 time_embedding.0 time_embedding.2 time_projection.1 head.head
            patch_embedding blocks.0.norm3 blocks.0.self_attn.norm_q blocks.0.cross_attn.norm_k
        """,
        "quantize": """
            blocks.0.ffn.0 blocks.0.ffn.2 blocks.0.self_attn.q blocks.0.self_attn.k blocks.0.self_attn.v
            blocks.0.self_attn.o blocks.0.cross_attn.q blocks.0.cross_attn.o
        """,
    },
    "wan_i2v": {
        "keep": "img_emb.proj.0 img_emb.proj.1 img_emb.proj.3 img_emb.proj.4",
        "quantize": "blocks.0.cross_attn.k_img blocks.0.cross_attn.v_img",
    },
    "wan_vace": {
        "keep": "vace_patch_embedding",
        "quantize": "vace_blocks.0.ffn.0 vace_blocks.0.before_proj vace_blocks.0.after_proj",
    },
    "wan_s2v": {
        "keep": """
            trainable_cond_mask cond_encoder casual_audio_encoder.encoder.final_linear
            audio_injector.injector.0.q audio_injector.injector_adain_layers.0.linear frame_packer.proj
        """,
        "quantize": "blocks.0.ffn.0",
    },
    "wan_animate": {
        "keep": "motion_encoder.enc.fc.0 motion_encoder.dec.direction face_encoder.out_proj pose_patch_embedding",
        "quantize": "blocks.0.ffn.0",
    },
    "hunyuan": {
        "keep": """
            img_in.proj double_blocks.0.img_attn.norm.query_norm single_blocks.0.norm.key_norm
            txt_in.input_embedder txt_in.individual_token_refiner.blocks.0.norm1
            txt_in.individual_token_refiner.blocks.0.norm2
        """,
        "quantize": """
            double_blocks.0.img_attn.qkv double_blocks.0.txt_mlp.0 single_blocks.0.linear1
            single_blocks.0.linear2 txt_in.individual_token_refiner.blocks.0.self_attn.qkv
        """,
    },
    "hunyuan_1_5": {
        "keep": "vision_in.proj.0 vision_in.proj.4 cond_type_embedding byt5_in.layernorm",
        "quantize": "vision_in.proj.1 byt5_in.fc1",
    },
}
PRESET_OF = {
    "t5": "t5xxl",
    "wan_t2v": "wan",
    "wan_i2v": "wan",
    "wan_vace": "wan",
    "wan_s2v": "wan",
    "wan_animate": "wan",
    "hunyuan_1_5": "hunyuan",
}


# Presets


def test_decisions_of_real_layers(subtests, layer_names, header_source):
    for prefix in ["", "model.diffusion_model."]:
        with subtests.test(prefix=prefix):
            for family, actions in EXPECTED.items():
                if family == "t5" and prefix:
                    continue  # a text encoder is in a file of its own
                decisions = make_plan(header_source(layer_names(family, prefix))).decisions
                for action, names in actions.items():
                    with subtests.test(family, action=action):
                        found = {name: decisions[f"{prefix}{name}.weight"].action for name in names.split()}
                        assert found == dict.fromkeys(found, action)


def test_layers_are_kept_for_a_reason(subtests):
    for family in EXPECTED:
        with subtests.test(family):
            kept = [decision for decision in examine(family).plan.decisions.values() if decision.action == "keep"]
            assert all(decision.reason for decision in kept)


def test_layers_are_quantized_without_a_reason(subtests):
    for family in EXPECTED:
        with subtests.test(family):
            decisions = examine(family).plan.decisions.values()
            assert not any(decision.reason for decision in decisions if decision.action == "quantize")


def test_presets_named_and_recognised_decide_alike(subtests, layer_names, header_source, sentences):
    for family in EXPECTED:
        with subtests.test(family):
            source = header_source(layer_names(family))
            named, recognised = make_plan(source, preset=PRESET_OF.get(family, family)), make_plan(source)
            assert named.decisions == recognised.decisions
            sentences(named.explanation, recognised.explanation)


def test_a_plan_reports_whether_the_preset_was_recognised(layer_names, header_source):
    source = header_source(layer_names("flux"))
    assert make_plan(source).detected
    assert not make_plan(source, preset="flux").detected


def test_explanations_without_a_preset(header_source, sentences):
    source = header_source({"a.weight": (4, 4)})
    sentences(make_plan(source).explanation, make_plan(source, preset="none").explanation)


def test_a_layer_that_the_preset_does_not_know_makes_it_less_sure(layer_names, header_source, sentences):
    more = {**layer_names("flux"), "pulid.0.to_q.weight": (64, 64), "pulid.1.to_q.weight": (64, 64)}
    sentences(*(make_plan(header_source(names)).explanation for names in (layer_names("flux"), more)))


def test_what_qwen35_predicts_further_words_with_is_kept(subtests, layer_names, header_source):
    """Published files have it, ComfyUI's class has not."""
    for prefix in ["", "model."]:
        with subtests.test(prefix=prefix):
            more = {
                f"{prefix}{name}.weight": (64, 64)
                for name in ("mtp.fc", "mtp.layers.0.self_attn.q_proj", "mtp.layers.0.mlp.down_proj")
            }
            plan = make_plan(header_source({**layer_names("qwen35_2b"), **more}))
            assert plan.preset is PRESETS["qwen35"]
            assert {plan.decisions[name].action for name in more} == {"keep"}


# What is left out


@pytest.fixture
def t5_with_decoder(layer_names, header_source):
    """A T5 with what only its decoder needs, and its embedding under a second name."""
    extra = {
        "encoder.embed_tokens.weight": (32128, 4096),
        "decoder.embed_tokens.weight": (32128, 4096),
        "lm_head.weight": (32128, 4096),
        "decoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
        "decoder.final_layer_norm.weight": (4096,),
    }
    return make_plan(header_source({**layer_names("t5"), **extra}))


def test_a_decoder_is_left_out_of_a_t5(t5_with_decoder, layer_names, sentences):
    assert set(t5_with_decoder.output_names()) == {*layer_names("t5"), "encoder.embed_tokens.weight"}
    sentences(t5_with_decoder.decisions["lm_head.weight"].reason)


def test_the_embedding_of_a_t5_under_its_second_name_is_kept(t5_with_decoder):
    assert t5_with_decoder.decisions["encoder.embed_tokens.weight"].action == "keep"


def test_own_patterns_do_not_bring_back_what_a_preset_removes(layer_names, header_source):
    source = header_source({**layer_names("t5"), "lm_head.weight": (32128, 4096)})
    assert Recipe(keep=("SelfAttention",)).plan(source).decisions["lm_head.weight"].action == "remove"


COPIES = [("model.diffusion_model.", "model_ema."), ("net.", "net_ema."), ("", "ema.")]


def averaged_copies(layer_names, copy: str) -> dict:
    return layer_names("flux", copy) | {f"{copy}decay": (), "model_ema.diffusion_modelimg_inweight": (64, 64)}


def test_averaged_copies_are_left_out(subtests, layer_names, header_source):
    """ComfyUI's loader ignores them."""
    for prefix, copy in COPIES:
        with subtests.test(prefix=prefix, copy=copy):
            names, copies = layer_names("flux", prefix), averaged_copies(layer_names, copy)
            assert set(make_plan(header_source(copies | names)).names("remove")) == copies.keys()


def test_averaged_copies_do_not_change_other_decisions(layer_names, header_source):
    names = layer_names("flux", "net.")
    plan = make_plan(header_source(averaged_copies(layer_names, "net_ema.") | names))
    assert {name: plan.decisions[name] for name in names} == make_plan(header_source(names)).decisions


def test_a_file_of_averaged_copies_alone_has_nothing_to_quantize(layer_names, header_source, sentences):
    for _, copy in COPIES:
        names = averaged_copies(layer_names, copy)
        with sentences.raises(NothingToQuantizeError):
            make_plan(header_source({name: shape for name, shape in names.items() if name.startswith("model_ema.")}))


def test_no_model_has_tensors_that_look_like_an_averaged_copy():
    (rule,) = COMMON.remove
    assert [tensor for name in architectures() for tensor in read(name) if rule.pattern.search(tensor)] == []


def test_a_vae_decoder_beside_a_diffusion_model_is_never_removed(layer_names, header_source):
    """`decoder` is in the names of every VAE too."""
    names = {
        **layer_names("flux", "model.diffusion_model."),
        "vae.decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.norm.weight": (512,),
    }
    assert not list(make_plan(header_source(names)).names("remove"))


def test_a_vae_decoder_beside_a_t5_is_never_removed(layer_names, header_source):
    names = {
        **layer_names("t5"),
        "vae.decoder.conv_in.weight": (512, 512),
        "text_model.decoder.layer.weight": (512, 512),
    }
    assert not list(make_plan(header_source(names), preset="t5xxl").names("remove"))


# Checkpoints

WHOLE = {
    "vae.decoder.mid.attn_1.q.weight": (512, 512),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512),
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
    "text_encoders.t5xxl.transformer.shared.weight": (32128, 4096),
}


def test_text_encoders_and_vae_of_a_whole_checkpoint_stay_as_they_are(subtests, layer_names, header_source):
    for preset in ["auto", "none", "flux"]:
        with subtests.test(preset=preset):
            plan = make_plan(header_source({**layer_names("flux", "model.diffusion_model."), **WHOLE}), preset=preset)
            assert {name: plan.decisions[name].action for name in WHOLE} == dict.fromkeys(WHOLE, "keep")
            assert plan.decisions["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"].action == "quantize"


def test_the_diffusion_model_of_a_whole_checkpoint_gets_its_own_keep_list(layer_names, header_source):
    flux, t5 = layer_names("flux", "model.diffusion_model."), layer_names("t5", "text_encoders.t5xxl.transformer.")
    plan = make_plan(header_source({**flux, **t5, **WHOLE}))
    kept = ("img_in", "txt_in", "time_in.in_layer", "final_layer.linear")
    assert {plan.decisions[f"model.diffusion_model.{name}.weight"].action for name in kept} == {"keep"}


ENCODERS = [(preset, encoder) for preset in PRESETS.values() for encoder in preset.encoders]
# Part of a checkpoint → a list of its tensors, where that has another name.
LISTS = {part: name for name, parts in table.ENCODERS.items() for part in parts}


@pytest.mark.soak
def test_each_part_of_a_checkpoint_gets_its_own_rule(subtests, layer_names, header_source, sentences):
    """The text encoder alone and in the checkpoint: the same decisions, removals included."""
    others = layer_names("clip_l", "text_encoders.clip_l.transformer.")
    others |= layer_names("clip_l", "text_encoders.unheard_of.transformer.")
    for preset, encoder in ENCODERS:
        start = f"text_encoders.{encoder}.transformer." if encoder else "text_encoders."
        alone = {**layer_names(LISTS.get(encoder, encoder)), "lm_head.weight": (64, 64)}
        own = make_plan(header_source(alone)).decisions
        family = next((name for name in architectures() if examine(name).preset == preset.name), "flux")
        whole = layer_names(family, "model.diffusion_model.") | others
        whole |= {start + name: shape for name, shape in alone.items()}
        plan = make_plan(header_source(whole), preset="auto" if preset.detect else preset.name)
        with subtests.test("as alone", preset=preset.name, encoder=encoder):
            assert {name: plan.decisions[start + name] for name in own} == own
        with subtests.test("quantized", preset=preset.name, encoder=encoder):
            assert "quantize" in {decision.action for decision in own.values()}
        with subtests.test("others are kept", preset=preset.name, encoder=encoder):
            assert {plan.decisions[name].action for name in others} == {"keep"}
        with subtests.test("explanation", preset=preset.name, encoder=encoder):
            sentences(plan.explanation)


def test_text_encoders_that_comfyui_reads_in_full_precision_stay(subtests, layer_names, header_source):
    """PixArt's T5: ComfyUI does not look for quantized layers there. And that of a model which nothing recognises."""
    for family in ["pixart_sigma", None]:
        with subtests.test(family=family):
            t5 = layer_names("t5", "text_encoders.t5xxl.transformer.")
            model = (
                layer_names(family, "model.diffusion_model.")
                if family
                else {"model.diffusion_model.a.weight": (64, 64)}
            )
            plan = make_plan(header_source({**model, **t5}))
            assert {plan.decisions[name].action for name in t5} == {"keep"}


# The general rule

GENERAL = {
    "keep": """
            norm norm1 norm_out.linear blocks.0.attn_norm blocks.0.q_norm blocks.0.layernorm
            blocks.0.rms_norm groupnorm token_embed x_embedder t_embedder.mlp.0 embed_tokens model.wte
            shared pos_emb lm_head img_in input_proj time_in.in_layer final_layer.linear proj_out head.head caption_projection.linear_1
        """,
    "quantize": "blocks.0.attn.qkv normal_proj abnormal conformer.proj shared_experts.up normalize blocks.0.proj_out blocks.0.time_mixer",
}


def test_the_general_rule(subtests, header_source):
    for action in GENERAL:
        with subtests.test(action=action):
            names = {f"{name}.weight": (256, 256) for name in [*GENERAL[action].split(), "blocks.9.mlp"]}
            plan = make_plan(header_source(names), preset="none")
            assert {
                name for name in GENERAL[action].split() if plan.decisions[f"{name}.weight"].action != action
            } == set()


def test_the_general_rule_alone_has_no_preset(header_source):
    plan = make_plan(header_source({"a.weight": (64, 64)}), preset="none")
    assert plan.preset is None
    assert not plan.detected


def test_biases_and_convolutions_are_kept(header_source):
    source = header_source(
        {
            "a.weight": (64, 64),
            "a.bias": (64,),
            "conv.weight": (8, 8, 3, 3),
            "step": (),
            "b.weight": TensorInfo(torch.int64, (8, 8)),
        }
    )
    assert list(make_plan(source).names("quantize")) == ["a.weight"]
    assert list(make_plan(source).names("remove")) == []


def test_decisions_follow_the_order_of_the_source(layer_names, header_source):
    names = layer_names("flux")
    assert list(make_plan(header_source(names)).decisions) == list(names)


# Rules of the user


def test_own_patterns_keep_more(layer_names, header_source):
    source = header_source(layer_names("flux"))
    own = Recipe(keep=(r"single_blocks\.0\.linear1\.", "img_mod")).plan(source)
    more = set(make_plan(source).names("quantize")) - set(own.names("quantize"))
    modulations = {f"double_blocks.{block}.img_mod.lin.weight" for block in range(19)}
    assert more == {"single_blocks.0.linear1.weight", *modulations}
    assert own.decisions["double_blocks.0.img_mod.lin.weight"].reason == "keep pattern img_mod"


def test_rules_come_before_preset_and_heuristics(layer_names, header_source):
    recipe = Recipe(heur=True, layer_config='{"^img_in": "int8"}')
    decision = recipe.plan(header_source(layer_names("flux"))).decisions["img_in.weight"]
    assert decision.action == "quantize"
    assert decision.reason == "layer config ^img_in"


def test_no_rule_makes_a_bias_a_matrix(layer_names, header_source):
    plan = Recipe(layer_config='{"^img_in": "int8"}').plan(header_source(layer_names("flux")))
    assert plan.decisions["img_in.bias"].action == "keep"


def test_own_rules_that_find_no_layer_are_named(layer_names, header_source, sentences):
    source = header_source(layer_names("flux"))
    plan = Recipe(
        keep=("img_mpl", "img_mlp", "img_mlp.0.bias"), layer_config='{"nothing": "int8", "linear1": "int8"}'
    ).plan(source)
    sentences(plan.explanation, plan.warnings)


def test_own_rules_that_find_layers_are_no_warning(layer_names, header_source):
    assert Recipe(keep=("img_mlp",)).plan(header_source(layer_names("flux"))).warnings == ()


def test_own_rules_cannot_ask_for_what_comfyui_does_not_read(subtests, layer_names, header_source, sentences):
    for family, prefix, layer in [
        ("hidream", "", "double_stream_blocks.0.block.ff_i.gate"),
        ("clip_l", "", "text_model.encoder.layers.0.mlp.fc1"),
        ("clip_l", "text_encoders.clip_l.transformer.", "text_model.encoder.layers.0.mlp.fc1"),
        ("t5_base", "", "encoder.block.0.layer.0.SelfAttention.q"),
    ]:
        beside = layer_names("flux", "model.diffusion_model.") if prefix else {}
        source = header_source({**layer_names(family, prefix), **beside})
        rules = parse_rules((), f'{{"{layer}": "int8"}}')
        with subtests.test(family, prefix=prefix):
            try:
                decision = make_plan(source, rules=rules).decisions[f"{prefix}{layer}.weight"]
            except NothingToQuantizeError as error:  # where it is all there is
                sentences(error)
                continue
            assert decision.action == "keep"
            sentences(decision.reason)


def test_an_embedding_is_quantized_in_what_comfyui_reads_there(subtests, layer_names, header_source, sentences):
    """It looks rows of codes up, and takes the scale for that of the whole table or of each row."""
    for format, action in [("int8_tensorwise", "quantize"), ("float8_e4m3fn", "quantize"), ("int8_blockwise", "keep")]:
        with subtests.test(format=format, action=action):
            plan = Recipe(layer_config=f'{{"shared": "{format}"}}').plan(header_source(layer_names("t5")))
            assert plan.decisions["shared.weight"].action == action
            sentences(plan.decisions["shared.weight"].reason)


def check_rule_for_everything(name: str, format: str, kinds: set[str], preset: str) -> None:
    decisions = Recipe(preset=preset, layer_config=f'{{".": "{format}"}}').plan(table.source(name)).decisions
    quantized = {read(name)[tensor].kind for tensor, decision in decisions.items() if decision.action == "quantize"}
    assert quantized <= (kinds if examine(name).preset else kinds | {"embedding"})  # whose tables have any name


# Format → kinds of modules in which ComfyUI reads it.
READ = {"float8_e4m3fn": {"linear", "embedding", "experts"}, "int8_blockwise": {"linear", "experts"}}


def test_a_rule_for_everything_quantizes_only_what_comfyui_reads(subtests):
    for name in ("flux", "sd15", "t5", "qwen3_06b", "gpt_oss_20b", "ace_step_15", "gemma4_e2b", "hunyuan3d_mini"):
        for format, kinds in READ.items():
            with subtests.test(name, format=format):
                check_rule_for_everything(name, format, kinds, "auto")


@pytest.mark.soak
@pytest.mark.parametrize("preset", ["auto", "none"])
@pytest.mark.parametrize("format, kinds", READ.items())
def test_a_rule_for_everything_quantizes_only_what_comfyui_reads_of_all_models(subtests, format, kinds, preset):
    for name in filter(lambda name: examine(name).quantized, architectures()):
        with subtests.test(name):
            check_rule_for_everything(name, format, kinds, preset)


def test_warning_names_a_few_of_many_idle_rules(header_source, sentences):
    source = header_source({"blocks.0.weight": (64, 64)})
    rules = parse_rules([f"missing{index}" + "x" * (200 * (index == 0)) for index in range(1000)], "")
    plan = make_plan(source, preset="none", rules=rules)
    assert len(plan.idle) == 1000
    assert len(plan.warnings[0]) < 1000
    sentences(plan.warnings[0])


# Heuristics


@pytest.fixture
def shapes(header_source):
    return header_source(
        {"a.weight": (4096, 4096), "b.weight": (64, 4096), "c.weight": (3072, 3072), "d.weight": (4096, 100)}
    )


def test_heur_is_off_by_default(shapes):
    assert list(make_plan(shapes).names("quantize")) == ["a.weight", "b.weight", "c.weight", "d.weight"]


def test_heur_keeps_small_layers(shapes, sentences):
    heur = make_plan(shapes, heur=True)
    assert list(heur.names("quantize")) == ["a.weight"]
    sentences(*(heur.decisions[name].reason for name in ("b.weight", "c.weight", "d.weight")))


def test_heur_goes_by_the_block_size_in_force(subtests, header_source, sentences):
    for block_size, kept in [(None, True), (64, False), (256, True)]:
        with subtests.test(block_size=block_size, kept=kept):
            source = header_source({"a.weight": (64 * 90, 64 * 111), "b.weight": (8192, 8192)})
            plan = Recipe(format="int8_blockwise", block_size=block_size, heur=True).plan(source)
            assert (plan.decisions["a.weight"].action == "keep") is kept
            sentences(plan.decisions["a.weight"].reason)


# Refusals


def test_nothing_to_quantize_says_what_was_kept(subtests, header_source, sentences):
    for names in [{}, {"norm.weight": (8, 8)}, {"conv.weight": (8, 8, 3, 3), "a.bias": (8,)}]:
        with subtests.test(names=names), sentences.raises(NothingToQuantizeError):
            make_plan(header_source(names))


def test_quantized_sources_are_refused_by_the_name_of_their_format(subtests, sentences):
    for preset in ["auto", "none", "flux"]:
        with subtests.test(preset=preset):
            codes = TensorSource({"a.weight": torch.zeros(4, 4, dtype=torch.float8_e5m2)}, name="old.safetensors")
            with sentences.raises(AlreadyQuantizedError):
                make_plan(codes, preset=preset)


def test_a_plan_can_be_cancelled_at_every_tensor(header_source):
    class Cancelled(Exception):
        pass

    def check() -> None:
        checks.append(1)
        if len(checks) == 3:
            raise Cancelled

    checks: list[int] = []
    with pytest.raises(Cancelled):
        make_plan(header_source({f"blocks.{index}.weight": (64, 64) for index in range(4)}), check=check)
