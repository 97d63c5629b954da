"""Files that somebody made to do harm, as generators: each writes one, or a folder of some, and is told of in README.md.

Every case is put through all that reads files by `tests/fuzz/test_attacks.py`.
"""

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["CASES", "CANARY", "PATTERNS", "safetensors"]

CANARY = "executed"  # a file of this name appears where a pickle was run
_CODES = "a.comfy_quant"


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file with that header (JSON, or bytes as they stand) and the length it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _one(entry: object, data: bytes = b"", name: str = "a.weight", **metadata: str) -> bytes:
    return safetensors({"__metadata__": metadata, name: entry} if metadata else {name: entry}, data)


def _coded(config: bytes, scale: float = 1.0, **metadata: str) -> bytes:
    """A layer of 8 × 8 FP8 codes with that JSON beside it."""
    return _several(_layer(config, scale), **metadata)


def _layer(config: bytes, scale: float = 1.0) -> dict[str, tuple[str, list, bytes]]:
    codes, scales = ("F8_E4M3", [8, 8], bytes(64)), ("F32", [], struct.pack("<f", scale))
    return {"a.weight": codes, "a.weight_scale": scales, _CODES: ("U8", [len(config)], config)}


def _several(tensors: dict[str, tuple[str, list, bytes]], **metadata: str) -> bytes:
    """A file of tensors, each of a dtype, a shape and its bytes."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, shape, values) in tensors.items():
        header[name] = _entry(dtype, shape, len(data), len(data) + len(values))
        data += values
    return safetensors(header, data)


def _input_scale(dtype: str, values: bytes) -> bytes:
    """A sound layer of FP8 codes, and an input scale of that dtype."""
    return _several(_layer(_FP8) | {"a.input_scale": (dtype, [], values)})


def _known(amax: tuple[str, bytes] | None = None, **header: object) -> bytes:
    """A calibration of a layer "a" of 16 × 16, with a largest magnitude of that dtype and value in each channel."""
    gram = {
        "a.gram": (
            "F32",
            [16, 16],
            b"".join(struct.pack("<f", row == column) for row in range(16) for column in range(16)),
        )
    }
    if amax:
        dtype, value = amax
        gram |= {"a.amax": (dtype, [16], value * 16), "a.histogram": ("F32", [512], struct.pack("<f", 1.0) * 512)}
    return _several(gram, learned_rounding_calibration=json.dumps({"layers": {"a": ["a", 16, 16]}} | header))


class _Touch:
    """A pickle that makes the canary when it is run."""

    def __init__(self, folder: Path):
        self._path = str(folder / CANARY)

    def __reduce__(self):
        return open, (self._path, "w")


def _saved(make: Callable[[], torch.Tensor], name: str = "x.weight") -> Callable[[Path], bytes]:
    """What torch saves of a sound weight and another tensor."""

    def save(folder: Path) -> bytes:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save({"a.weight": torch.zeros(8, 8), name: make()}, buffer)
        return buffer.getvalue()

    return save


def _storage_claims(count: int) -> Callable[[Path], bytes]:
    """The same, of a storage that says it holds ``count`` values."""

    def save(folder: Path) -> bytes:
        content = _saved(lambda: torch.zeros(3, 3))(folder)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            pickled = archive.read("archive/data.pkl")
            size = b"K\x09"  # nine values
            assert pickled.count(size + b"t") == 1
            return _zipped(pickled.replace(size + b"t", pickle.dumps(count, 2)[2:-1] + b"t"), archive)(folder)

    return save


def _zipped(pickled: bytes, others: zipfile.ZipFile | None = None) -> Callable[[Path], bytes]:
    """An archive as torch makes it, with that pickle."""
    files = {name: others.read(name) for name in others.namelist()} if others else {}

    def save(folder: Path) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in (files | {"archive/data.pkl": pickled}).items():
                archive.writestr(name, content)
        return buffer.getvalue()

    return save


def _compressed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", _pickle_of(2**28))
        with archive.open("archive/data/0", "w") as file:
            for _ in range(64):
                file.write(bytes(1 << 24))
    return buffer.getvalue()


def _pickle_of(count: int) -> bytes:
    """The pickle of torch for one weight of ``count`` values."""
    buffer = io.BytesIO()
    torch.save({"a.weight": torch.zeros(1)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl").replace(b"K\x01", pickle.dumps(count, 2)[2:-1])


def _gguf(sides: tuple[int, ...], offset: int, kind: int = 0, **pairs: bytes) -> bytes:
    """One tensor of those sides, innermost first, in 256 bytes. ``pairs``: of the header, kind and value in bytes."""
    entry = struct.pack("<Q", 8) + b"a.weight" + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)
    told = b"".join(struct.pack("<Q", len(key)) + key.encode() + value for key, value in pairs.items())
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs)) + told + entry
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + bytes(256)


_LAUGHS = b"K\x01" + b"2\x86" * 60  # a pair of twice the same pair of … : 2⁶⁰ numbers in 122 bytes


def _old_pickle(made: bytes, keys: bytes) -> bytes:
    """A file of torch before 1.6 with those pickles of the weights and of the storages' names, and an empty storage."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    return b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system)) + made + keys + bytes(8)


def _index(*files: str) -> bytes:
    return json.dumps({"weight_map": {f"t{index}.weight": file for index, file in enumerate(files)}}).encode()


_F32 = _entry("F32", [8, 8], 0, 256)
_FP8 = b'{"format":"float8_e4m3fn"}'
_DEEP = b"[" * 100_000

# name → (file name, its bytes or what makes them for a folder, what was tried)
CASES: dict[str, tuple[str, bytes | Callable[[Path], bytes], str]] = {
    "length_beyond_file": (
        "x.safetensors",
        safetensors({}, length=2**40),
        "a header length beyond the file, to have its bytes allocated",
    ),
    "length_of_64_bits": (
        "x.safetensors",
        safetensors({}, length=2**64 - 1),
        "a header length of 64 ones, to overflow a sum",
    ),
    "length_zero": ("x.safetensors", safetensors({}, length=0), "an empty header"),
    "header_deep": ("x.safetensors", safetensors(b'{"a":' + _DEEP), "JSON nested 100,000 deep, to exhaust the stack"),
    "header_lists": (
        "x.safetensors",
        lambda folder: safetensors(b'{"a":[' + (b"[" * 900 + b"]" * 900 + b",") * 8_000 + b"0]}"),
        "seven million lists with few commas between them",
    ),
    "header_list": ("x.safetensors", safetensors(b'{"a.weight":[1,2]}'), "a tensor's entry that is no object"),
    "header_not_utf8": ("x.safetensors", safetensors(b'{"\xff":1}'), "bytes that are no UTF-8 in a name"),
    "header_half_character": (
        "x.safetensors",
        _one(_F32, bytes(256), "a\ud800.weight"),
        "half a surrogate pair as a name, which no output can hold",
    ),
    "header_huge_number": (
        "x.safetensors",
        safetensors(b'{"a.weight":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
        "a number of 5,000 digits as a dimension",
    ),
    "metadata_number": ("x.safetensors", safetensors({"__metadata__": {"a": 1}}), "metadata that is no text"),
    "name_twice": (
        "x.safetensors",
        safetensors(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        "one name twice, so that two readers see two files",
    ),
    "many_entries": (
        "x.safetensors",
        safetensors(b'{"a":{}' + b"".join(b',"%d":{}' % index for index in range(20_000)) + b"}"),
        "20,000 entries that are none",
    ),
    "offsets_overlap": (
        "x.safetensors",
        safetensors({"a": _entry("U8", [8], 0, 8), "b": _entry("U8", [8], 4, 12)}, bytes(12)),
        "two tensors that share bytes",
    ),
    "offsets_hole": (
        "x.safetensors",
        safetensors({"a": _entry("U8", [4], 0, 4), "b": _entry("U8", [4], 8, 12)}, bytes(12)),
        "bytes between tensors that belong to none",
    ),
    "offsets_beyond": (
        "x.safetensors",
        _one(_entry("U8", [2**40], 0, 2**40), bytes(8)),
        "a tensor of a terabyte in a file of a few bytes",
    ),
    "offsets_negative": ("x.safetensors", _one(_entry("U8", [8], -8, 0), bytes(8)), "an offset before the data"),
    "offsets_float": (
        "x.safetensors",
        _one(_entry("U8", [8], 0.0, 8.0), bytes(8)),
        "offsets that are no whole numbers",
    ),
    "shape_overflow": (
        "x.safetensors",
        _one(_entry("U8", [2**32, 2**32, 0], 0, 0)),
        "dimensions whose product overflows 64 bits before a zero",
    ),
    "shape_overflow_beside": (
        "x.safetensors",
        _several({"a.weight": ("F32", [8, 8], bytes(256)), "b.weight": ("F32", [2**32, 2**32, 0], b"")}),
        "the same beside a sound weight",
    ),
    "shape_product": (
        "x.safetensors",
        _one(_entry("U8", [2**63, 2], 0, 0)),
        "dimensions whose product is 0 in 64 bits",
    ),
    "shape_rank": ("x.safetensors", _one(_entry("U8", [1] * 10_000, 0, 1), b"x"), "10,000 dimensions"),
    "shape_bool": ("x.safetensors", _one(_entry("U8", [True], 0, 1), b"x"), "true as a dimension"),
    "data_behind": (
        "x.safetensors",
        _one(_entry("U8", [1], 0, 1), b"x" * 1000),
        "data behind the last tensor, as a file in a file",
    ),
    "name_path": ("x.safetensors", _one(_F32, bytes(256), "../../etc/passwd.weight"), "a path as a tensor's name"),
    "name_empty": ("x.safetensors", _one(_F32, bytes(256), ""), "a tensor without a name"),
    "name_control": (
        "x.safetensors",
        _one(_F32, bytes(256), "\x1b[2J\r\n\0.weight"),
        "control characters of terminals as a name",
    ),
    "name_long": (
        "x.safetensors",
        _one(_F32, bytes(256), "blocks." * 20_000 + "weight"),
        "a name of 140,000 characters, against patterns",
    ),
    "weights_nan": ("x.safetensors", _one(_F32, struct.pack("<f", float("nan")) * 64), "weights of nothing but NaN"),
    "weights_huge": ("x.safetensors", _one(_F32, struct.pack("<f", 3e38) * 64), "weights at the end of float32"),
    "scale_nan": ("x.safetensors", _coded(_FP8, float("nan")), "a scale that is NaN"),
    "scale_infinite": ("x.safetensors", _coded(_FP8, float("inf")), "an infinite scale"),
    "scale_negative": ("x.safetensors", _coded(_FP8, -1.0), "a negative scale"),
    "scale_input_complex": ("x.safetensors", _input_scale("C64", bytes(8)), "a complex input scale"),
    "scale_input_whole": (
        "x.safetensors",
        _input_scale("U16", b"\1\0"),
        "an input scale of a dtype that torch computes little in",
    ),
    "scale_input_fp8": ("x.safetensors", _input_scale("F8_E4M3", b"\x38"), "an input scale in FP8"),
    "codes_empty": ("x.safetensors", _coded(b"{}"), "a layer's JSON that names no format"),
    "codes_deep": ("x.safetensors", _coded(b'{"format":' + _DEEP), "a layer's JSON nested 100,000 deep"),
    "codes_large": (
        "x.safetensors",
        lambda folder: _coded(b'{"format":[' + b"{}," * 7_000_000 + b"0]}"),
        "a layer's JSON of seven million values",
    ),
    "codes_list": ("x.safetensors", _coded(b'{"format":["float8_e4m3fn"]}'), "a list as a layer's format"),
    "codes_unknown": ("x.safetensors", _coded(b'{"format":"__import__(\'os\')"}'), "code as a layer's format"),
    "codes_group_zero": (
        "x.safetensors",
        _coded(b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":0,"group_size":0}'),
        "groups of no channels, to divide by zero",
    ),
    "codes_group_huge": (
        "x.safetensors",
        _coded(b'{"format":"int8_blockwise","group_size":99999999999999999999}'),
        "a block wider than 64 bits",
    ),
    "metadata_deep": (
        "x.safetensors",
        _coded(_FP8, _quantization_metadata=_DEEP.decode()),
        "a header entry nested 100,000 deep",
    ),
    "metadata_layers_text": (
        "x.safetensors",
        _coded(_FP8, _quantization_metadata='{"layers":"a"}'),
        "text in place of the header's table of layers",
    ),
    "provenance_lies": (
        "x.safetensors",
        _one(_F32, bytes(256), learned_rounding='{"fingerprint":{}}'),
        "a fingerprint that is no text",
    ),
    "calibration_deep": (
        "x.calib.safetensors",
        _one(_F32, bytes(256), "a.gram", learned_rounding_calibration=_DEEP.decode()),
        "a calibration's header nested 100,000 deep",
    ),
    "calibration_types": (
        "x.calib.safetensors",
        _one(_F32, bytes(256), "a.gram", learned_rounding_calibration='{"version":"1","layers":[1],"tokens":5}'),
        "wrong kinds of values in a calibration's header",
    ),
    "calibration_infinite": (
        "x.calib.safetensors",
        _one(_F32, bytes(256), "a.gram", learned_rounding_calibration='{"layers":{"a":["a",1e999,8]}}'),
        "an infinite number of channels in a calibration",
    ),
    "calibration_nan": (
        "x.calib.safetensors",
        _one(_F32, struct.pack("<f", float("nan")) * 64, "a.gram"),
        "a Gram of nothing but NaN",
    ),
    "calibration_flat": (
        "x.calib.safetensors",
        _one(_entry("F32", [64], 0, 256), bytes(256), "a.gram"),
        "a Gram that is no matrix",
    ),
    "calibration_complex": ("x.calib.safetensors", _known(("C64", struct.pack("<2f", 9.0, 9.0))), "complex magnitudes"),
    "calibration_whole": (
        "x.calib.safetensors",
        _known(("U16", b"\1\0")),
        "magnitudes of a dtype that torch computes little in",
    ),
    "calibration_fp8": ("x.calib.safetensors", _known(("F8_E4M3", b"\x38")), "magnitudes in FP8"),
    "calibration_tiny": (
        "x.calib.safetensors",
        _known(("F32", struct.pack("<f", 1e-45))),
        "magnitudes of which no scale is a normal number",
    ),
    "calibration_sensitivity": (
        "x.calib.safetensors",
        _known(sensitivity={"a": -1.0}),
        "a sensitivity below zero, which has no root",
    ),
    "calibration_sensitivity_nan": (
        "x.calib.safetensors",
        _known(sensitivity={"a": float("nan")}),
        "a sensitivity that is NaN",
    ),
    "calibration_panels": (
        "x.calib.safetensors",
        safetensors({"a.gram.panels": _entry("F16", [1], 0, 2), "a.gram.roots": _entry("F16", [1], 2, 4)}, bytes(4)),
        "a packed Gram of the wrong size",
    ),
    "pickle_runs": (
        "x.ckpt",
        lambda folder: pickle.dumps({"a.weight": _Touch(folder)}),
        "a pickle that runs code when it is opened",
    ),
    "pickle_as_safetensors": (
        "x.safetensors",
        lambda folder: pickle.dumps(_Touch(folder)),
        "the same under another name",
    ),
    "pickle_cut": ("x.pt", lambda folder: pickle.dumps({"a.weight": _Touch(folder)})[:20], "half a pickle"),
    "pickle_expanded": (
        "x.pt",
        _saved(lambda: torch.zeros(1).expand(200_000, 200_000)),
        "one value seen as forty billion",
    ),
    "pickle_negative": ("x.pt", _storage_claims(-1), "a storage of less than nothing"),
    "pickle_beyond": ("x.pt", _storage_claims(2**40), "a storage of a terabyte in a file of a few bytes"),
    "pickle_meta": ("x.pt", _saved(lambda: torch.empty(4, 4, device="meta")), "a tensor without values"),
    "pickle_quantized": (
        "x.pt",
        _saved(lambda: torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8)),
        "codes of torch's own quantization",
    ),
    "pickle_nested": (
        "x.pt",
        _saved(lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
        "a tensor of tensors",
    ),
    "pickle_sparse": ("x.pt", _saved(lambda: torch.eye(4).to_sparse_csr()), "a tensor of indices and values"),
    "pickle_half_character": ("x.pt", _saved(lambda: torch.zeros(4, 4), "\ud800"), "half a surrogate pair as a name"),
    "pickle_header_name": (
        "x.pt",
        _saved(lambda: torch.zeros(4, 4), "__metadata__"),
        "a tensor by the name of the header's own table",
    ),
    "pickle_compressed": ("x.pt", _compressed, "a megabyte that unpacks to a gigabyte"),
    "pickle_memo": ("x.pt", _zipped(b"\x80\x02}r\xff\xff\xff\x7f."), "a place in the memo behind two billion others"),
    "pickle_deep": ("x.pt", _zipped(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), "lists nested 100,000 deep"),
    "pickle_laughs": ("x.pt", _zipped(b"\x80\x02}(" + _LAUGHS + b"N" + b"u."), "a key that takes 2⁶⁰ steps to look up"),
    "pickle_name_laughs": (
        "x.pt",
        _zipped(b"\x80\x02" + _LAUGHS + b"2\x93."),
        "a name to import that takes 2⁶⁰ steps to write out",
    ),
    "pickle_key_laughs": (
        "x.pt",
        _zipped(b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + _LAUGHS + b"X\x03\x00\x00\x00cpuK\x01tQ."),
        "the same as the name of a storage",
    ),
    "pickle_storage_laughs": (
        "x.pt",
        _zipped(b"\x80\x02(X\x07\x00\x00\x00storage" + _LAUGHS + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ."),
        "the same as the kind of a storage",
    ),
    "pickle_dtype_laughs": (
        "x.pt",
        _zipped(b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n(NK\x00))NN" + _LAUGHS + b"tR."),
        "the same as the dtype of a tensor",
    ),
    "pickle_old_laughs": (
        "x.pt",
        _old_pickle(b"\x80\x02}.", b"\x80\x02](" + _LAUGHS + b"e."),
        "the same as a storage's name in a file of old",
    ),
    "pickle_again": (
        "x.pt",
        _zipped(
            b"\x80\x02ccollections\nOrderedDict\nq\x00]("
            + b"NN\x86" * 100_000
            + b"e\x85q\x01"
            + b"h\x00h\x01R0" * 100_000
            + b"N."
        ),
        "a hundred thousand tables of one list of as many pairs",
    ),
    "pickle_wrapped": (
        "x.pt",
        _zipped(
            b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00(ctorch\nSize\nN)Ntq\x01"
            + b"(h\x00Nh\x01Ntq\x01" * 300
            + b"h\x00h\x01R0" * 500_000
            + b"N."
        ),
        "half a million calls, each of a call of a call, 300 times",
    ),
    "pickle_storage_long": (
        "x.pt",
        _zipped(
            b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01"
            + b"N" * 500_000
            + b"tq\x00"
            + b"h\x00Q0" * 500_000
            + b"N."
        ),
        "half a million times a storage told in as many words",
    ),
    "zip_empty": ("x.pt", b"PK\x05\x06" + bytes(18), "an empty archive as a checkpoint"),
    "index_climbs": (
        "x.safetensors.index.json",
        _index("../secret.safetensors"),
        "an index that leads out of its folder",
    ),
    "index_absolute": (
        "x.safetensors.index.json",
        _index("/etc/passwd"),
        "an index that leads to a file of the system",
    ),
    "index_windows": (
        "x.safetensors.index.json",
        _index("..\\secret.safetensors"),
        "an index that leads out by the other kind of slash",
    ),
    "index_itself": ("x.safetensors.index.json", _index("x.safetensors.index.json"), "an index that is its own shard"),
    "index_null": ("x.safetensors.index.json", _index("a\0b"), "a shard whose name no system takes"),
    "index_deep": ("x.safetensors.index.json", b'{"weight_map":' + _DEEP, "an index nested 100,000 deep"),
    "index_large": (
        "x.safetensors.index.json",
        lambda folder: b'{"weight_map":[' + b"{}," * 7_000_000 + b"0]}",
        "an index of seven million values",
    ),
    "index_lists": (
        "x.safetensors.index.json",
        lambda folder: b'{"weight_map":[' + (b"[" * 900 + b"]" * 900 + b",") * 8_000 + b"0]}",
        "the same, without as many commas",
    ),
    "gguf_counts": ("x.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "a GGUF file of 2⁶⁰ tensors"),
    "gguf_string": ("x.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "a GGUF key of 2⁶² characters"),
    "gguf_beyond": ("x.gguf", _gguf((2**40,), 0), "a tensor of terabytes in a file of a few bytes"),
    "gguf_overflow": ("x.gguf", _gguf((2**40, 2**40, 2**40), 0), "dimensions whose product overflows"),
    "gguf_offset": ("x.gguf", _gguf((8, 8), 2**63), "a tensor that begins at half of 64 bits"),
    "gguf_rank": (
        "x.gguf",
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<I", 2**31),
        "two billion dimensions",
    ),
    "gguf_kind": ("x.gguf", _gguf((8, 8), 0, 77), "codes of a kind that is none"),
    "gguf_alignment": (
        "x.gguf",
        _gguf((8, 8), 0, **{"general.alignment": struct.pack("<If", 6, 32.0)}),
        "an alignment that is no whole number",
    ),
    "gguf_shape_float": (
        "x.gguf",
        _gguf((8, 8), 0, **{"comfy.gguf.orig_shape.a.weight": struct.pack("<IIQ2d", 9, 12, 2, 0.5, 128.0)}),
        "half a channel as a dimension",
    ),
    "gguf_shape_bool": (
        "x.gguf",
        _gguf((1, 1), 0, **{"comfy.gguf.orig_shape.a.weight": struct.pack("<IIQ2?", 9, 7, 2, True, True)}),
        "true as a dimension",
    ),
    "gguf_head": ("x.gguf", b"GGUF", "nothing but GGUF's first four bytes"),
}

# pattern of a rule → what was tried
PATTERNS = {
    "(a+)+$": "a repeat of a repeat, exponential in Python",
    "(a|a)*$": "two ways through each letter",
    "(.*a){20}": "twenty times anything",
    ".*.*.*.*.*.*=": "a polynomial of degree six",
    "(" * 900 + ")" * 900: "900 groups in each other",
    "(((a{99}){99}){99}){99}": "ninety-six million letters in a short pattern",
    "(?=(a+))+": "a repeated look-ahead",
    "(?R)": "a recursion without end, a level of memory each",
    "a" * 2000: "a long literal, with search tables in cubic time",
    "a{999999999999}": "a count wider than 32 bits",
    "[": "half a class",
    "[\\x00-\\U0010ffff]" * 110: "sets of a million letters, which Python goes through one by one",
}
