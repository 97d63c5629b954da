"""Quantized files as sources: dequantized, quantized again, without leftovers of the old format."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import FORMATS, Recipe, quantize_file, quantize_tensors
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.convert.dequantize import DecodedSource
from learned_rounding.quant_core.convert.migrate import migrate_file
from learned_rounding.quant_core.errors import AlreadyQuantizedError, OutputExistsError, SourceError
from learned_rounding.quant_core.formats import Rotation, make_codec
from learned_rounding.quant_core.formats.layer_json import config_tensor, quantization_metadata, read_config
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.sources import SafetensorsFile, TensorSource


def plain():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(64, 128, generator=generator).bfloat16() for name in ("a.weight", "b.weight")} | {
        "norm.weight": torch.ones(64)
    }


def error(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("convrot", [None, 16])
def test_dequantized_weights_match_the_original(tmp_path, format, convrot):
    if convrot and format != "int8_tensorwise":
        pytest.skip("rotates nothing")
    save_file(plain(), tmp_path / "model.safetensors")
    recipe = Recipe(format=format, convrot=convrot, rounding="nearest")
    quantize_file(tmp_path / "model.safetensors", tmp_path / "q.safetensors", recipe)
    with SafetensorsFile(tmp_path / "q.safetensors") as opened:
        decoded = DecodedSource(opened)
        assert set(decoded.tensors) == set(plain()) and not set(decoded.metadata) & {
            "learned_rounding",
            "_quantization_metadata",
        }
        for name in ("a.weight", "b.weight"):
            assert decoded.tensors[name].dtype is torch.bfloat16
            assert error(decoded.read(name), plain()[name]) < {"float8_e5m2": 0.1, "nvfp4": 0.15}.get(format, 0.05)
        assert decoded.layers.total() == 2


def test_a_rotation_under_params_is_undone(tmp_path):
    save_file(plain(), tmp_path / "model.safetensors")
    quantize_file(
        tmp_path / "model.safetensors",
        tmp_path / "q.safetensors",
        Recipe(format="int8_tensorwise", convrot=16, rounding="nearest"),
    )
    config = {"format": "int8_tensorwise", "per_row": True, "params": {"convrot": True, "convrot_groupsize": 16}}
    decoded = DecodedSource(
        TensorSource(load_file(tmp_path / "q.safetensors") | {"a.comfy_quant": config_tensor(config)})
    )
    assert error(decoded.read("a.weight"), plain()["a.weight"]) < 0.05


@pytest.mark.parametrize("size", [4, 1024, 4096])
def test_rotations_of_other_tools_are_undone(tmp_path, size):
    """Groups that this project does not choose; ``lrq migrate`` keeps them."""
    weight = torch.randn(8, 8192, generator=torch.Generator().manual_seed(0))
    rotated = Rotation(size).apply(weight)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
    tensors = {
        "a.weight": (rotated / scale).round().to(torch.int8),
        "a.weight_scale": scale,
        "a.comfy_quant": config_tensor(config),
    }
    decoded = DecodedSource(TensorSource(tensors))
    assert dict(decoded.layers) == {f"int8_tensorwise per row, ConvRot {size}": 1}
    assert error(decoded.read("a.weight"), weight) < 0.02
    save_file(tensors, tmp_path / "a.safetensors")
    result = migrate_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert dict(result.layers) == dict(decoded.layers)
    with SafetensorsFile(tmp_path / "b.safetensors") as migrated:
        assert read_config(migrated.read("a.comfy_quant"), "a") == config | {"per_row": True}
    assert verify_file(tmp_path / "b.safetensors").problems == []


@pytest.mark.parametrize("by_header, by_tensor", [(16, None), (None, 16)])
def test_the_header_is_read_where_the_tensor_disagrees(tmp_path, by_header, by_tensor):
    """ComfyUI writes the header's JSON over the tensor."""
    configs = {convrot: make_codec("int8_tensorwise", "row", convrot=convrot).config for convrot in (None, 16)}
    made = quantize_tensors(plain(), Recipe(format="int8_tensorwise", convrot=by_header, rounding="nearest")).tensors
    made["a.comfy_quant"] = config_tensor(configs[by_tensor])
    disputed = TensorSource(made, {"_quantization_metadata": quantization_metadata({"a": configs[by_header]})})
    assert error(DecodedSource(disputed).read("a.weight"), plain()["a.weight"]) < 0.05


def test_the_header_is_read_for_formats_of_others_too():
    other = {"format": "mxfp8"}
    tensors = {
        "a.weight": torch.zeros(128, 128),
        "a.weight_scale": torch.ones(512),
        "a.comfy_quant": config_tensor({"format": "int8_tensorwise"}),
    }
    decoded = DecodedSource(TensorSource(tensors, {"_quantization_metadata": quantization_metadata({"a": other})}))
    assert dict(decoded.layers) == {"mxfp8 per group of 32": 1}


def test_a_scale_of_a_weight_that_is_no_code_is_not_left_out(sentences):
    """Nor does ``lrq migrate`` leave it out."""
    qdata = {
        "scaled_fp8": torch.zeros(0),
        "a.weight": plain()["a.weight"].to(torch.float8_e4m3fn),
        "a.scale_weight": torch.tensor([0.5]),
    }
    one = DecodedSource(TensorSource(qdata | {"b.weight": plain()["b.weight"], "b.scale_weight": torch.ones(1)}))
    assert torch.equal(one.read("b.weight"), plain()["b.weight"])
    with sentences.raises(SourceError):
        DecodedSource(TensorSource(qdata | {"b.weight": plain()["b.weight"], "b.scale_weight": torch.tensor([0.5])}))


def test_rows_of_zeros_may_have_a_scale_of_zero():
    """quanto and bitsandbytes write such rows; a scale that is zero throughout is lost."""
    scale = torch.full((128, 1), 0.5).index_fill(0, torch.tensor([3]), 0.0)
    codes = torch.ones(128, 128, dtype=torch.int8).index_fill(0, torch.tensor([3]), 0)
    config = config_tensor({"format": "int8_tensorwise", "per_row": True})
    made = {"a.weight": codes, "a.weight_scale": scale, "a.comfy_quant": config}
    assert torch.equal(DecodedSource(TensorSource(made)).read("a.weight").float(), codes * scale)
    with pytest.raises(SourceError, match="finite and positive"):
        DecodedSource(TensorSource(made | {"a.weight_scale": torch.zeros(128, 1)})).read("a.weight")


def test_old_scaled_fp8_becomes_int8(tmp_path, capsys, sentences):
    qdata = (plain()["a.weight"].float() * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
    old = {
        "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
        "a.weight": qdata,
        "a.scale_weight": torch.tensor([0.02]),
    }
    old |= {"a.scale_input": torch.ones(()), "b.weight": plain()["b.weight"], "b.bias": torch.ones(64)}
    save_file(old, tmp_path / "old.safetensors")
    with pytest.raises(AlreadyQuantizedError):
        quantize_file(tmp_path / "old.safetensors", tmp_path / "new.safetensors", Recipe())
    words = [
        "quantize",
        "-i",
        str(tmp_path / "old.safetensors"),
        "-o",
        str(tmp_path / "new.safetensors"),
        "--format",
        "int8_tensorwise",
        "--no-convrot",
        "--requantize",
        "--general",
    ]
    assert main(words) == 0
    sentences(capsys.readouterr().out.splitlines()[0])
    assert verify_file(tmp_path / "new.safetensors").layers == 2
    made = load_file(tmp_path / "new.safetensors")
    assert error(made["a.weight"].float() * made["a.weight_scale"], plain()["a.weight"]) < 0.05
    assert not [name for name in made if "scale_weight" in name or "scale_input" in name or "scaled" in name]
    assert main(words) == 0
    sentences(capsys.readouterr().out)


CHANGES = {
    "other scales": {"a.weight_scale": torch.full((32, 1), 5.0)},
    "the scale of one row": {"a.weight_scale": torch.full((32, 1), 0.01).index_fill(0, torch.tensor([7]), 0.02)},
    "a rotation": {
        "a.comfy_quant": config_tensor(
            {"format": "int8_tensorwise", "per_row": True, "convrot": True, "convrot_groupsize": 16}
        )
    },
    "the JSON in the header alone": {
        "_quantization_metadata": '{"layers": {"a": {"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 16}}}'
    },
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_scales_and_rotation_are_part_of_the_source(tmp_path, change, sentences):
    """The same quantized values with other scales or rotations are another source; the output is made again."""
    qdata = torch.randint(-127, 128, (32, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    config = config_tensor({"format": "int8_tensorwise", "per_row": True})
    first = {"a.weight": qdata, "a.weight_scale": torch.full((32, 1), 0.01), "a.comfy_quant": config}
    texts = {name: value for name, value in change.items() if isinstance(value, str)}
    other = first | change if not texts else {name: tensor for name, tensor in first.items() if name != "a.comfy_quant"}
    save_file(first, tmp_path / "first.safetensors")
    save_file(other, tmp_path / "other.safetensors", texts)

    def made(name):
        with SafetensorsFile(tmp_path / name) as opened:
            recipe = Recipe(rounding="nearest", preset="none")
            return quantize_file(DecodedSource(opened), tmp_path / "out.safetensors", recipe, device="cpu")

    assert not made("first.safetensors").already_done and made("first.safetensors").already_done
    with sentences.raises(OutputExistsError):
        made("other.safetensors")


def place(row, block, blocks):
    """Where cuBLAS looks for the scale of a block: tiles of 128 rows × 4 blocks, in them 32 rows of 4 × 4."""
    tile = row // 128 * -(-blocks // 4) + block // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


def test_scales_of_blocks_are_found_in_their_tiles(tmp_path):
    out, inner = 160, 192
    generator = torch.Generator().manual_seed(0)
    exponents, qdata = (
        torch.zeros(2 * 2 * 512, dtype=torch.uint8),
        torch.randn(out, inner, generator=generator).to(torch.float8_e4m3fn),
    )
    wanted = qdata.float()
    for row in range(out):
        for block in range(inner // 32):
            exponent = (row * 7 + block * 3) % 21 - 10
            exponents[place(row, block, inner // 32)] = exponent + 127
            wanted[row, block * 32 : block * 32 + 32] *= 2.0**exponent
    config = {"format": "mxfp8", "orig_shape": [150, inner]}
    save_file(
        {"a.weight": qdata, "a.weight_scale": exponents.reshape(256, 8), "a.comfy_quant": config_tensor(config)},
        tmp_path / "q.safetensors",
    )
    with SafetensorsFile(tmp_path / "q.safetensors") as opened:
        assert torch.equal(DecodedSource(opened).read("a.weight"), wanted[:150].bfloat16())


def test_smoothed_inputs_are_folded_into_the_weight():
    """ComfyUI multiplies the inputs of such a layer by ``pre_quant_scale``."""
    tensors = {
        "a.weight": torch.full((128, 32), 0x24, dtype=torch.uint8),  # 1 and 2, the high half first
        "a.weight_scale": torch.full((128, 4), 3.0).to(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.tensor(0.5),
        "a.pre_quant_scale": torch.arange(64.0),
        "a.comfy_quant": config_tensor({"format": "nvfp4"}),
    }
    decoded = DecodedSource(TensorSource(tensors))
    assert torch.equal(decoded.read("a.weight").float()[7], torch.tensor([1.5, 3.0]).repeat(32) * torch.arange(64.0))
    assert [*decoded.tensors] == ["a.weight"]


PLAIN = {"a.weight": plain()["a.weight"], "a.bias": torch.ones(64).bfloat16()}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_without_scales_is_dequantized_by_its_dtype(tmp_path, capsys, dtype, sentences):
    """A common download: the weights of a model, and perhaps its biases, turned to FP8 by themselves."""
    qdata = {name: tensor.to(dtype) for name, tensor in PLAIN.items()}
    save_file(qdata, tmp_path / "plain.safetensors")
    words = [
        "quantize",
        "-i",
        str(tmp_path / "plain.safetensors"),
        "-o",
        str(tmp_path / "new.safetensors"),
        "--general",
    ]
    words += ["--format", "int8_tensorwise", "--no-convrot"]
    assert main(words) == 1
    sentences(capsys.readouterr().err)
    assert main([*words, "--requantize"]) == 0
    sentences(capsys.readouterr().out.splitlines()[0])
    assert verify_file(tmp_path / "new.safetensors").problems == []
    made = load_file(tmp_path / "new.safetensors")
    assert error(made["a.weight"].float() * made["a.weight_scale"], qdata["a.weight"]) < 0.02
    assert torch.equal(made["a.bias"], PLAIN["a.bias"])


def test_one_layer_without_a_scale_among_scaled_ones():
    qdata = {name: plain()[name].to(torch.float8_e4m3fn) for name in ("a.weight", "b.weight")}
    decoded = DecodedSource(
        TensorSource({"scaled_fp8": torch.zeros(0), **qdata, "a.scale_weight": torch.tensor([0.5])})
    )
    assert torch.equal(decoded.read("a.weight"), (qdata["a.weight"].float() * 0.5).bfloat16())
    assert torch.equal(decoded.read("b.weight"), qdata["b.weight"].bfloat16())
    assert dict(decoded.layers) == {"float8_e4m3fn per tensor": 1, "F8_E4M3 without scales": 1}


BYTES, INT8 = torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.int8)


@pytest.mark.parametrize(
    "tensors, format",
    [
        ({"a.weight": BYTES}, "gguf_q4"),
        ({"a.weight": BYTES}, "nvfp4"),
        ({"a.weight": INT8}, "int8_tensorwise"),
        ({"a.weight": INT8}, None),
        ({"a.weight": BYTES, "a.weight.absmax": torch.ones(64), "a.weight.quant_map": torch.ones(16)}, None),
        ({"a.weight": BYTES, "a.weight_scale": torch.ones(3), "a.weight_scale_2": torch.ones(())}, "nvfp4"),
        ({"a.weight": INT8, "a.weight_scale": torch.ones(64)}, {"format": "convrot_w4a4", "convrot_groupsize": 100}),
        ({"a.weight": BYTES, "a.weight_scale": torch.ones(4)}, {"format": "mxfp8", "orig_shape": [65, 64]}),
        ({"a.weight": BYTES, "a.weight_scale": torch.ones(4)}, {"format": "mxfp8", "orig_shape": "x"}),
    ],
)
def test_what_cannot_be_decoded(tmp_path, tensors, format, sentences):
    config = format if isinstance(format, dict) or format is None else {"format": format}
    json = {"a.comfy_quant": config_tensor(config)} if config else {}
    save_file({**tensors, **json}, tmp_path / "q.safetensors")
    with SafetensorsFile(tmp_path / "q.safetensors") as opened, sentences.raises(SourceError):
        DecodedSource(opened).read("a.weight")


def test_what_is_not_decoded_is_not_promised_to_be(sentences):
    qdata = TensorSource({"a.weight": BYTES, "a.weight.absmax": torch.ones(64)})
    with sentences.raises(AlreadyQuantizedError):
        Recipe().plan(qdata)


def test_a_plain_file_is_read_as_it_is(tmp_path, capsys):
    save_file(plain(), tmp_path / "model.safetensors")
    outputs = []
    for words in (["--requantize"], []):
        assert main(["plan", "-i", str(tmp_path / "model.safetensors"), "--general", *words]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("format", [name for name, entry in FORMATS.items() if entry.banks])
def test_banks_of_experts_are_dequantized_and_quantized_again(gpt_oss, tmp_path, format):
    original = gpt_oss()
    save_file(original, tmp_path / "model.safetensors")
    recipe = Recipe(format=format, rounding="nearest", preset="none", layer_config=f'{{"experts": "{format}"}}')
    quantize_file(tmp_path / "model.safetensors", tmp_path / "q.safetensors", recipe)
    name = "layers.0.mlp.experts.gate_up_proj.weight"
    with SafetensorsFile(tmp_path / "q.safetensors") as opened:
        decoded = DecodedSource(opened)
        assert decoded.tensors[name].shape == original[name].shape and set(decoded.tensors) == set(original)
        read = decoded.read(name)
        assert read.dtype is torch.bfloat16 and error(read, original[name]) < 0.2
        quantize_file(decoded, tmp_path / "again.safetensors", recipe)
    first, again = (load_file(tmp_path / f"{file}.safetensors") for file in ("q", "again"))
    assert first.keys() == again.keys() and verify_file(tmp_path / "again.safetensors").problems == []
    assert error(again[name].view(torch.uint8), first[name].view(torch.uint8)) < 0.3
