"""Files of public bug reports about quantized models, rebuilt in small; the report stands above each test."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_tensors
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.convert.dequantize import DecodedSource
from learned_rounding.quant_core.sources import SafetensorsFile, open_source
from learned_rounding.tests.gguf_files import save_gguf

FP8 = torch.float8_e4m3fn
WIDTH = 64
ENCODER = "text_encoders.qwen3_4b.transformer."
HEADER = "_quantization_metadata"


def json_tensor(config: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


@pytest.fixture
def flux():
    """Small tensors under Flux.1's names: one block of each kind."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}

    def add(layer: str, rows: int, columns: int):
        tensors[f"{layer}.weight"] = (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()
        tensors[f"{layer}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)

    add("img_in", WIDTH, 64)
    for stream in ("img", "txt"):
        for layer, rows, columns in (("mod.lin", 6, 1), ("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.0", 4, 1)):
            add(f"double_blocks.0.{stream}_{layer}", rows * WIDTH, columns * WIDTH)
        for norm in ("query_norm", "key_norm"):
            tensors[f"double_blocks.0.{stream}_attn.norm.{norm}.scale"] = torch.ones(128, dtype=torch.bfloat16)
    for layer, rows, columns in (("linear1", 7, 1), ("linear2", 1, 5), ("modulation.lin", 3, 1)):
        add(f"single_blocks.0.{layer}", rows * WIDTH, columns * WIDTH)
    add("final_layer.linear", 64, WIDTH)
    return tensors


@pytest.fixture
def layers(flux):
    """Names of the layers to quantize."""
    return [name.removesuffix(".weight") for name in flux if name.endswith(".weight") and "blocks." in name]


@pytest.fixture
def scaled_fp8(flux, layers):
    """scaled_fp8(scale_name="weight_scale", per_row=False, dtype=torch.float32) → the tensors with FP8 layers."""

    def make(scale_name: str = "weight_scale", per_row: bool = False, dtype: torch.dtype = torch.float32):
        tensors = dict(flux)
        for layer in layers:
            weight = flux[f"{layer}.weight"].float()
            scale = (weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()) / 448
            scale = scale.to(dtype)
            tensors[f"{layer}.weight"] = (weight / scale.float()).to(FP8)
            tensors[f"{layer}.{scale_name}"] = scale
        return tensors

    return make


@pytest.fixture
def lrq(capsys):
    """lrq(*words) → (exit code, what was printed)."""

    def run(*words) -> tuple[int, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def write(tmp_path):
    """write(tensors, **metadata) → path of the file."""

    def save(tensors: dict[str, torch.Tensor], **metadata: str):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors", metadata)
        return tmp_path / "a.safetensors"

    return save


@pytest.fixture
def quantize(lrq, tmp_path):
    """quantize(path, *options) → (exit code, what was printed, {name: tensor} of the INT8 file)."""

    def run(path, *options):
        made = tmp_path / "made.safetensors"
        code, text = lrq("quantize", "-i", path, "-o", made, "--int8", "--rounding", "nearest", *options)
        return code, text, load(made.read_bytes()) if made.exists() else {}

    return run


def weights(path) -> dict[str, torch.Tensor]:
    """The tensors of a file, its layers dequantized."""
    with SafetensorsFile(path) as source:
        plain = DecodedSource(source)
        return {name: plain.read(name).float() for name in plain.tensors}


def error(made: torch.Tensor, weight: torch.Tensor) -> float:
    return ((made - weight.float()).norm() / weight.float().norm()).item()


# https://github.com/Comfy-Org/ComfyUI/issues/15511: a UMT5 of FP8 with a scale per row and no mark gave other videos than asked
@pytest.mark.parametrize("per_row", [False, True])
def test_fp8_without_any_mark(flux, layers, scaled_fp8, lrq, write, tmp_path, per_row):
    path = write(scaled_fp8(per_row=per_row))
    assert "layer JSON is missing; lrq migrate adds it" in lrq("inspect", path)[1]
    code, text = lrq("verify", path)
    assert code == 1
    assert text.count("so ComfyUI ignores it; run lrq migrate") == len(layers)
    made = tmp_path / "migrated.safetensors"
    assert lrq("migrate", "-i", path, "-o", made)[0] == 0
    assert lrq("verify", made)[0] == 0
    assert all(error(weights(made)[f"{layer}.weight"], flux[f"{layer}.weight"]) < 0.04 for layer in layers)


# the same report: NVFP4 without layer JSON crashed in the product
def test_nvfp4_without_any_mark(flux, lrq, quantize, write):
    made = quantize_tensors(
        flux, Recipe(format="nvfp4", rounding="nearest", preset="flux", layer_config='{"_blocks": "nvfp4"}')
    )
    path = write({name: tensor for name, tensor in made.tensors.items() if not name.endswith(".comfy_quant")})
    code, text = lrq("verify", path)
    assert code == 1
    assert "NVFP4 without layer JSON" in text
    assert quantize(path, "--requantize")[0] == 1


# https://github.com/Comfy-Org/ComfyUI/issues/11665: no backend multiplies FP8 with a scale in bfloat16
def test_fp8_scales_in_bfloat16(flux, layers, scaled_fp8, lrq, write, tmp_path):
    tensors = scaled_fp8(dtype=torch.bfloat16)
    path = write(tensors | {f"{layer}.comfy_quant": json_tensor({"format": "float8_e4m3fn"}) for layer in layers})
    text = lrq("inspect", path)[1]
    assert "lrq verify names them" in text
    assert "newer loads it" not in text
    code, text = lrq("verify", path)
    assert code == 1
    assert "weight_scale torch.bfloat16" in text
    made = tmp_path / "migrated.safetensors"
    assert lrq("migrate", "-i", path, "-o", made)[0] == 0
    assert lrq("verify", made)[0] == 0
    assert {load_file(made)[f"{layer}.weight_scale"].dtype for layer in layers} == {torch.float32}


# https://github.com/Comfy-Org/ComfyUI/issues/11864: files whose layers are listed in the header alone, some in full precision
def test_layer_json_in_the_header_alone(flux, layers, scaled_fp8, lrq, quantize, write):
    config = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    path = write(scaled_fp8(), **{HEADER: json.dumps({"layers": dict.fromkeys(layers, config)})})
    assert "Stock ComfyUI 0.3.75 and newer loads it" in lrq("inspect", path)[1]
    code, text = lrq("verify", path)
    assert code == 0
    assert f"OK, {len(layers)} quantized layers" in text
    code, _, _made = quantize(path, "--requantize")
    assert code == 0
    with safe_open(path.with_name("made.safetensors"), "pt") as file:
        listed = json.loads(file.metadata()[HEADER])["layers"]
    assert {config["format"] for config in listed.values()} == {"int8_tensorwise"}
    assert listed.keys() == set(layers)


# https://github.com/Comfy-Org/ComfyUI/issues/11310: "unet unexpected: ['scaled_fp8']"
def test_marker_left_beside_layer_json(layers, scaled_fp8, lrq, write, tmp_path):
    tensors = scaled_fp8() | {f"{layer}.comfy_quant": json_tensor({"format": "float8_e4m3fn"}) for layer in layers}
    path = write(tensors | {"scaled_fp8": torch.zeros(2).to(FP8)})
    assert lrq("verify", path)[0] == 0
    assert lrq("migrate", "-i", path, "-o", tmp_path / "migrated.safetensors")[0] == 0
    assert "scaled_fp8" not in load_file(tmp_path / "migrated.safetensors")


# https://github.com/Comfy-Org/ComfyUI/pull/13239: the marker of one part of a checkpoint, here of its text encoder
def test_marker_of_one_part_of_a_checkpoint(flux, scaled_fp8, lrq, quantize, write):
    encoder = {"model.layers.0.mlp.up_proj.weight": torch.ones(32, 16).to(FP8)}
    encoder |= {"model.layers.0.mlp.up_proj.scale_weight": torch.tensor(0.5), "scaled_fp8": torch.zeros(0).to(FP8)}
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in flux.items()}
    path = write(tensors | {ENCODER + name: tensor for name, tensor in encoder.items()})
    assert lrq("verify", path)[0] == 0
    code, _, made = quantize(path, "--requantize")
    assert code == 0
    assert not [name for name in made if name.endswith(("scaled_fp8", "scale_weight"))]
    assert torch.equal(made[f"{ENCODER}model.layers.0.mlp.up_proj.weight"].float(), torch.full((32, 16), 0.5))


# https://github.com/Haoming02/sd-webui-forge-classic/issues/1362: an INT8 file with the input scales of its FP8 source
def test_input_scales_do_not_reach_an_int8_file(layers, scaled_fp8, quantize, write):
    tensors = scaled_fp8("scale_weight") | {f"{layer}.scale_input": torch.tensor(0.01) for layer in layers}
    code, _, made = quantize(write(tensors | {"scaled_fp8": torch.zeros(2).to(FP8)}), "--requantize")
    assert code == 0
    assert not [name for name in made if "input" in name]


# https://github.com/anveshane/Comfyui_turbodiffusion/issues/40: INT8 as int8_weight and scale, in torch's checkpoint wrapper
def test_int8_weights_of_turbodiffusion(flux, layers, lrq, quantize, write):
    tensors = {}
    for name, tensor in flux.items():
        layer, _, suffix = name.rpartition(".")
        wrapped = name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.")
        if layer in layers and suffix == "weight":
            base = wrapped.removesuffix("weight")
            tensors |= {f"{base}int8_weight": (tensor * 100).to(torch.int8), f"{base}scale": torch.full((1,), 0.01)}
        else:
            tensors[wrapped] = tensor
    path = write(tensors)
    assert "unknown quantization" in lrq("inspect", path)[1]
    assert lrq("verify", path)[0] == 1
    code, text, _ = quantize(path, "--requantize")
    assert code == 1
    assert "no known format has it" in text


# https://github.com/safetensors/safetensors/issues/403 and the report above: names of torch's wrappers in a saved model
@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    ],
    ids=["compile and DataParallel", "checkpoint"],
)
def test_names_of_wrappers(flux, layers, quantize, write, wrap):
    code, text, made = quantize(write({wrap(name): tensor for name, tensor in flux.items()}))
    assert code == 0
    assert "Recognized as Flux.1" in text
    assert {name for name in made if name.rpartition(".")[2] in ("weight", "bias", "scale")} == set(flux)
    assert {f"{layer}.weight_scale" for layer in layers} <= set(made)


def test_two_tensors_of_one_name(flux, quantize, write):
    first = next(iter(flux))
    code, text, made = quantize(write(flux | {f"_orig_mod.{first}": flux[first].clone()}))
    assert code == 1
    assert made == {}
    assert f"contains _orig_mod.{first} and {first}, which are one tensor" in text


def test_a_module_called_module_is_kept(flux, write):
    names = {*flux, "module.weight"}
    with open_source(write(flux | {"module.weight": torch.ones(4, 4)})) as source:
        assert set(source.tensors) == names


# https://github.com/city96/ComfyUI-GGUF/issues/230: architecture "pig" of other converters
# https://github.com/komikndr/raylight/pull/74: GGUF of stable-diffusion.cpp with the prefix of a checkpoint
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_gguf_of_an_unknown_architecture(flux, layers, lrq, quantize, tmp_path, prefix):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "pig.gguf"
    writer = gguf.GGUFWriter(path, "pig")
    for name, tensor in flux.items():
        writer.add_tensor(prefix + name, tensor.float().numpy())
    save_gguf(writer)
    code, text = lrq("inspect", path)
    assert code == 1
    assert "quantize and plan read it" in text
    code, _, made = quantize(path)
    assert code == 0
    assert {f"{prefix}{layer}.weight_scale" for layer in layers} <= set(made)


# https://github.com/Comfy-Org/ComfyUI/issues/12165 and https://github.com/kohya-ss/musubi-tuner/issues/880: a fine-tune of
# Z-Image under diffusers' names, of which ComfyUI makes black pictures
def test_zimage_under_diffusers_names(lrq, quantize, write):
    names = {"all_x_embedder.2-1": (64, 64), "cap_embedder.1": (64, 96), "all_final_layer.2-1.linear": (64, 64)}
    for block in ("layers.0", "noise_refiner.0", "context_refiner.0"):
        names |= {f"{block}.attention.{part}": (64, 64) for part in ("to_q", "to_k", "to_v", "to_out.0")}
        names |= {f"{block}.feed_forward.w{number}": (64, 64) for number in (1, 2, 3)}
        names |= {f"{block}.attention.norm_{part}": (32,) for part in "qk"}
    path = write({f"{name}.weight": torch.ones(shape).bfloat16() for name, shape in names.items()})
    assert "loads it" not in lrq("inspect", path)[1]
    code, text, made = quantize(path)
    assert code == 1
    assert made == {}
    assert "diffusers' layer names" in text


# https://github.com/Comfy-Org/ComfyUI/issues/15602: bytes after the last tensor, with which only some loaders read the file
def test_bytes_after_the_last_tensor(subtests, flux, lrq, write):
    for command in ["inspect", "verify", "plan -i"]:
        with subtests.test(command=command):
            path = write(flux)
            with open(path, "ab") as file:
                file.write(bytes(64))
            code, text = lrq(*command.split(), path)
            assert code == 1
            assert "64 bytes after the last tensor" in text


# https://github.com/Comfy-Org/ComfyUI/issues/9753 (LoKr of PEFT) and
# https://github.com/Comfy-Org/ComfyUI/issues/1144 (LoRA whose names nothing maps)
@pytest.mark.parametrize("ends", [("lokr_w1", "lokr_w2"), ("lora_A.weight", "lora_B.weight")])
def test_differences_to_a_model(layers, lrq, quantize, write, ends):
    path = write({f"base_model.model.{layer}.{end}": torch.ones(16, 64) for layer in layers for end in ends})
    assert "loads it" not in lrq("inspect", path)[1]
    code, text, made = quantize(path)
    assert code == 1
    assert made == {}
    assert "is a LoRA or another difference to a model" in text


# https://github.com/huggingface/diffusers/pull/5316: NaN and Inf of a broken LoRA that was merged
def test_nan_and_inf_of_the_source(subtests, flux, layers, lrq, quantize, write, tmp_path):
    for value in [float("nan"), float("inf")]:
        for suffix in ["weight", "bias"]:
            with subtests.test(value=value, suffix=suffix):
                tensor = flux[f"{layers[3]}.{suffix}"].clone()
                tensor.view(-1)[3] = value
                code, text, _made = quantize(write(flux | {f"{layers[3]}.{suffix}": tensor}), "--overwrite")
                assert code == 0
                assert ("contains NaN or Inf, so it stays unquantized" in text) == (suffix == "weight")
                code, text = lrq("verify", tmp_path / "made.safetensors")
                assert code == 0
                assert f"Unquantized tensors with NaN or Inf, such as {layers[3]}.{suffix}: 1" in text


# https://github.com/Comfy-Org/ComfyUI/issues/12830: "Unsupported quantization format: int8_blockwise"
# https://github.com/BobJohnson24/ComfyUI-INT8-Fast/issues/90: "Unsupported quantization format: int8_tensorwise", ConvRot of 64
# https://github.com/kijai/ComfyUI-KJNodes/issues/682: "KeyError: 'mxfp8'"
def test_formats_that_older_releases_do_not_know(subtests, flux, layers, lrq, write):
    for recipe, support in [
        (Recipe(format="int8_blockwise"), "int8_blockwise only with this node pack installed"),
        (Recipe(format="int8_tensorwise", convrot=64), "Stock ComfyUI 0.27 and newer loads it"),
        (Recipe(format="mxfp8"), "Stock ComfyUI 0.18 and newer loads it"),
    ]:
        with subtests.test(recipe=recipe, support=support):
            made = quantize_tensors(flux, Recipe(**{**recipe.to_dict(), "rounding": "nearest", "preset": "flux"}))
            path = write(made.tensors, **made.metadata)
            assert support in lrq("inspect", path)[1]
            code, text = lrq("verify", path)
            assert code == 0
            assert f"OK, {len(layers)} quantized layers" in text


# https://github.com/sgl-project/sglang/pull/36037 and https://github.com/sgl-project/sglang/pull/36046: text encoders with an
# INT8 embedding, with one scale and with one per row
@pytest.mark.parametrize("per_row", [False, True])
def test_int8_embedding(lrq, quantize, write, per_row):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(200, 64, generator=generator)
    scale = (table.abs().amax(1, keepdim=True) if per_row else table.abs().max()) / 127
    tensors = {
        "model.embed_tokens.weight": (table / scale).round().to(torch.int8),
        "model.embed_tokens.weight_scale": scale,
        "model.embed_tokens.comfy_quant": json_tensor({"format": "int8_tensorwise"}),
        "model.norm.weight": torch.ones(64).bfloat16(),
        "model.layers.0.self_attn.q_norm.weight": torch.ones(64).bfloat16(),
    }
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"):
        tensors[f"model.layers.0.{part}.weight"] = torch.randn(64, 64, generator=generator).bfloat16()
    path = write(tensors)
    assert "Stock ComfyUI 0.33 and newer loads it" in lrq("inspect", path)[1]
    assert lrq("verify", path)[0] == 0
    code, _, made = quantize(path, "--requantize")
    assert code == 0
    assert error(made["model.embed_tokens.weight"].float(), table) < 0.02


# https://github.com/sgl-project/sglang/pull/36046: NVFP4 whose inputs are multiplied by pre_quant_scale
def test_nvfp4_with_an_input_scale_per_channel(flux, layers, lrq, quantize, write, tmp_path):
    made = quantize_tensors(
        flux, Recipe(format="nvfp4", rounding="nearest", preset="flux", layer_config='{"_blocks": "nvfp4"}')
    )
    columns = {layer: flux[f"{layer}.weight"].shape[1] for layer in layers}
    scales = {f"{layer}.pre_quant_scale": torch.full((count,), 2.0).bfloat16() for layer, count in columns.items()}
    path = write(made.tensors | scales, **made.metadata)
    assert lrq("verify", path)[0] == 0
    code, _, result = quantize(path, "--requantize")
    assert code == 0
    assert not [name for name in result if name.endswith("pre_quant_scale")]
    read = weights(tmp_path / "made.safetensors")
    assert all(error(read[f"{layer}.weight"] / 2, flux[f"{layer}.weight"]) < 0.13 for layer in layers)


# https://github.com/Comfy-Org/ComfyUI/issues/6609: NF4 weights of shape [N, 1] loaded as weights; here without their state
def test_nf4_that_lost_its_state(flux, layers, lrq, quantize, write):
    packed = {f"{layer}.weight": torch.zeros(flux[f"{layer}.weight"].numel() // 2, 1).byte() for layer in layers}
    path = write(flux | packed)
    assert lrq("verify", path)[0] == 1
    code, text, made = quantize(path, "--requantize")
    assert code == 1
    assert made == {}
    assert "no scales, so the values are ambiguous" in text


# https://github.com/Comfy-Org/ComfyUI/issues/8859: nunchaku's AWQ text encoder in ComfyUI's loader
def test_awq_text_encoder(lrq, quantize, write):
    tensors = {"shared.weight": torch.ones(50, 64).half(), "encoder.final_layer_norm.weight": torch.ones(64).half()}
    for part in "qkvo":
        layer = f"encoder.block.0.layer.0.SelfAttention.{part}"
        tensors |= {f"{layer}.qweight": torch.zeros(16, 64).short(), f"{layer}.scales": torch.ones(1, 64).half()}
        tensors[f"{layer}.scaled_zeros"] = torch.ones(1, 64).half()
    path = write(tensors)
    assert "AWQ of TinyChat" in lrq("inspect", path)[1]
    assert lrq("verify", path)[0] == 1
    code, text, made = quantize(path, "--requantize")
    assert code == 1
    assert made == {}
    assert "AWQ of TinyChat" in text


# https://github.com/OpenCharAI/OpenChar/pull/53: a quantized text encoder was quantized again
def test_quantized_files_are_not_quantized_again(flux, quantize, write):
    made = quantize_tensors(flux, Recipe(format="int8_tensorwise", convrot=False, rounding="nearest", preset="flux"))
    code, text, result = quantize(write(made.tensors, **made.metadata))
    assert code == 1
    assert result == {}
    assert "is quantized already (int8_tensorwise)" in text
