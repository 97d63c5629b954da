"""Formats of other quantizers, built by their specifications: read with the right values, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.convert import DecodedSource, migrate_file
from learned_rounding.quant_core.errors import AlreadyQuantizedError, SourceError
from learned_rounding.quant_core.formats.companions import PACKED_DTYPES, find_unknown_companions, is_weight_scale
from learned_rounding.quant_core.formats.external import EXTERNAL, find_external, plain_metadata
from learned_rounding.quant_core.formats.kinds import can_dequantize, quantized_formats
from learned_rounding.quant_core.formats.layer_json import config_tensor
from learned_rounding.quant_core.output import inspect_file, verify_file
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo, TensorSource
from learned_rounding.tests.architectures import architectures, read

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
OUT, INNER = 160, 192  # neither a multiple of 128, INNER one of 64
LAYER = "blocks.0.mlp"
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FP4 = [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]  # of codes 0…7; the next eight are the negatives
FP4 += [-value for value in FP4]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def zeros(dtype, *shape):
    return torch.zeros(shape, dtype=dtype)


def js(value) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def hugging_face(dtype=torch.float32, name="weight_scale_inv"):
    """(tensors, weight): the value of every element times the scale of its block of 128 × 128."""
    q = (random(OUT, INNER) * 20).to(E4M3)
    scale = (random(2, 2, seed=1).abs() + 0.1).to(dtype)
    weight = torch.tensor(
        [[float(q[r, c]) * float(scale[r // 128, c // 128]) for c in range(INNER)] for r in range(OUT)]
    )
    return {f"{LAYER}.weight": q, f"{LAYER}.{name}": scale}, weight


def hugging_face_static():
    """One scale per tensor and one for activations, as of Ministral 3."""
    q = (random(OUT, INNER) * 20).to(E4M3)
    scale = torch.tensor(0.25, dtype=torch.bfloat16)
    tensors = {f"{LAYER}.weight": q, f"{LAYER}.weight_scale_inv": scale, f"{LAYER}.activation_scale": torch.tensor(0.5)}
    return tensors, q.float() / 4


def quanto(dtype=torch.int8):
    q = (random(OUT, INNER) * 30).to(dtype)
    scale = (random(OUT, 1, seed=1).abs() + 0.1).bfloat16()
    tensors = {f"{LAYER}.weight._data": q, f"{LAYER}.weight._scale": scale}
    tensors |= {f"{LAYER}.input_scale": torch.ones(()), f"{LAYER}.output_scale": torch.ones(())}
    return tensors, q.float() * scale.float()


def bitsandbytes_4_bit(kind="nf4", nested=False, blocksize=64):
    """Blocks run over the flattened weight; the first of two values is in the high four bits."""
    table = torch.tensor(NF4 if kind == "nf4" else FP4)
    codes = integers(0, 16, OUT * INNER)
    blocks = OUT * INNER // blocksize
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": "bfloat16", "shape": [OUT, INNER]}
    name = f"{LAYER}.weight"
    tensors = {name: (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None], f"{name}.quant_map": table}
    absmax = random(blocks, seed=1).abs() + 0.1
    if nested:
        indices, big, numbers = integers(0, 256, blocks), random(-(-blocks // 256), seed=2).abs(), random(256, seed=3)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.625}
        absmax = torch.tensor([float(numbers[i] * big[n // 256]) + 0.625 for n, i in enumerate(indices.tolist())])
        tensors |= {f"{name}.absmax": indices.to(torch.uint8)}
        tensors |= {f"{name}.nested_absmax": big, f"{name}.nested_quant_map": numbers}
    else:
        tensors[f"{name}.absmax"] = absmax
    tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = js(state)
    weight = torch.tensor([float(table[code] * absmax[n // blocksize]) for n, code in enumerate(codes.tolist())])
    return tensors, weight.reshape(OUT, INNER)


def bitsandbytes_int8():
    q, largest = integers(-127, 128, OUT, INNER).to(torch.int8), random(OUT, seed=1).abs() + 0.1
    tensors = {
        f"{LAYER}.weight": q,
        f"{LAYER}.SCB": largest,
        f"{LAYER}.weight_format": torch.zeros((), dtype=torch.uint8),
    }
    return tensors, q.float() * (largest / 127)[:, None]


def packed(bits=4, groups=3):
    """Value 0 is 2^(bits - 1), and the first value of a word is in its lowest bits."""
    q = integers(-(2 ** (bits - 1)), 2 ** (bits - 1), OUT, INNER)
    words = torch.zeros(OUT, INNER * bits // 32, dtype=torch.int64)
    for column in range(INNER):
        words[:, column * bits // 32] |= (q[:, column] + 2 ** (bits - 1)) << column * bits % 32
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    scale = (random(OUT, groups, seed=1).abs() + 0.1).bfloat16()
    weight = q.float() * scale.float().repeat_interleave(INNER // groups, dim=1)
    tensors = {f"{LAYER}.weight_packed": words, f"{LAYER}.weight_scale": scale}
    return tensors | {f"{LAYER}.weight_shape": torch.tensor([OUT, INNER])}, weight


def packed_fp4():
    codes, scale = integers(0, 16, OUT, INNER), (random(OUT, INNER // 16, seed=1).abs() * 100 + 1).to(E4M3)
    level = torch.tensor([512.0])
    tensors = {f"{LAYER}.weight_packed": (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)}
    tensors |= {f"{LAYER}.weight_scale": scale, f"{LAYER}.weight_global_scale": level}
    tensors |= {f"{LAYER}.input_global_scale": torch.ones(1)}
    return tensors, torch.tensor(E2M1)[codes] * (scale.float() / 512).repeat_interleave(16, dim=1)


TORCHAO = {
    f"{LAYER}.weight": json.dumps({"_type": "Float8Tensor", "_data": {"block_size": [1, INNER]}}),
    "tensor_names": json.dumps([f"{LAYER}.weight", "norm.weight"]),
    "norm.weight": json.dumps({"_type": "Tensor"}),
}

TORCHAO_INT8 = TORCHAO | {f"{LAYER}.weight": json.dumps({"_type": "Int8Tensor"})}


def torchao():
    q, scale = (random(OUT, INNER) * 20).to(E4M3), random(OUT, 1, seed=1).abs() + 0.1
    return {f"{LAYER}._weight_qdata": q, f"{LAYER}._weight_scale": scale}, q.float() * scale


def torchao_int8():
    q, scale = integers(-127, 128, OUT, INNER).to(torch.int8), random(OUT, 1, seed=1).abs() + 0.1
    tensors = {f"{LAYER}._weight_qdata": q, f"{LAYER}._weight_scale": scale}
    return tensors | {f"{LAYER}._weight_zero_point": zeros(torch.int8, OUT, 1)}, q.float() * scale


def w8a8():
    """Unpacked 8-bit weights of compressed-tensors have the names of ComfyUI's formats, and no JSON."""
    q, scale = integers(-127, 128, OUT, INNER).to(torch.int8), (random(OUT, 1, seed=1).abs() + 0.1).bfloat16()
    return {f"{LAYER}.weight": q, f"{LAYER}.weight_scale": scale}, q.float() * scale.float()


READ = {  # case: (tensors and weight, metadata, format, name in inspect, ComfyUI's format after migrate or None)
    "Hugging Face": (hugging_face(), {}, "Hugging Face FP8", "float8_e4m3fn_blockwise"),
    "Hugging Face, bfloat16 scales": (hugging_face(torch.bfloat16), {}, "Hugging Face FP8", "float8_e4m3fn_blockwise"),
    "Hugging Face, powers of two": (
        hugging_face(torch.float8_e8m0fnu),
        {},
        "Hugging Face FP8",
        "float8_e4m3fn_blockwise",
    ),
    "Hugging Face, static": (hugging_face_static(), {}, "Hugging Face FP8", "float8_e4m3fn"),
    "DeepSeek": (hugging_face(name="scale"), {}, "DeepSeek FP8", "float8_e4m3fn_blockwise"),
    "quanto INT8": (quanto(), {}, "quanto", "int8_tensorwise"),
    "quanto FP8": (quanto(E4M3), {}, "quanto", "float8_e4m3fn_rowwise"),
    "NF4": (bitsandbytes_4_bit(), {}, "bitsandbytes NF4", None),
    "NF4, nested": (bitsandbytes_4_bit(nested=True), {}, "bitsandbytes NF4", None),
    "FP4": (bitsandbytes_4_bit("fp4", blocksize=128), {}, "bitsandbytes FP4", None),
    "INT8 of bitsandbytes": (bitsandbytes_int8(), {}, "bitsandbytes INT8", "int8_tensorwise"),
    "packed 4 bits": (packed(), {}, "compressed-tensors packed INT", None),
    "packed 8 bits, per row": (packed(8, 1), {}, "compressed-tensors packed INT", None),
    "packed FP4": (packed_fp4(), {}, "compressed-tensors NVFP4", None),
    "torchao": (torchao(), TORCHAO, "torchao", "float8_e4m3fn_rowwise"),
    "torchao INT8": (
        torchao_int8(),
        TORCHAO_INT8,
        "torchao",
        "int8_tensorwise",
    ),
    "W8A8": (w8a8(), {}, "INT8 without layer JSON", "int8_tensorwise"),
}
CASES = pytest.mark.parametrize("made, metadata, name, native", READ.values(), ids=READ)


@pytest.fixture
def file(tmp_path):
    def save(tensors, metadata=None):
        beside = {"norm.weight": torch.ones(INNER), f"{LAYER}.bias": torch.ones(OUT)}
        save_file(tensors | beside, tmp_path / "q.safetensors", metadata or None)
        return tmp_path / "q.safetensors"

    return save


@CASES
def test_weights_are_those_of_the_specification(file, made, metadata, name, native):
    tensors, weight = made
    with SafetensorsFile(file(tensors, metadata)) as opened:
        assert quantized_formats(opened) == [name] and can_dequantize(opened)
        decoded = DecodedSource(opened)
        assert set(decoded.tensors) == {f"{LAYER}.weight", f"{LAYER}.bias", "norm.weight"} and not decoded.metadata
        assert decoded.tensors[f"{LAYER}.weight"] == TensorInfo(torch.bfloat16, (OUT, INNER))
        assert torch.equal(decoded.read(f"{LAYER}.weight"), weight.bfloat16())
        assert list(decoded.layers.values()) == [1] and quantized_formats(decoded) == []


@CASES
def test_inspect_names_the_format(file, made, metadata, name, native):
    found = inspect_file(file(made[0], metadata))
    assert found.quantized == {name: 1} and found.layers == {name: {"blocks.*.mlp": 1}}
    assert name in found.stock and "Stock ComfyUI loads" not in found.stock
    assert "requantize" in found.stock or "migrate" in found.stock
    problems = verify_file(found.path).problems
    if made is READ["W8A8"][0]:  # in our names: the weight and its scale are reported each
        assert len(problems) == 2
    else:
        (problem,) = problems
        assert problem.startswith(f"Layers in {name}: 1. ")


@CASES
def test_requantize_from_the_command_line(file, tmp_path, capsys, made, metadata, name, native):
    path = file(made[0], metadata)
    words = ["quantize", "-i", str(path), "-o", str(tmp_path / "new.safetensors"), "--format", "int8_tensorwise"]
    words += ["--no-convrot", "--preset", "none"]
    assert main(words) == 1 and name in capsys.readouterr().err
    assert main([*words, "--requantize"]) == 0
    new = load_file(tmp_path / "new.safetensors")
    weight = new[f"{LAYER}.weight"].float() * new[f"{LAYER}.weight_scale"]
    assert (weight - made[1]).norm() / made[1].norm() < 0.02
    assert verify_file(tmp_path / "new.safetensors").problems == []
    assert not [key for key in new if "_data" in key or "absmax" in key or "inv" in key]


@CASES
def test_migrate_keeps_the_values(file, tmp_path, sentences, made, metadata, name, native):
    path, new = file(made[0], metadata), tmp_path / "new.safetensors"
    if native is None:
        with sentences.raises(SourceError):
            migrate_file(path, new)
        return
    migrate_file(path, new)
    assert verify_file(new).problems == []
    with SafetensorsFile(new) as opened:
        assert quantized_formats(opened) == [native] and "tensor_names" not in opened.metadata
        assert torch.equal(DecodedSource(opened).read(f"{LAYER}.weight"), made[1].bfloat16())
        assert (f"{LAYER}.input_scale" in opened.tensors) == (made is READ["Hugging Face, static"][0])


SDNQ = {"weight": zeros(E4M3, OUT, INNER), "scale": torch.ones(OUT, 1)}
PER_ROW = {"weight": zeros(torch.int8, OUT, INNER), "weight_scale": torch.ones(OUT, 1)}
REFUSED = {  # case: (tensors by last part of the name, name of the format)
    "SDNQ": (SDNQ, "SDNQ"),
    "SDNQ, asymmetric": (
        {"weight": zeros(torch.uint8, OUT, INNER), "scale": torch.ones(OUT, 1), "zero_point": torch.ones(OUT, 1)},
        "SDNQ",
    ),
    "SDNQ, low rank": (SDNQ | {"svd_up": torch.ones(OUT, 8), "svd_down": torch.ones(8, INNER)}, "SDNQ"),
    "SDNQ, groups": ({"weight": zeros(torch.int8, OUT, 3, 64), "scale": torch.ones(OUT, 3, 1)}, "SDNQ"),
    "nunchaku": (
        {"qweight": zeros(torch.int8, OUT, INNER // 2), "wscales": torch.ones(INNER // 64, OUT)}
        | {"lora_down": torch.ones(INNER, 32), "lora_up": torch.ones(OUT, 32), "smooth_factor": torch.ones(INNER)},
        "nunchaku SVDQuant",
    ),
    "GPTQ": (
        {"qweight": zeros(torch.int32, INNER // 8, OUT), "qzeros": zeros(torch.int32, 2, OUT // 8)}
        | {"scales": torch.ones(2, OUT), "g_idx": zeros(torch.int32, INNER)},
        "GPTQ",
    ),
    "AWQ": (
        {"qweight": zeros(torch.int32, INNER, OUT // 8), "qzeros": zeros(torch.int32, 2, OUT // 8)}
        | {"scales": torch.ones(2, OUT)},
        "AWQ",
    ),
    "AWQ of TinyChat": (
        {"qweight": zeros(torch.int16, OUT // 4, INNER), "scales": torch.ones(2, OUT), "scaled_zeros": torch.ones(2, OUT)},
        "AWQ of TinyChat",
    ),
    "quanto INT4": (
        {"weight._data._data": zeros(torch.uint8, OUT, INNER // 2), "weight._scale": torch.ones(OUT, 1)}
        | {"weight._shift": torch.ones(OUT, 1)},
        "quanto",
    ),
    "torchao INT4": (
        {"_weight_qdata": zeros(torch.uint8, OUT, INNER // 2), "_weight_scale": torch.ones(2, OUT)},
        "torchao",
    ),
    "NVFP4 of ModelOpt": (
        {"weight": zeros(torch.uint8, OUT, INNER // 2), "weight_scale": torch.ones(OUT, INNER // 16).to(E4M3)}
        | {"weight_scale_2": torch.tensor(1.0), "input_scale": torch.tensor(1.0)},
        "NVFP4 without layer JSON",
    ),
    "bitsandbytes without state": (
        {"weight": zeros(torch.uint8, OUT * INNER // 2, 1), "weight.absmax": torch.ones(480)},
        "bitsandbytes",
    ),
    "bitsandbytes INT8, tiles": (
        {"weight": zeros(torch.int8, OUT, INNER), "SCB": torch.ones(OUT), "weight_format": torch.tensor(2)},
        "bitsandbytes",
    ),
    "compressed-tensors, sparse": ({"weight_packed": zeros(torch.int32, OUT, 12)}, "compressed-tensors"),
    "Hugging Face experts": (
        {"gate_up_proj": zeros(E4M3, 4, OUT, INNER), "gate_up_proj_scale_inv": torch.ones(4, 2, 2)},
        "Hugging Face FP8 experts",
    ),
    "MXFP4": (
        {"down_proj_blocks": zeros(torch.uint8, 4, OUT, 6, 16), "down_proj_scales": zeros(torch.uint8, 4, OUT, 6)},
        "MXFP4",
    ),
    "HQQ": ({"W_q": zeros(torch.uint8, OUT // 2, INNER), "scale": torch.ones(OUT, 1)}, "HQQ"),
    # Companions of quantized values in no known way.
    "zero points": (PER_ROW | {"weight_zero_point": torch.ones(OUT, 1, dtype=torch.int8)}, "an unknown quantization"),
    "smoothing": (PER_ROW | {"smooth_scale": torch.ones(INNER)}, "an unknown quantization"),
    "rotation": (PER_ROW | {"weight_rotation.matrix": torch.eye(16)}, "an unknown quantization"),
    "low rank": (PER_ROW | {"lora_A.weight": torch.ones(8, INNER)}, "an unknown quantization"),
    "FP8, another scale": (
        {"weight": zeros(E4M3, OUT, INNER), "weight_multiplier": torch.ones(OUT, 1)},
        "an unknown quantization",
    ),
    "FP8, scale below the layer": (
        {"weight": zeros(E4M3, OUT, INNER), "weight_quantizer._scale": torch.ones(())},
        "an unknown quantization",
    ),
    "FP8 by another name": (
        {"float8_data": zeros(E4M3, OUT, INNER), "scale": torch.ones(()), "scale_reciprocal": torch.ones(())},
        "an unknown quantization",
    ),
    "FP8, scale below the weight": (
        {"weight": zeros(E4M3, OUT, INNER), "weight.weight_scale": torch.full((), 0.5)},
        "an unknown quantization",
    ),
    "FP8, zero points": (
        {"weight": zeros(E4M3, OUT, INNER), "weight_scale": torch.ones(OUT, 1)}
        | {"weight_zero_point": torch.ones(OUT, 1).to(E4M3)},
        "an unknown quantization",
    ),
    "MXFP8 of ModelOpt": (
        {"weight": zeros(E4M3, OUT, INNER), "weight_scale": zeros(torch.uint8, OUT, INNER // 32)},
        "E4M3 without layer JSON",
    ),
    "INT8, groups": (
        {"weight": zeros(torch.int8, OUT, INNER), "weight_scale": torch.ones(OUT, 3)},
        "INT8 without layer JSON",
    ),
    "FP8, convolution": (
        {"weight": zeros(E4M3, OUT, INNER, 3, 3), "weight_scale": torch.full((), 0.5)},
        "E4M3 without layer JSON",
    ),
    "old FP8, convolution": (
        {"weight": zeros(E4M3, OUT, INNER, 3, 3), "scale_weight": torch.full((), 0.5)},
        "scaled fp8 (old)",
    ),
    "Hugging Face, E5M2": ({"weight": zeros(E5M2, OUT, INNER), "weight_scale_inv": torch.ones(2, 2)}, "Hugging Face FP8"),
    "packed, unknown": ({"qdata": zeros(torch.int32, OUT, 24), "scales": torch.ones(OUT)}, "an unknown quantization"),
    "Hugging Face, zero points": (
        {"weight": zeros(E4M3, OUT, INNER), "weight_scale_inv": torch.ones(2, 2), "zero_point": torch.ones(2, 2)},
        "an unknown quantization",
    ),
    "packed, order of activations": (
        {key.removeprefix(f"{LAYER}."): tensor for key, tensor in packed()[0].items()}
        | {"weight_g_idx": zeros(torch.int32, INNER)},
        "an unknown quantization",
    ),
    "integers": ({"weight": zeros(torch.int8, OUT, INNER)}, "plain INT8 weights"),
    "bytes": ({"weight": zeros(torch.uint8, OUT, INNER)}, "plain UINT8 weights"),
    "words": ({"weight": zeros(torch.int32, OUT, INNER)}, "plain INT32 weights"),
}  # fmt: skip


@pytest.mark.parametrize("tensors, name", REFUSED.values(), ids=REFUSED)
def test_other_formats_are_refused_by_name(file, sentences, tensors, name):
    path = file({f"{LAYER}.{key}": tensor for key, tensor in tensors.items()})
    found = inspect_file(path)
    assert name in found.quantized and found.quantized[name] == 1
    assert "loads it as plain" not in found.stock and "lrq migrate" not in found.stock
    sentences(found.stock)
    assert verify_file(path).problems
    with SafetensorsFile(path) as opened:
        assert quantized_formats(opened) == [name] and not can_dequantize(opened)
        with sentences.raises(AlreadyQuantizedError):
            Recipe().plan(opened)
        with sentences.raises(SourceError):
            DecodedSource(opened).read(f"{LAYER}.weight")
    with sentences.raises(Exception):
        migrate_file(path, path.with_name("new.safetensors"))


STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
WRONG = {
    "no matrix": {STATE: js({"shape": [OUT * INNER], "blocksize": 64})},
    "another shape": {STATE: js({"shape": [OUT, INNER + 64], "blocksize": 64})},
    "negative": {STATE: js({"shape": [-OUT, -INNER], "blocksize": 64})},
    "huge blocks": {STATE: js({"shape": [OUT, INNER], "blocksize": 10**18})},
    "blocks of zero": {STATE: js({"shape": [OUT, INNER], "blocksize": 0})},
    "no JSON": {STATE: torch.full((40,), 7, dtype=torch.uint8)},
    "floats": {STATE: torch.ones(40)},
    "short table": {f"{LAYER}.weight.quant_map": torch.ones(8)},
    "values of 32 bits": {f"{LAYER}.weight": zeros(torch.int32, OUT * INNER // 2, 1)},
    "absmax without its state": {f"{LAYER}.weight.absmax": zeros(torch.uint8, OUT * INNER // 64)},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_tensors_of_nf4_that_contradict_each_other(file, sentences, change):
    with SafetensorsFile(file(bitsandbytes_4_bit()[0] | change)) as opened, sentences.raises(SourceError):
        DecodedSource(opened)


@pytest.mark.parametrize(
    "change",
    [
        {"weight_shape": torch.tensor([OUT, 10**12])},
        {"weight_shape": torch.tensor([-1, INNER])},
        {"weight_shape": torch.ones(3)},
        {"weight_packed": zeros(torch.uint8, OUT, 96)},
        {"weight_scale": torch.ones(OUT, 7)},
        {"weight_scale": torch.ones(OUT)},
    ],
    ids=["huge", "negative", "no shape", "bytes", "groups", "flat"],
)
def test_packed_tensors_that_contradict_each_other(file, sentences, change):
    tensors = packed()[0] | {f"{LAYER}.{key}": tensor for key, tensor in change.items()}
    with SafetensorsFile(file(tensors)) as opened, sentences.raises(SourceError):
        DecodedSource(opened)


def test_two_weights_of_one_layer_are_refused(file, tmp_path, sentences):
    path = file(quanto()[0] | {f"{LAYER}.weight": torch.ones(OUT, INNER)})
    with SafetensorsFile(path) as opened, sentences.raises(SourceError):
        DecodedSource(opened)
    with sentences.raises(SourceError):
        migrate_file(path, tmp_path / "new.safetensors")


@pytest.mark.parametrize("ours", ["weight_scale", "scale_weight"])
def test_two_scales_of_one_layer_are_refused(file, sentences, ours):
    path = file(hugging_face()[0] | {f"{LAYER}.{ours}": torch.ones(())})
    with SafetensorsFile(path) as opened, sentences.raises(SourceError):
        DecodedSource(opened)


def test_scales_of_integers_are_refused(file, sentences):
    """Exponents of MXFP8 as bytes, which are no factors."""
    tensors = {"weight": zeros(E4M3, OUT, INNER), "weight_scale": torch.full((OUT, 1), 127, dtype=torch.uint8)}
    with (
        SafetensorsFile(file({f"{LAYER}.{key}": tensor for key, tensor in tensors.items()})) as opened,
        sentences.raises(SourceError),
    ):
        DecodedSource(opened)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, E4M3], ids=str)
def test_zero_points_of_zero_are_no_companions(file, dtype):
    """compressed-tensors and torchao write them for symmetric quantization too."""
    tensors = PER_ROW | {"weight_zero_point": zeros(dtype, OUT, 1)}
    with SafetensorsFile(file({f"{LAYER}.{key}": tensor for key, tensor in tensors.items()})) as opened:
        assert DecodedSource(opened).layers == {"int8_tensorwise per row": 1}


def test_smoothing_factors_of_torchao_are_companions(file, tmp_path, sentences):
    """Its activations are multiplied by ``act_pre_scale``, so the weight alone is another one."""
    path = file(torchao_int8()[0] | {f"{LAYER}._weight_act_pre_scale": torch.full((INNER,), 2.0)}, TORCHAO_INT8)
    assert inspect_file(path).quantized == {"an unknown quantization": 1}
    with SafetensorsFile(path) as opened, sentences.raises(SourceError):
        DecodedSource(opened)
    with sentences.raises(SourceError):
        migrate_file(path, tmp_path / "new.safetensors")


def test_scales_of_activations_and_caches_are_no_companions(file):
    tensors = {f"{LAYER}.{key}": tensor for key, tensor in PER_ROW.items()}
    harmless = {f"{LAYER}.{key}": torch.ones(()) for key in ("input_scale", "output_scale", "k_scale", "v_scale")}
    with SafetensorsFile(file(tensors | harmless)) as opened:
        assert DecodedSource(opened).layers == {"int8_tensorwise per row": 1}


def test_a_layer_with_json_is_in_no_external_format(file):
    """Its JSON decides, and a tensor of another name is a companion of unknown meaning."""
    tensors = {"weight": zeros(E4M3, OUT, INNER), "weight_scale": torch.ones(()), "weight_scale_inv": torch.ones(2, 2)}
    tensors["comfy_quant"] = config_tensor({"format": "float8_e4m3fn"})
    with (
        SafetensorsFile(file({f"{LAYER}.{key}": tensor for key, tensor in tensors.items()})) as opened,
        pytest.raises(SourceError, match="weight_scale_inv belongs to"),
    ):
        DecodedSource(opened)


INT8_FAST = {
    f"{LAYER}.weight": integers(-127, 128, OUT, INNER).to(torch.int8),
    f"{LAYER}.weight_scale": torch.full((OUT, 1), 0.01),
    f"{LAYER}.comfy_quant": config_tensor({"convrot": True, "convrot_groupsize": 64}),
}


def test_json_without_a_format_points_to_migrate(file, tmp_path, capsys, sentences):
    """INT8-Fast wrote ``{"convrot": true}`` before ComfyUI had the format int8_tensorwise."""
    path = file(INT8_FAST)
    assert inspect_file(path).quantized == {"layer JSON without a format (INT8-Fast)": 1}
    sentences(inspect_file(path).stock, verify_file(path).problems[0])
    assert "lrq migrate" in inspect_file(path).stock and "lrq migrate" in verify_file(path).problems[0]
    with sentences.raises(AlreadyQuantizedError):
        quantize_file(path, tmp_path / "new.safetensors", Recipe())
    assert main(["migrate", "-i", str(path), "-o", str(tmp_path / "new.safetensors")]) == 0
    sentences(capsys.readouterr().out)
    assert verify_file(tmp_path / "new.safetensors").problems == []


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": zeros(E4M3, OUT, INNER)},
        {"weight": zeros(E5M2, OUT, INNER), "scale": zeros(E5M2, OUT, 1)},  # a parameter of a file cast as a whole
        {"weight": zeros(E4M3, OUT, INNER), "scale_weight": torch.ones(()), "scale_input": torch.ones(())},
    ],
    ids=["plain", "cast as a whole", "old"],
)
def test_fp8_that_comfyui_loads_is_not_refused(file, sentences, tensors):
    marker = {"scaled_fp8": zeros(E4M3, 0)} if "scale_weight" in tensors else {}
    path = file({f"{LAYER}.{key}": tensor for key, tensor in tensors.items()} | marker)
    sentences(inspect_file(path).stock)
    assert "Stock ComfyUI loads" in inspect_file(path).stock
    with SafetensorsFile(path) as opened:
        assert can_dequantize(opened) and DecodedSource(opened).layers.total() == 1


class Header:
    """Names, dtypes and shapes alone."""

    name, metadata = "model", {}

    def __init__(self, tensors):
        self.tensors = tensors


@pytest.mark.parametrize("whole", [False, True], ids=["layers", "all tensors"])
@pytest.mark.parametrize("name", architectures())
def test_no_model_has_companions_by_itself(name, whole):
    """A file of FP8 layers beside full precision, and one cast to FP8 as a whole."""
    tensors = {
        key: TensorInfo(
            E4M3 if whole or (key.endswith("weight") and len(found.shape) == 2) else torch.float32, found.shape
        )
        for key, found in read(name).items()
    }
    assert find_unknown_companions(Header(tensors), (), ()) == {} and not list(find_external(Header(tensors)))
    layers = {key.removesuffix(".weight") for key in tensors if key.endswith(".weight")}
    assert not [key for key in tensors if is_weight_scale(key, layers)]


def test_every_row_of_the_table_says_what_to_do():
    for entry in EXTERNAL:
        assert bool(entry.refusal) + bool(entry.decode) + entry.renamed == 1
        assert (entry.read_shape is None) == (entry.decode is None)
        assert "weight" in entry.parts or entry.refusal
        assert not entry.refusal or "full-precision original" in entry.refusal


def test_long_names_are_searched_in_bounded_time():
    """A name of a million separators is cut at its last eight."""
    long = "_" * 1_000_000
    tensors = {"a.weight": TensorInfo(E4M3, (8, 8))} | {f"a.{long}{n}": TensorInfo(E4M3, (1,)) for n in range(20)}
    assert find_unknown_companions(Header(tensors), (), ()) == {}


def test_metadata_of_torchao_is_left_out_and_other_metadata_kept():
    source = TensorSource({}, TORCHAO | {"modelspec.title": "x"})
    assert plain_metadata(source) == {"modelspec.title": "x"}
    assert plain_metadata(TensorSource({}, {"tensor_names": "["})) == {"tensor_names": "["}


def test_indices_are_no_packed_weights():
    assert torch.int64 not in PACKED_DTYPES
    tensors = {"attn.relative_position_index": torch.zeros(8, 8, dtype=torch.int64), "attn.logit_scale": torch.ones(4)}
    assert quantized_formats(TensorSource(tensors)) == []
