"""Plans for real layer names and shapes: what is quantized, what is kept and why, what is left out."""

import pytest
import torch

from learned_rounding.quant_core import PRESETS, Recipe
from learned_rounding.quant_core.errors import AlreadyQuantizedError, NothingToQuantizeError
from learned_rounding.quant_core.recipes import make_plan
from learned_rounding.quant_core.recipes.layers import parse_rules
from learned_rounding.quant_core.recipes.presets import COMMON
from learned_rounding.quant_core.recipes.refused import find_refusal
from learned_rounding.quant_core.sources import TensorInfo, TensorSource
from learned_rounding.tests.architectures import architectures, table

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
PREFIXES = ["", "model.diffusion_model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "family, action", [(family, action) for family, actions in EXPECTED.items() for action in actions]
)
def test_what_becomes_of_real_layers(layer_names, header_source, family, action, prefix):
    if family == "t5" and prefix:
        prefix = ""  # a text encoder stands in a file of its own
    plan = make_plan(header_source(layer_names(family, prefix)))
    assert plan.detected and plan.preset.name == PRESET_OF.get(family, family)
    found = {name: plan.decisions[f"{prefix}{name}.weight"] for name in EXPECTED[family][action].split()}
    assert {name: decision.action for name, decision in found.items()} == dict.fromkeys(found, action)
    assert all(bool(decision.reason) == (action != "quantize") for decision in found.values())


@pytest.mark.parametrize("family", EXPECTED)
def test_presets_named_and_recognised_decide_alike(layer_names, header_source, family, sentences):
    source = header_source(layer_names(family))
    named, recognised = make_plan(source, preset=PRESET_OF.get(family, family)), make_plan(source)
    assert named.decisions == recognised.decisions
    sentences(named.explanation, recognised.explanation)


def test_a_decoder_is_left_out_of_a_t5(layer_names, header_source, sentences):
    extra = {
        "encoder.embed_tokens.weight": (32128, 4096),
        "decoder.embed_tokens.weight": (32128, 4096),
        "lm_head.weight": (32128, 4096),
        "decoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
        "decoder.final_layer_norm.weight": (4096,),
    }
    plan = make_plan(header_source({**layer_names("t5"), **extra}))
    actions = {name: plan.decisions[name].action for name in extra}
    assert actions == {name: "keep" if name.startswith("encoder") else "remove" for name in extra}
    assert set(plan.output_names()) == {*layer_names("t5"), "encoder.embed_tokens.weight"}
    sentences(plan.decisions["lm_head.weight"].reason)


@pytest.mark.parametrize("prefix, copy", [("model.diffusion_model.", "model_ema."), ("net.", "net_ema."), ("", "ema.")])
def test_averaged_copies_are_left_out(layer_names, header_source, prefix, copy, sentences):
    """ComfyUI's loader ignores them."""
    names = layer_names("flux", prefix)
    copies = layer_names("flux", copy) | {f"{copy}decay": (), "model_ema.diffusion_modelimg_inweight": (64, 64)}
    plan = make_plan(header_source(copies | names))
    assert set(plan.names("remove")) == copies.keys()
    assert {name: plan.decisions[name] for name in names} == make_plan(header_source(names)).decisions
    with sentences.raises(NothingToQuantizeError):
        make_plan(header_source({name: shape for name, shape in copies.items() if name.startswith("model_ema.")}))


@pytest.mark.parametrize("name", architectures())
def test_no_model_has_tensors_that_look_like_an_averaged_copy(layer_names, name):
    (rule,) = COMMON.remove
    assert not [tensor for tensor in layer_names(name) if rule.pattern.search(tensor)]


def test_a_vae_decoder_is_never_removed(layer_names, header_source):
    """`decoder` stands in the names of every VAE too."""
    names = {
        **layer_names("flux", "model.diffusion_model."),
        "vae.decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.norm.weight": (512,),
    }
    assert not list(make_plan(header_source(names)).names("remove"))
    text = {
        **layer_names("t5"),
        "vae.decoder.conv_in.weight": (512, 512),
        "text_model.decoder.layer.weight": (512, 512),
    }
    assert not list(make_plan(header_source(text), preset="t5xxl").names("remove"))


WHOLE = {
    "vae.decoder.mid.attn_1.q.weight": (512, 512),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512),
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
    "text_encoders.t5xxl.transformer.shared.weight": (32128, 4096),
}


@pytest.mark.parametrize("preset", ["auto", "none", "flux"])
def test_text_encoders_and_vae_of_a_whole_checkpoint_stay_as_they_are(layer_names, header_source, preset):
    plan = make_plan(header_source({**layer_names("flux", "model.diffusion_model."), **WHOLE}), preset=preset)
    assert {name: plan.decisions[name].action for name in WHOLE} == dict.fromkeys(WHOLE, "keep")
    assert plan.decisions["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"].action == "quantize"


ENCODERS = [(preset, encoder) for preset in PRESETS.values() for encoder in preset.encoders]
# Part of a checkpoint → a list of its tensors, where that has another name.
LISTS = {part: name for name, parts in table.ENCODERS.items() for part in parts}


@pytest.mark.parametrize("preset, encoder", ENCODERS, ids=[f"{preset.name}-{encoder}" for preset, encoder in ENCODERS])
def test_each_part_of_a_checkpoint_gets_its_own_rule(layer_names, header_source, preset, encoder, sentences):
    """The text encoder alone and in the checkpoint: the same decisions, removals included."""
    start = f"text_encoders.{encoder}.transformer." if encoder else "text_encoders."
    alone = {**layer_names(LISTS.get(encoder, encoder)), "lm_head.weight": (64, 64)}
    own = make_plan(header_source(alone)).decisions
    family = layer_names(
        next(name for name in architectures() if preset.matches(header_source(layer_names(name)).tensors))
        if preset.detect
        else "flux"
    )
    whole = {f"model.diffusion_model.{name}": shape for name, shape in family.items()} | {
        f"{start}{name}": shape for name, shape in alone.items()
    }
    whole |= layer_names("clip_l", "text_encoders.clip_l.transformer.") | layer_names(
        "clip_l", "text_encoders.unheard_of.transformer."
    )
    plan = make_plan(header_source(whole), preset="auto" if preset.detect else preset.name)
    assert {name: plan.decisions[start + name] for name in own} == own
    assert "quantize" in {decision.action for decision in own.values()}
    assert {plan.decisions[name].action for name in whole if ".clip_l." in name or ".unheard_of." in name} == {"keep"}
    assert own.keys()
    sentences(plan.explanation)


def test_text_encoders_that_comfyui_reads_in_full_precision_stay(layer_names, header_source):
    """PixArt's T5: ComfyUI does not look for quantized layers there. And that of a model which nothing recognises."""
    start = "text_encoders.t5xxl.transformer."
    for family in (layer_names("pixart_sigma", "model.diffusion_model."), {"model.diffusion_model.a.weight": (64, 64)}):
        plan = make_plan(header_source({**family, **layer_names("t5", start)}))
        assert {plan.decisions[name].action for name in layer_names("t5", start)} == {"keep"}


def test_the_diffusion_model_of_a_whole_checkpoint_gets_its_own_keep_list(layer_names, header_source):
    whole = {
        **layer_names("flux", "model.diffusion_model."),
        **layer_names("t5", "text_encoders.t5xxl.transformer."),
        **WHOLE,
    }
    plan = make_plan(header_source(whole))
    for name in ("img_in", "txt_in", "time_in.in_layer", "final_layer.linear"):
        assert plan.decisions[f"model.diffusion_model.{name}.weight"].action == "keep", name


GENERAL = {
    "keep": """
            norm norm1 norm_out.linear blocks.0.attn_norm blocks.0.q_norm blocks.0.layernorm
            blocks.0.rms_norm groupnorm token_embed x_embedder t_embedder.mlp.0 embed_tokens model.wte
            shared pos_emb lm_head img_in input_proj time_in.in_layer final_layer.linear proj_out head.head caption_projection.linear_1
        """,
    "quantize": "blocks.0.attn.qkv normal_proj abnormal conformer.proj shared_experts.up normalize blocks.0.proj_out blocks.0.time_mixer",
}


@pytest.mark.parametrize("action", GENERAL)
def test_the_general_rule(header_source, action):
    names = {f"{name}.weight": (256, 256) for name in [*GENERAL[action].split(), "blocks.9.mlp"]}
    plan = make_plan(header_source(names), preset="none")
    assert plan.preset is None and not plan.detected
    wrong = {name for name in GENERAL[action].split() if plan.decisions[f"{name}.weight"].action != action}
    assert not wrong


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
    assert {name: decision.action for name, decision in make_plan(source).decisions.items()} == {
        "a.weight": "quantize",
        "a.bias": "keep",
        "conv.weight": "keep",
        "step": "keep",
        "b.weight": "keep",
    }


def test_decisions_follow_the_order_of_the_source(layer_names, header_source):
    names = layer_names("flux")
    assert list(make_plan(header_source(names)).decisions) == list(names)


def test_own_patterns_keep_more(layer_names, header_source):
    source = header_source(layer_names("flux"))
    plain, own = make_plan(source), Recipe(keep=(r"single_blocks\.0\.linear1\.", "img_mod")).plan(source)
    more = set(plain.names("quantize")) - set(own.names("quantize"))
    modulations = {f"double_blocks.{block}.img_mod.lin.weight" for block in range(19)}
    assert more == {"single_blocks.0.linear1.weight", *modulations}
    assert own.decisions["double_blocks.0.img_mod.lin.weight"].reason == "keep pattern img_mod"


def test_a_layer_that_the_preset_does_not_know_makes_it_less_sure(layer_names, header_source, sentences):
    more = {**layer_names("flux"), "pulid.0.to_q.weight": (64, 64), "pulid.1.to_q.weight": (64, 64)}
    sentences(*(make_plan(header_source(names)).explanation for names in (layer_names("flux"), more)))


def test_own_rules_that_find_no_layer_are_named(layer_names, header_source, sentences):
    source = header_source(layer_names("flux"))
    plan = Recipe(
        keep=("img_mpl", "img_mlp", "img_mlp.0.bias"), layer_config='{"nothing": "int8", "linear1": "int8"}'
    ).plan(source)
    assert Recipe(keep=("img_mlp",)).plan(source).warnings == ()
    sentences(plan.explanation, plan.warnings)


@pytest.mark.parametrize(
    "family, prefix, layer",
    [
        ("hidream", "", "double_stream_blocks.0.block.ff_i.gate"),
        ("clip_l", "", "text_model.encoder.layers.0.mlp.fc1"),
        ("clip_l", "text_encoders.clip_l.transformer.", "text_model.encoder.layers.0.mlp.fc1"),
        ("t5_base", "", "encoder.block.0.layer.0.SelfAttention.q"),
    ],
)
def test_own_rules_cannot_ask_for_what_comfyui_does_not_read(
    layer_names, header_source, family, prefix, layer, sentences
):
    beside = layer_names("flux", "model.diffusion_model.") if prefix else {}
    source, rule = (
        header_source({**layer_names(family, prefix), **beside}),
        parse_rules((), f'{{"{layer}": "int8"}}')[0],
    )
    name = f"{prefix}{layer}.weight"
    try:
        decision = make_plan(source, rules=[rule]).decisions[name]
        assert decision.action == "keep"
        sentences(decision.reason)
    except NothingToQuantizeError as error:  # where it is all there is
        sentences(error)


@pytest.mark.parametrize(
    "format, action", [("int8_tensorwise", "quantize"), ("float8_e4m3fn", "quantize"), ("int8_blockwise", "keep")]
)
def test_an_embedding_is_quantized_in_what_comfyui_reads_there(layer_names, header_source, format, action, sentences):
    """It looks rows of codes up, and takes the scale for that of the whole table or of each row."""
    plan = Recipe(layer_config=f'{{"shared": "{format}"}}').plan(header_source(layer_names("t5")))
    assert plan.decisions["shared.weight"].action == action
    sentences(plan.decisions["shared.weight"].reason)


def test_own_patterns_do_not_bring_back_what_a_preset_removes(layer_names, header_source):
    source = header_source({**layer_names("t5"), "lm_head.weight": (32128, 4096)})
    assert Recipe(keep=("SelfAttention",)).plan(source).decisions["lm_head.weight"].action == "remove"


@pytest.mark.parametrize("prefix", ["", "model."])
def test_what_qwen35_predicts_further_words_with_is_kept(layer_names, header_source, prefix):
    """Published files have it, ComfyUI's class has not."""
    more = {
        f"{prefix}{name}.weight": (64, 64)
        for name in ("mtp.fc", "mtp.layers.0.self_attn.q_proj", "mtp.layers.0.mlp.down_proj")
    }
    plan = make_plan(header_source({**layer_names("qwen35_2b"), **more}))
    assert plan.preset.name == "qwen35" and {plan.decisions[name].action for name in more} == {"keep"}


def test_heur_keeps_small_layers(header_source, sentences):
    source = header_source(
        {"a.weight": (4096, 4096), "b.weight": (64, 4096), "c.weight": (3072, 3072), "d.weight": (4096, 100)}
    )
    assert list(make_plan(source).names("quantize")) == ["a.weight", "b.weight", "c.weight", "d.weight"]
    heur = make_plan(source, heur=True)
    assert list(heur.names("quantize")) == ["a.weight"]
    sentences(*(heur.decisions[name].reason for name in ("b.weight", "c.weight", "d.weight")))


@pytest.mark.parametrize("block_size, kept", [(None, True), (64, False), (256, True)])
def test_heur_goes_by_the_block_size_in_force(header_source, block_size, kept, sentences):
    source = header_source({"a.weight": (64 * 90, 64 * 111), "b.weight": (8192, 8192)})
    plan = Recipe(format="int8_blockwise", block_size=block_size, heur=True).plan(source)
    assert (plan.decisions["a.weight"].action == "keep") is kept
    sentences(plan.decisions["a.weight"].reason)


def test_a_recipe_hands_all_of_its_fields_on(layer_names, header_source):
    source = header_source(layer_names("flux"))
    recipe = Recipe(preset="none", keep=("linear2",), heur=True)
    assert recipe.plan(source) == make_plan(source, preset="none", rules=recipe.rules, heur=True)
    assert recipe.plan(source).decisions != Recipe(preset="none").plan(source).decisions


def test_explanations_without_a_preset(header_source, sentences):
    source = header_source({"a.weight": (4, 4)})
    sentences(make_plan(source).explanation, make_plan(source, preset="none").explanation)


@pytest.mark.parametrize("names", [{}, {"norm.weight": (8, 8)}, {"conv.weight": (8, 8, 3, 3), "a.bias": (8,)}])
def test_nothing_to_quantize_says_what_was_kept(header_source, names, sentences):
    with sentences.raises(NothingToQuantizeError):
        make_plan(header_source(names))


@pytest.mark.parametrize("preset", ["auto", "none", *PRESETS])
def test_quantized_sources_are_refused_by_the_name_of_their_format(preset, sentences):
    codes = TensorSource({"a.weight": torch.zeros(4, 4, dtype=torch.float8_e5m2)}, name="old.safetensors")
    with sentences.raises(AlreadyQuantizedError):
        make_plan(codes, preset=preset)


DIFFUSERS = {
    "auraflow": "joint_transformer_blocks.0.attn.add_k_proj.weight",
    "pixart": "adaln_single.emb.timestep_embedder.linear_1.bias pos_embed.proj.bias transformer_blocks.0.attn1.to_q.weight",
    "zimage": "noise_refiner.0.attention.norm_k.weight noise_refiner.0.attention.to_k.weight",
    "flux": "x_embedder.weight transformer_blocks.0.attn.add_k_proj.weight single_transformer_blocks.0.proj_mlp.weight",
    "sd3": "pos_embed.proj.weight transformer_blocks.0.attn.add_q_proj.weight",
    "unet": "conv_in.weight down_blocks.0.resnets.0.norm1.weight mid_block.attentions.0.proj_in.weight",
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", DIFFUSERS)
def test_diffusers_names_are_refused_because_comfyui_drops_their_scales(header_source, family, prefix, sentences):
    """ComfyUI's own converters make such names of real models in tests/nodes/host/test_opening.py."""
    source = header_source({prefix + name: (64, 64) for name in DIFFUSERS[family].split()})
    with sentences.raises(NothingToQuantizeError):
        make_plan(source)


# Names of diffusers' classes that open_source does not convert, or not without the rest of the model.
UNCONVERTED = {
    "wan": "condition_embedder.time_embedder.linear_1.weight blocks.0.attn1.to_q.weight",
    "ltx2": "audio_time_embed.emb.timestep_embedder.linear_1.weight time_embed.emb.timestep_embedder.linear_1.weight",
    "hunyuan image": "context_embedder.proj_in.weight transformer_blocks.0.attn.to_q.weight",
    "flux2": "double_stream_modulation_img.linear.weight x_embedder.weight transformer_blocks.0.attn.add_k_proj.weight",
    "chroma": "distilled_guidance_layer.layers.0.linear_1.weight x_embedder.weight transformer_blocks.0.attn.add_k_proj.weight",
    "mochi": "time_embed.timestep_embedder.linear_1.weight transformer_blocks.0.attn1.to_q.weight",
    "cosmos": "time_embed.t_embedder.linear_1.weight transformer_blocks.0.attn1.to_q.weight",
    "krea2": "time_embed.linear_1.weight transformer_blocks.0.attn.to_q.weight",
    "cogvideox": "transformer_blocks.0.norm1.norm.weight transformer_blocks.0.attn1.to_q.weight",
    "lumina2": "time_caption_embed.timestep_embedder.linear_1.weight noise_refiner.0.attn.to_q.weight layers.0.attn.to_q.weight",
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", UNCONVERTED)
def test_diffusers_names_without_a_conversion_are_refused(header_source, family, prefix, sentences):
    source = header_source({prefix + name: (64, 64) for name in UNCONVERTED[family].split()})
    with sentences.raises(NothingToQuantizeError) as error:
        make_plan(source)
    assert "no conversion" in str(error.value)


@pytest.mark.parametrize("name", architectures())
def test_no_model_under_comfyuis_names_is_refused(layer_names, name):
    assert all(find_refusal(layer_names(name, prefix)) is None for prefix in PREFIXES)


OTHERS = {
    "a ControlNet": """
        controlnet_blocks.0.weight controlnet_cond_embedding.conv_in.weight control_model.input_hint_block.0.weight after_proj_list.18.weight
        model.control_model.input_hint_block.0.weight
    """,
    "a patch for a model": """
        control_layers.0.attention.qkv.weight control_all_x_embedder.2-1.weight lllite_conditioning1.conv1.weight redux_up.weight
        image_proj.proj.weight
    """,
    "a LoRA": """
        lora_unet_double_blocks_0_img_attn_proj.lora_up.weight transformer.blocks.0.attn.to_q.lora_A.weight unet.mid_block.to_q_lora.down.weight
        diffusion_model.blocks.0.ffn.0.lora_B.default.weight lycoris_blocks_0.lokr_w1 lora_te_text_model.hada_w1_a blocks.0.q.dora_scale
        diffusion_model.blocks.0.ffn.0.diff_b transformer.single_transformer_blocks.0.attn.to_k.lora.up.weight
    """,
    "an image encoder": """
        vision_model.encoder.layers.0.layer_norm1.weight visual.transformer.resblocks.0.attn.in_proj_weight encoder.layer.0.layer_scale1.lambda1
    """,
    "a VAE": """
        decoder.conv_in.weight encoder.middle.0.residual.0.gamma decoder.up_blocks.0.resnets.0.conv1.weight quant_conv.weight
        taesd_decoder.1.weight decoder.mid.attn_1.q.weight
    """,
}  # fmt: skip


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in OTHERS.items() for name in names.split()])
def test_what_is_no_model_is_refused_by_what_it_is(header_source, kind, name, sentences):
    """Each mark alone, beside a layer that the general rule would quantize."""
    source = header_source({name: (64, 64), "blocks.0.attn.to_q.weight": (64, 64)})
    with sentences.raises(NothingToQuantizeError):
        make_plan(source)


def test_an_image_encoder_beside_a_text_encoder_is_not_refused(layer_names):
    assert find_refusal([*layer_names("clip_l"), "vision_model.encoder.layers.0.layer_norm1.weight"]) is None
    assert find_refusal(["vision_model.encoder.layers.0.layer_norm1.weight"])


def test_warning_names_a_few_of_many_idle_rules(header_source, sentences):
    source = header_source({"blocks.0.weight": (64, 64)})
    rules = parse_rules([f"missing{index}" + "x" * (200 * (index == 0)) for index in range(1000)], "")
    plan = make_plan(source, preset="none", rules=rules)
    assert len(plan.idle) == 1000 and len(plan.warnings[0]) < 1000
    sentences(plan.warnings[0])


def test_plan_can_be_cancelled_at_every_tensor(header_source):
    class Cancelled(Exception):
        pass

    def check() -> None:
        checks.append(1)
        if len(checks) == 3:
            raise Cancelled

    checks: list[int] = []
    with pytest.raises(Cancelled):
        make_plan(header_source({f"blocks.{index}.weight": (64, 64) for index in range(4)}), check=check)
