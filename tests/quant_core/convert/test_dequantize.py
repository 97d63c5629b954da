"""Quantized files as sources: dequantized, quantized again, without leftovers of the old format."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import FORMATS, Recipe, quantize_file, quantize_tensors
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.convert.dequantize import DecodedSource, decode_source
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


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """quantized(format, convrot=None) → path of a file of that format."""
    folder = tmp_path_factory.mktemp("quantized")
    save_file(plain(), folder / "model.safetensors")

    def make(format: str, convrot: int | None = None):
        path = folder / f"{format}_{convrot}.safetensors"
        if not path.exists():
            recipe = Recipe(format=format, convrot=convrot, rounding="nearest")
            quantize_file(folder / "model.safetensors", path, recipe)
        return path

    return make


CASES = [*((format, None) for format in FORMATS), ("int8_tensorwise", 16)]


def test_dequantized_weights_match_the_original(subtests, quantized):
    for format, convrot in CASES:
        with subtests.test(format, convrot=convrot), SafetensorsFile(quantized(format, convrot)) as opened:
            decoded = DecodedSource(opened)
            for name in ("a.weight", "b.weight"):
                most = {"float8_e5m2": 0.1, "nvfp4": 0.15}.get(format, 0.05)
                assert error(decoded.read(name), plain()[name]) < most
                assert decoded.tensors[name].dtype is torch.bfloat16


def test_dequantized_sources_have_the_tensors_of_the_original(subtests, quantized):
    for format, convrot in CASES:
        with subtests.test(format, convrot=convrot), SafetensorsFile(quantized(format, convrot)) as opened:
            assert set(DecodedSource(opened).tensors) == set(plain())


def test_dequantized_layers_are_counted(subtests, quantized):
    for format, convrot in CASES:
        with subtests.test(format, convrot=convrot), SafetensorsFile(quantized(format, convrot)) as opened:
            assert DecodedSource(opened).layers.total() == 2


def test_metadata_of_the_quantization_is_left_out(quantized):
    with SafetensorsFile(quantized("float8_e4m3fn")) as opened:
        assert opened.metadata
        assert not DecodedSource(opened).metadata.keys() & {"learned_rounding", "_quantization_metadata"}


def test_a_source_that_is_not_quantized_is_itself():
    source = TensorSource(plain())
    assert decode_source(source) is source


def test_a_rotation_under_params_is_undone(quantized):
    config = {"format": "int8_tensorwise", "per_row": True, "params": {"convrot": True, "convrot_groupsize": 16}}
    tensors = load_file(quantized("int8_tensorwise", 16)) | {"a.comfy_quant": config_tensor(config)}
    assert error(DecodedSource(TensorSource(tensors)).read("a.weight"), plain()["a.weight"]) < 0.05


def rotated_by_others(size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict]:
    """(weight, tensors of a file, layer JSON), rotated in groups that this project does not choose."""
    weight = torch.randn(8, 8192, generator=torch.Generator().manual_seed(0))
    rotated = Rotation(size).apply(weight)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
    tensors = {
        "a.weight": (rotated / scale).round().to(torch.int8),
        "a.weight_scale": scale,
        "a.comfy_quant": config_tensor(config),
    }
    return weight, tensors, config


def test_rotations_of_other_tools_are_undone(subtests):
    for size in [4, 1024, 4096]:
        with subtests.test(size=size):
            weight, tensors, _ = rotated_by_others(size)
            decoded = DecodedSource(TensorSource(tensors))
            assert dict(decoded.layers) == {f"int8_tensorwise per row, ConvRot {size}": 1}
            assert error(decoded.read("a.weight"), weight) < 0.02


def test_rotations_of_other_tools_are_migrated(subtests, tmp_path):
    for size in [4, 1024, 4096]:
        with subtests.test(size=size):
            _, tensors, config = rotated_by_others(size)
            save_file(tensors, tmp_path / "a.safetensors")
            result = migrate_file(tmp_path / "a.safetensors", tmp_path / f"{size}.safetensors")
            assert dict(result.layers) == {f"int8_tensorwise per row, ConvRot {size}": 1}
            with SafetensorsFile(tmp_path / f"{size}.safetensors") as migrated:
                assert read_config(migrated.read("a.comfy_quant"), "a") == config | {"per_row": True}
            assert verify_file(tmp_path / f"{size}.safetensors").problems == []


def test_the_header_is_read_where_the_tensor_disagrees(subtests, tmp_path):
    """ComfyUI writes the header's JSON over the tensor."""
    for by_header, by_tensor in [(16, None), (None, 16)]:
        with subtests.test(by_header=by_header, by_tensor=by_tensor):
            configs = {convrot: make_codec("int8_tensorwise", "row", convrot=convrot).config for convrot in (None, 16)}
            made = quantize_tensors(
                plain(), Recipe(format="int8_tensorwise", convrot=by_header, rounding="nearest")
            ).tensors
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


QDATA = {
    "scaled_fp8": torch.zeros(0),
    "a.weight": plain()["a.weight"].to(torch.float8_e4m3fn),
    "a.scale_weight": torch.tensor([0.5]),
}


def test_a_scale_of_one_beside_an_unquantized_weight_is_left_out():
    decoded = DecodedSource(TensorSource(QDATA | {"b.weight": plain()["b.weight"], "b.scale_weight": torch.ones(1)}))
    assert torch.equal(decoded.read("b.weight"), plain()["b.weight"])


def test_a_scale_of_an_unquantized_weight_is_not_left_out(sentences):
    """Nor does ``lrq migrate`` leave it out."""
    with sentences.raises(SourceError):
        DecodedSource(TensorSource(QDATA | {"b.weight": plain()["b.weight"], "b.scale_weight": torch.tensor([0.5])}))


def with_scale(scale: torch.Tensor) -> tuple[torch.Tensor, TensorSource]:
    """(quantized values whose row 3 is zero, a source with these scales)"""
    codes = torch.ones(128, 128, dtype=torch.int8).index_fill(0, torch.tensor([3]), 0)
    config = config_tensor({"format": "int8_tensorwise", "per_row": True})
    return codes, TensorSource({"a.weight": codes, "a.weight_scale": scale, "a.comfy_quant": config})


def test_rows_of_zeros_may_have_a_scale_of_zero():
    """quanto and bitsandbytes write such rows."""
    scale = torch.full((128, 1), 0.5).index_fill(0, torch.tensor([3]), 0.0)
    codes, source = with_scale(scale)
    assert torch.equal(DecodedSource(source).read("a.weight").float(), codes * scale)


def test_a_scale_that_is_zero_throughout_is_lost():
    with pytest.raises(SourceError, match="finite and positive"):
        DecodedSource(with_scale(torch.zeros(128, 1))[1]).read("a.weight")


@pytest.fixture
def scaled_fp8(tmp_path):
    """(path of a file of scaled FP8, path of the output, words of a command that quantizes it again)"""
    old = {
        "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
        "a.weight": (plain()["a.weight"].float() * 50).clamp(-448, 448).to(torch.float8_e4m3fn),
        "a.scale_weight": torch.tensor([0.02]),
        "a.scale_input": torch.ones(()),
        "b.weight": plain()["b.weight"],
        "b.bias": torch.ones(64),
    }
    save_file(old, tmp_path / "old.safetensors")
    paths = [tmp_path / "old.safetensors", tmp_path / "new.safetensors"]
    options = ["--format", "int8_tensorwise", "--no-convrot", "--requantize", "--general"]
    return *paths, ["quantize", "-i", str(paths[0]), "-o", str(paths[1]), *options]


def test_scaled_fp8_is_not_quantized_unasked(scaled_fp8):
    with pytest.raises(AlreadyQuantizedError):
        quantize_file(*scaled_fp8[:2], Recipe())


def test_scaled_fp8_becomes_int8(scaled_fp8):
    _, out, words = scaled_fp8
    assert main(words) == 0
    assert verify_file(out).layers == 2
    made = load_file(out)
    assert error(made["a.weight"].float() * made["a.weight_scale"], plain()["a.weight"]) < 0.05


def test_tensors_of_scaled_fp8_are_left_out(scaled_fp8):
    _, out, words = scaled_fp8
    assert main(words) == 0
    assert not [name for name in load_file(out) if "scale_weight" in name or "scale_input" in name or "scaled" in name]


def test_requantizing_is_reported_and_repeatable(scaled_fp8, capsys, sentences):
    assert main(scaled_fp8[2]) == 0
    sentences(capsys.readouterr().out.splitlines()[0])
    assert main(scaled_fp8[2]) == 0
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

    assert not made("first.safetensors").already_done
    assert made("first.safetensors").already_done
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


UNDECODABLE = [
    ({"a.weight": BYTES}, "gguf_q4"),
    ({"a.weight": BYTES}, "nvfp4"),
    ({"a.weight": INT8}, "int8_tensorwise"),
    ({"a.weight": INT8}, None),
    ({"a.weight": BYTES, "a.weight.absmax": torch.ones(64), "a.weight.quant_map": torch.ones(16)}, None),
    ({"a.weight": BYTES, "a.weight_scale": torch.ones(3), "a.weight_scale_2": torch.ones(())}, "nvfp4"),
    ({"a.weight": INT8, "a.weight_scale": torch.ones(64)}, {"format": "convrot_w4a4", "convrot_groupsize": 100}),
    ({"a.weight": BYTES, "a.weight_scale": torch.ones(4)}, {"format": "mxfp8", "orig_shape": [65, 64]}),
    ({"a.weight": BYTES, "a.weight_scale": torch.ones(4)}, {"format": "mxfp8", "orig_shape": "x"}),
]


def test_what_cannot_be_decoded(subtests, sentences):
    for tensors, format in UNDECODABLE:
        config = format if isinstance(format, dict) or format is None else {"format": format}
        json = {"a.comfy_quant": config_tensor(config)} if config else {}
        with subtests.test(str(format), tensors=list(tensors)), sentences.raises(SourceError):
            DecodedSource(TensorSource({**tensors, **json}, name="q.safetensors")).read("a.weight")


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


BANK = "layers.0.mlp.experts.gate_up_proj.weight"


def test_banks_of_experts_are_dequantized_and_quantized_again(subtests, gpt_oss, tmp_path):
    original = gpt_oss()
    save_file(original, tmp_path / "model.safetensors")
    for format in [name for name, entry in FORMATS.items() if entry.banks]:
        recipe = Recipe(format=format, rounding="nearest", preset="none", layer_config=f'{{"experts": "{format}"}}')
        first, again = (tmp_path / f"{format}_{name}.safetensors" for name in ("first", "again"))
        with subtests.test(format):
            quantize_file(tmp_path / "model.safetensors", first, recipe)
            with SafetensorsFile(first) as opened:
                decoded = DecodedSource(opened)
                assert set(decoded.tensors) == set(original)
                assert decoded.tensors[BANK].shape == original[BANK].shape
                read = decoded.read(BANK)
                assert read.dtype is torch.bfloat16
                assert error(read, original[BANK]) < 0.2
                quantize_file(decoded, again, recipe)
            assert verify_file(again).problems == []
            tensors = [load_file(path) for path in (first, again)]
            assert tensors[0].keys() == tensors[1].keys()
            assert error(*(made[BANK].view(torch.uint8) for made in tensors[::-1])) < 0.3
