"""Values that no loader checks: NaN, Inf, scales that a dtype cannot hold, layers of zeros; for every format that is read."""

import json

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats.layer_json import config_tensor
from learned_rounding.quant_core.output import values, verify_file

ROWS, COLUMNS = 64, 512
WEIGHT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02


def with_json(config: dict, **parts: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**parts, "comfy_quant": config_tensor(config)}


def convrot_w4a4(weight=WEIGHT):
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    qdata, params = kitchen.TensorCoreConvRotW4A4Layout.quantize(weight)
    return with_json(
        {"format": "convrot_w4a4", "convrot_groupsize": 256, "linear_dtype": "int4"},
        weight=qdata,
        weight_scale=params.scale,
    )


def asym_w4a8(weight=WEIGHT):
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    qdata, params = kitchen.AsymW4A8Int8Layout.quantize(weight)
    parts = {"weight_s_rel": params.scale, "weight_s_channel": params.s_channel, "weight_codebook": params.codebook}
    config = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256}
    return with_json(config, weight=qdata, **{key: part for key, part in parts.items() if part is not None})


def ours(format: str, **options):
    def make(weight=WEIGHT):
        made = quantize_weight(weight, format, rounding="nearest", **options).tensors("a")
        return {name.removeprefix("a."): tensor for name, tensor in made.items()}

    return make


LAYERS = {
    "float8_e4m3fn": ours("float8_e4m3fn"),
    "float8_e5m2": ours("float8_e5m2"),
    "float8_e4m3fn_rowwise": ours("float8_e4m3fn_rowwise"),
    "float8_e4m3fn_blockwise": ours("float8_e4m3fn_blockwise"),
    "int8_tensorwise": ours("int8_tensorwise"),
    "int8_tensorwise, ConvRot": ours("int8_tensorwise", convrot=256),
    "int8_blockwise": ours("int8_blockwise"),
    "nvfp4": ours("nvfp4"),
    "mxfp8": ours("mxfp8"),
    "convrot_w4a4": convrot_w4a4,
    "asym_w4a8_int8": asym_w4a8,
}


@pytest.fixture
def verify(tmp_path):
    """verify(parts, others) → the result for a layer "a" of these tensors, and other tensors by full name."""

    def run(parts: dict[str, torch.Tensor], others: dict[str, torch.Tensor] | None = None, **options):
        tensors = {f"a.{suffix}": tensor for suffix, tensor in parts.items()} | (others or {})
        layers = {"a": json.loads(parts["comfy_quant"].numpy().tobytes())}
        header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors", header)
        return verify_file(tmp_path / "a.safetensors", **options)

    return run


def test_every_format_has_no_problems(verify, subtests):
    for name in LAYERS:
        with subtests.test(name):
            result = verify(LAYERS[name](), {"norm.weight": torch.ones(8).bfloat16()})
            assert result.problems == []
            assert result.warnings == []
            assert result.layers == 1


def test_padded_layers_have_no_problems(verify, subtests):
    for shape in [(1, 1), (33, 100), (130, 264)]:
        for format in ["nvfp4", "mxfp8"]:
            with subtests.test(format, shape=shape):
                result = verify(LAYERS[format](torch.randn(shape)))
                assert result.problems == []
                assert result.warnings == []


def put_bytes(suffix: str, byte: int, at: int = -1):
    def change(parts):
        parts[suffix] = parts[suffix].clone()
        parts[suffix].view(torch.uint8).view(-1)[at] = byte

    return change


def put(suffix: str, value: float):
    def change(parts):
        parts[suffix] = parts[suffix].clone()
        parts[suffix].view(-1)[0] = value

    return change


def cut(suffix: str):
    return lambda parts: parts.update({suffix: parts[suffix][:-1]})


def cast(suffix: str, dtype: torch.dtype):
    return lambda parts: parts.update({suffix: parts[suffix].to(dtype)})


NAN, INF = float("nan"), float("inf")
PROBLEMS = {
    "E4M3 NaN": ("float8_e4m3fn", put_bytes("weight", 0x7F)),
    "E4M3 negative NaN": ("float8_e4m3fn", put_bytes("weight", 0xFF)),
    "E4M3 NaN in rows": ("float8_e4m3fn_rowwise", put_bytes("weight", 0x7F, 0)),
    "E4M3 NaN in blocks": ("float8_e4m3fn_blockwise", put_bytes("weight", 0x7F, 700)),
    "E5M2 Inf": ("float8_e5m2", put_bytes("weight", 0x7C)),
    "E5M2 −Inf": ("float8_e5m2", put_bytes("weight", 0xFC)),
    "E5M2 NaN": ("float8_e5m2", put_bytes("weight", 0x7D)),
    "MXFP8 NaN": ("mxfp8", put_bytes("weight", 0x7F)),
    "MXFP8 exponent NaN": ("mxfp8", put_bytes("weight_scale", 0xFF, 0)),
    "NVFP4 group scale NaN": ("nvfp4", put_bytes("weight_scale", 0x7F, 0)),
    "NVFP4 group scale negative": ("nvfp4", put_bytes("weight_scale", 0xB8, 0)),
    "NVFP4 scale zero": ("nvfp4", put("weight_scale_2", 0.0)),
    "NVFP4 scale negative": ("nvfp4", put("weight_scale_2", -1.0)),
    "NVFP4 scale of another shape": ("nvfp4", cut("weight_scale")),
    "NVFP4 scale not tiled": ("nvfp4", lambda parts: parts.update(weight_scale=parts["weight_scale"][:ROWS])),
    "MXFP8 scale of another dtype": ("mxfp8", cast("weight_scale", torch.int16)),
    "MXFP8 weight not padded": ("mxfp8", cut("weight")),
    "INT8 scale Inf": ("int8_tensorwise", put("weight_scale", INF)),
    "INT8 scale NaN, rotated": ("int8_tensorwise, ConvRot", put("weight_scale", NAN)),
    "INT8 block scale negative": ("int8_blockwise", put("weight_scale", -1.0)),
    "W4A4 scale NaN": ("convrot_w4a4", put("weight_scale", NAN)),
    "W4A4 scale negative": ("convrot_w4a4", put("weight_scale", -1.0)),
    "W4A4 scale of another shape": ("convrot_w4a4", cut("weight_scale")),
    "W4A8 group scale NaN": ("asym_w4a8_int8", put_bytes("weight_s_rel", 0x7F)),
    "W4A8 channel scale Inf": ("asym_w4a8_int8", put("weight_s_channel", INF)),
    "W4A8 channel scales in half precision": ("asym_w4a8_int8", cast("weight_s_channel", torch.float16)),
    "W4A8 codebook NaN": ("asym_w4a8_int8", put("weight_codebook", NAN)),
    "W4A8 no group scales": ("asym_w4a8_int8", lambda parts: parts.pop("weight_s_rel")),
}


def test_each_problem_has_its_sentence(verify, sentences, subtests):
    for name, (format, change) in PROBLEMS.items():
        with subtests.test(name):
            parts = LAYERS[format]()
            change(parts)
            (problem,) = verify(parts).problems
            assert problem.startswith("a: ")
            sentences(problem)


def test_padding_may_hold_anything(verify):
    parts = LAYERS["nvfp4"]()
    put_bytes("weight_scale", 0x7F)(parts)  # the last row of its tile
    assert verify(parts).problems == []


def test_signed_codebooks_and_smoothing_are_valid(verify):
    parts = LAYERS["nvfp4"]() | {"pre_quant_scale": -torch.ones(COLUMNS)}
    assert verify(parts).problems == []


def test_a_layer_of_zeros_is_a_warning(verify, sentences, subtests):
    for name in [name for name in LAYERS if name != "asym_w4a8_int8"]:
        with subtests.test(name=name):
            result = verify(LAYERS[name](torch.zeros(ROWS, COLUMNS)))
            assert result.problems == []
            (warning,) = result.warnings
            assert warning.startswith("a: all of its weights are zero")
            sentences(warning)


def test_negative_zeros_are_zeros(verify):
    parts = LAYERS["float8_e4m3fn"]()
    parts["weight"] = torch.full((ROWS, COLUMNS), 0x80, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert len(verify(parts).warnings) == 1
    parts["weight"].view(torch.uint8)[5, 5] = 0x81
    assert verify(parts).warnings == []


HALF, BFLOAT16 = {"norm.weight": torch.ones(8).half()}, {"norm.weight": torch.ones(8).bfloat16()}
CASTS = {
    "underflow": ("float8_e5m2", 1e-8, HALF, True),
    "overflow": ("float8_e5m2", 1e5, HALF, True),
    "overflow of the weights": ("float8_e4m3fn", 1000.0, HALF, True),
    "imprecise": ("float8_e5m2", 4e-7, HALF, False),
    "imprecise NVFP4": ("nvfp4", 4e-7, HALF, False),
    "underflow NVFP4": ("nvfp4", 1e-8, HALF, True),
}


def test_scales_that_float16_cannot_hold(verify, sentences, subtests):
    for name, (format, scale, others, fatal) in CASTS.items():
        with subtests.test(name):
            parts = LAYERS[format]()
            parts["weight_scale_2" if format == "nvfp4" else "weight_scale"] = torch.tensor(scale)
            result = verify(parts, others)
            (finding,) = result.problems if fatal else result.warnings
            assert bool(result.problems) is fatal
            sentences(finding)
            bfloat16 = verify(parts, BFLOAT16)
            assert bfloat16.problems == []
            assert bfloat16.warnings == []


def test_scales_that_comfyui_keeps_in_float32_may_have_any_magnitude(verify):
    for name in ("int8_tensorwise", "float8_e4m3fn_rowwise", "int8_blockwise"):
        parts = LAYERS[name]()
        parts["weight_scale"] = torch.full_like(parts["weight_scale"], 1e-9)
        result = verify(parts, HALF)
        assert result.problems == []
        assert result.warnings == []


def test_plain_fp8_with_nan(tmp_path, sentences):
    weight = torch.zeros(4, 4)
    weight[1, 2] = NAN
    save_file(
        {"a.weight": weight.to(torch.float8_e4m3fn), "b.bias": weight[1].to(torch.float8_e5m2)}, tmp_path / "a.st"
    )
    problems = verify_file(tmp_path / "a.st").problems
    assert [problem.partition(":")[0] for problem in problems] == ["a.weight", "b.bias"]
    sentences(problems)


def test_a_check_can_be_cancelled_between_slices(verify, monkeypatch):
    monkeypatch.setattr(values, "_SLICE", 1000)
    calls = []

    class Cancelled(Exception):
        pass

    def check():
        calls.append(None)
        if len(calls) == 10:
            raise Cancelled

    with pytest.raises(Cancelled):
        verify(LAYERS["int8_tensorwise"](), check=check)
    assert len(calls) == 10
    parts = LAYERS["float8_e4m3fn"]()
    put_bytes("weight", 0x7F, 1500)(parts)
    assert len(verify(parts).problems) == 1  # in the second of the slices


def test_progress_is_in_bytes(verify):
    seen = []
    others = {"b.weight": WEIGHT.to(torch.float8_e4m3fn), "norm.weight": torch.ones(8)}
    verify(LAYERS["int8_tensorwise"](), others, progress=lambda done, total: seen.append((done, total)))
    layer, norm = ROWS * COLUMNS, 8 * 4
    assert seen == [(done, 2 * layer + norm) for done in (layer, 2 * layer, 2 * layer + norm)]


@pytest.mark.parametrize(
    "value, dtype", [(torch.nan, torch.float32), (torch.inf, torch.bfloat16), (-torch.inf, torch.float32)]
)
def test_unquantized_tensors_that_are_not_finite_are_a_warning(verify, monkeypatch, value, dtype):
    monkeypatch.setattr(values, "_SLICE", 4)
    norm = torch.ones(10, dtype=dtype)
    norm[9] = value  # in the last slice
    result = verify(LAYERS["int8_tensorwise"](), {"norm.weight": norm, "a.bias": norm.clone(), "b.bias": torch.ones(3)})
    assert result.problems == []
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("Unquantized tensors with NaN or Inf, such as a.bias: 2;")


def test_plain_files_are_not_read(model_file, model):
    tensors = model()
    tensors["blocks.0.norm.weight"][0] = torch.nan
    read = []
    assert verify_file(model_file(tensors=tensors), progress=lambda *done: read.append(done)).warnings == []
    assert read == []
