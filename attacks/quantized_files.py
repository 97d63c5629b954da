"""Hostile quantized layers and calibrations, in valid safetensors files."""

import json
import struct

from .attack import DEEP_JSON, Attack
from .safetensors_files import F32_ENTRY, header_entry, one_tensor, safetensors, tensors_file

__all__ = ["QUANTIZED"]

FP8_CONFIG = b'{"format":"float8_e4m3fn"}'


def _layer(config: bytes, scale: float = 1.0) -> dict[str, tuple[str, list, bytes]]:
    """Return the tensors of an 8 × 8 FP8 layer."""
    return {
        "a.weight": ("F8_E4M3", [8, 8], bytes(64)),
        "a.weight_scale": ("F32", [], struct.pack("<f", scale)),
        "a.comfy_quant": ("U8", [len(config)], config),
    }


def _layer_file(config: bytes, scale: float = 1.0, **metadata: str) -> bytes:
    return tensors_file(_layer(config, scale), **metadata)


def _with_input_scale(dtype: str, value: bytes) -> bytes:
    """Return a valid FP8 layer with an input scale of ``dtype``."""
    return tensors_file(_layer(FP8_CONFIG) | {"a.input_scale": (dtype, [], value)})


def _nf4_file(state: object) -> bytes:
    """Return an 8 × 8 layer of bitsandbytes with that quantization state."""
    text = json.dumps(state).encode()
    return tensors_file(
        {
            "a.weight": ("U8", [32, 1], bytes(32)),
            "a.weight.absmax": ("F32", [1], struct.pack("<f", 1.0)),
            "a.weight.quant_map": ("F32", [16], struct.pack("<f", 0.5) * 16),
            "a.weight.quant_state.bitsandbytes__nf4": ("U8", [len(text)], text),
        }
    )


def _rotated_file(size: int) -> bytes:
    """Return a valid INT8 layer of one row that is rotated in one group."""
    config = b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":%d}' % size
    layer = {"a.weight": ("I8", [1, size], b"\1" * size), "a.weight_scale": ("F32", [1, 1], struct.pack("<f", 1.0))}
    return tensors_file(layer | {"a.comfy_quant": ("U8", [len(config)], config)})


def _calibration(amax: tuple[str, bytes] | None = None, **header: object) -> bytes:
    """Return the calibration of a 16 × 16 layer "a"; ``amax``: (dtype, value) of all channel maxima."""
    identity = b"".join(struct.pack("<f", row == column) for row in range(16) for column in range(16))
    tensors = {"a.gram": ("F32", [16, 16], identity)}
    if amax:
        dtype, value = amax
        tensors |= {"a.amax": (dtype, [16], value * 16), "a.histogram": ("F32", [512], struct.pack("<f", 1.0) * 512)}
    return tensors_file(tensors, learned_rounding_calibration=json.dumps({"layers": {"a": ["a", 16, 16]}} | header))


QUANTIZED = {
    "scale_nan": Attack("x.safetensors", _layer_file(FP8_CONFIG, float("nan")), "scale of NaN"),
    "scale_infinite": Attack("x.safetensors", _layer_file(FP8_CONFIG, float("inf")), "infinite scale"),
    "scale_negative": Attack("x.safetensors", _layer_file(FP8_CONFIG, -1.0), "negative scale"),
    "scale_input_complex": Attack("x.safetensors", _with_input_scale("C64", bytes(8)), "complex input scale"),
    "scale_input_uint16": Attack(
        "x.safetensors",
        _with_input_scale("U16", b"\1\0"),
        "input scale in uint16, for which torch lacks most operators",
    ),
    "scale_input_fp8": Attack("x.safetensors", _with_input_scale("F8_E4M3", b"\x38"), "input scale in FP8"),
    "config_empty": Attack("x.safetensors", _layer_file(b"{}"), "layer configuration without a format"),
    "config_deep": Attack(
        "x.safetensors", _layer_file(b'{"format":' + DEEP_JSON), "layer configuration nested 100,000 levels deep"
    ),
    "config_large": Attack(
        "x.safetensors",
        lambda folder: _layer_file(b'{"format":[' + b"{}," * 7_000_000 + b"0]}"),
        "layer configuration of seven million values",
    ),
    "config_list": Attack(
        "x.safetensors", _layer_file(b'{"format":["float8_e4m3fn"]}'), "list as the format of a layer"
    ),
    "config_code": Attack(
        "x.safetensors", _layer_file(b'{"format":"__import__(\'os\')"}'), "Python code as the format of a layer"
    ),
    "config_group_zero": Attack(
        "x.safetensors",
        _layer_file(b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":0,"group_size":0}'),
        "groups of zero channels, to divide by zero",
    ),
    "config_rotation_huge": Attack(
        "x.safetensors",
        _layer_file(b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":%d}' % 4**60),
        "ConvRot group beyond 64 bits",
    ),
    "rotation_huge": Attack(
        "x.safetensors",
        lambda folder: _rotated_file(4**9),
        "ConvRot group whose Hadamard matrix would take 256 GB",
    ),
    "values_nan": Attack(
        "x.safetensors",
        tensors_file(_layer(FP8_CONFIG) | {"a.weight": ("F8_E4M3", [8, 8], b"\x7f" * 64)}),
        "NaN as quantized values",
    ),
    "config_group_huge": Attack(
        "x.safetensors",
        _layer_file(b'{"format":"int8_blockwise","group_size":99999999999999999999}'),
        "block size beyond 64 bits",
    ),
    "nf4_huge": Attack(
        "x.safetensors",
        _nf4_file({"shape": [1 << 40, 1 << 20], "blocksize": 64}),
        "NF4 weight of 2^60 values in 32 bytes",
    ),
    "nf4_block_huge": Attack(
        "x.safetensors",
        _nf4_file({"shape": [8, 8], "blocksize": 1 << 62}),
        "block of 2^62 values, each of which would get its scale",
    ),
    "nf4_types": Attack(
        "x.safetensors",
        _nf4_file({"shape": "8x8", "blocksize": [64], "nested_offset": {}}),
        "wrong types in a quantization state",
    ),
    "packed_shape_huge": Attack(
        "x.safetensors",
        tensors_file(
            {
                "a.weight_packed": ("I32", [8, 1], bytes(32)),
                "a.weight_scale": ("F32", [8, 1], struct.pack("<f", 1.0) * 8),
                "a.weight_shape": ("I64", [2], struct.pack("<2q", 8, 1 << 60)),
            }
        ),
        "packed weight of 2^60 columns in one word a row",
    ),
    "companions": Attack(
        "x.safetensors",
        tensors_file(
            {"a.weight": ("F8_E4M3", [8, 8], bytes(64))}
            | {f"a.{'_' * 50_000}{n}": ("U8", [1], b"0") for n in range(100)}
        ),
        "names of 50,000 separators beside quantized values",
    ),
    "metadata_deep": Attack(
        "x.safetensors",
        _layer_file(FP8_CONFIG, _quantization_metadata=DEEP_JSON.decode()),
        "metadata value nested 100,000 levels deep",
    ),
    "metadata_layers_string": Attack(
        "x.safetensors",
        _layer_file(FP8_CONFIG, _quantization_metadata='{"layers":"a"}'),
        "string as the table of layers in the metadata",
    ),
    "metadata_layers_many": Attack(
        "x.safetensors",
        lambda folder: _layer_file(
            FP8_CONFIG,
            _quantization_metadata=json.dumps(
                {"layers": {f"a.{index}": {"format": f"f{index}"} for index in range(50_000)}}
            ),
        ),
        "50,000 formats of layers that do not exist",
    ),
    "provenance_large": Attack(
        "x.safetensors",
        lambda folder: one_tensor(
            F32_ENTRY,
            bytes(256),
            learned_rounding=json.dumps(
                {"version": "1" * 1_000_000, "recipe": {f"key {index}": "x" * 100 for index in range(50_000)}}
            ),
        ),
        "recipe of millions of characters in the header",
    ),
    "provenance_types": Attack(
        "x.safetensors",
        one_tensor(F32_ENTRY, bytes(256), learned_rounding='{"fingerprint":{}}'),
        "fingerprint that is not a string",
    ),
    "calibration_deep": Attack(
        "x.calib.safetensors",
        one_tensor(F32_ENTRY, bytes(256), "a.gram", learned_rounding_calibration=DEEP_JSON.decode()),
        "calibration metadata nested 100,000 levels deep",
    ),
    "calibration_types": Attack(
        "x.calib.safetensors",
        one_tensor(
            F32_ENTRY, bytes(256), "a.gram", learned_rounding_calibration='{"version":"1","layers":[1],"tokens":5}'
        ),
        "values of wrong types in the calibration metadata",
    ),
    "calibration_infinite": Attack(
        "x.calib.safetensors",
        one_tensor(F32_ENTRY, bytes(256), "a.gram", learned_rounding_calibration='{"layers":{"a":["a",1e999,8]}}'),
        "infinite number of channels in a calibration",
    ),
    "calibration_many": Attack(
        "x.calib.safetensors",
        lambda folder: _calibration(layers={f"{index}": ["a", 16, 16] for index in range(100_000)}),
        "100,000 layers that share one Hessian",
    ),
    "calibration_nan": Attack(
        "x.calib.safetensors",
        one_tensor(F32_ENTRY, struct.pack("<f", float("nan")) * 64, "a.gram"),
        "Hessian of NaN only",
    ),
    "calibration_flat": Attack(
        "x.calib.safetensors",
        one_tensor(header_entry("F32", [64], 0, 256), bytes(256), "a.gram"),
        "Hessian that is not a matrix",
    ),
    "calibration_complex": Attack(
        "x.calib.safetensors", _calibration(("C64", struct.pack("<2f", 9.0, 9.0))), "complex channel maxima"
    ),
    "calibration_uint16": Attack(
        "x.calib.safetensors",
        _calibration(("U16", b"\1\0")),
        "channel maxima in uint16, for which torch lacks most operators",
    ),
    "calibration_fp8": Attack("x.calib.safetensors", _calibration(("F8_E4M3", b"\x38")), "channel maxima in FP8"),
    "calibration_subnormal": Attack(
        "x.calib.safetensors",
        _calibration(("F32", struct.pack("<f", 1e-45))),
        "channel maxima for which every scale is subnormal",
    ),
    "calibration_sensitivity_negative": Attack(
        "x.calib.safetensors", _calibration(sensitivity={"a": -1.0}), "negative sensitivity, which has no square root"
    ),
    "calibration_sensitivity_nan": Attack(
        "x.calib.safetensors", _calibration(sensitivity={"a": float("nan")}), "sensitivity of NaN"
    ),
    "calibration_panels": Attack(
        "x.calib.safetensors",
        safetensors(
            {"a.gram.panels": header_entry("F16", [1], 0, 2), "a.gram.roots": header_entry("F16", [1], 2, 4)}, bytes(4)
        ),
        "packed Hessian of a wrong size",
    ),
}
