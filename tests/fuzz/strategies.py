"""Hypothesis strategies for mutated files, journals and texts: valid ones with a few changes.

Used by ``test_fuzz.py`` and by the coverage-guided ``guided.py``. A strategy for files generates {file name: bytes}; the first
file is the one to open.
"""

import io
import json
import struct
import zipfile
import zlib

import torch
from hypothesis import strategies as st

from learned_rounding.attacks.safetensors_files import safetensors

__all__ = ["FILES", "JOURNALS", "TEXTS"]

_DTYPES = st.sampled_from(["F32", "BF16", "F8_E4M3", "I8", "U8", "F64", "BOOL", "X9", 7, None])
_INTEGERS = st.one_of(st.integers(-1, 40), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**30]))
_UNEXPECTED = st.one_of(
    st.none(), st.booleans(), _INTEGERS, st.floats(), st.text(max_size=5), st.just([]), st.just({}), st.just([[[]]])
)
_SUFFIXES = [
    "weight",
    "weight_scale",
    "scale_weight",
    "input_scale",
    "comfy_quant",
    "bias",
    "gram",
    "gram.panels",
    "gram.roots",
]
_SUFFIXES += ["gram.factor", "gram.diagonal", "mean", "amax", "histogram", "holdout_gram"]
_NAMES = st.one_of(
    st.tuples(st.sampled_from("ab"), st.sampled_from(_SUFFIXES)).map(".".join),
    st.just("scaled_fp8"),
    st.text(max_size=6),
)
_JSON = st.recursive(
    _UNEXPECTED,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
_CONFIG = st.dictionaries(
    st.sampled_from(["format", "per_row", "convrot", "convrot_groupsize", "group_size", "full_precision_matrix_mult"]),
    st.one_of(st.sampled_from(["float8_e4m3fn", "int8_tensorwise", "int8_blockwise", "mxfp8"]), _UNEXPECTED),
).map(json.dumps)
_METADATA = st.dictionaries(
    st.sampled_from(["_quantization_metadata", "learned_rounding", "learned_rounding_calibration", "format"]),
    st.one_of(
        _JSON.map(json.dumps),
        st.dictionaries(
            st.sampled_from(["layers", "tokens", "version", "sensitivity", "provenance", "fingerprint"]), _JSON
        ).map(json.dumps),
        st.dictionaries(st.just("layers"), st.dictionaries(st.sampled_from("ab"), _CONFIG.map(json.loads))).map(
            json.dumps
        ),
        st.text(max_size=8),
    ),
)
_SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "F64": 8, "BOOL": 1}
# Suffix → valid (dtype, shape) of that tensor for a layer of 16 × 16.
_EXPECTED = {
    "weight": [("F32", [16, 16]), ("BF16", [16, 16]), ("F8_E4M3", [16, 16]), ("I8", [16, 16])],
    "bias": [("BF16", [16])],
    "weight_scale": [("F32", []), ("F32", [16, 1])],
    "histogram": [("F32", [512])],
    "gram.panels": [("F16", [136])],
    "gram.factor": [("BF16", [16, 4])],
    **{key: [("F32", [])] for key in ("scale_weight", "input_scale")},
    **{key: [("F32", [16])] for key in ("mean", "amax", "gram.roots", "gram.diagonal")},
    **{key: [("F32", [16, 16])] for key in ("gram", "holdout_gram")},
}
_VALUES = [1.0, 1.0, 1.0, 0.0, 1.0, -1.0, float("nan"), float("inf"), 1e-45, 3e38]


_GROUPS = [
    ["a.weight", "a.bias", "b.weight", "blocks.0.weight", "norm.weight"],
    ["a.weight", "a.scale_weight", "a.input_scale", "a.bias", "scaled_fp8"],
    ["a.weight", "a.weight_scale", "a.comfy_quant", "b.weight"],
    ["a.gram", "a.mean", "a.amax", "a.histogram", "a.holdout_gram"],
    ["a.gram.panels", "a.gram.roots", "a.amax", "a.histogram"],
    ["a.gram.factor", "a.gram.diagonal", "a.mean"],
]


def _one_in(draw, times: int) -> bool:
    """Draw true once in ``times``. The ends of the range, which hypothesis prefers, mean false."""
    return 400 <= draw(st.integers(0, 999)) < 400 + 1000 // times if times > 2 else draw(st.booleans())


def _first_and_some(names: list[str]) -> st.SearchStrategy[list[str]]:
    """The first name and any of the others."""
    return st.lists(st.sampled_from(names[1:]), unique=True).map(lambda more: [names[0], *more])


@st.composite
def _files(draw) -> bytes:
    """Safetensors file with contiguous tensors, of which a few header entries are then changed."""
    header, data = {}, b""
    names = draw(st.one_of(st.lists(_NAMES, max_size=6, unique=True), *map(_first_and_some, _GROUPS)))
    quantized = any(name.endswith(("scale_weight", "comfy_quant")) for name in names)
    for name in names:
        if name.endswith("comfy_quant"):
            dtype, content = (
                "U8",
                draw(st.one_of(_CONFIG, _JSON.map(json.dumps), st.text(max_size=9))).encode(errors="replace"),
            )
            shape = [len(content)]
        else:
            dtype, shape = draw(st.sampled_from(_EXPECTED[name[2:]])) if name[2:] in _EXPECTED else ("F32", [16, 16])
            if quantized and name.endswith(".weight"):
                dtype = "F8_E4M3"
            if _one_in(draw, 10):
                dtype = draw(st.sampled_from(list(_SIZES)))
                shape = draw(st.one_of(st.just([16, 16]), st.just([]), st.lists(st.integers(0, 16), max_size=3)))
            count = _SIZES[dtype]
            for side in shape:
                count *= side
            content = (struct.pack("<f", draw(st.sampled_from(_VALUES))) * (count // 4 + 1))[:count]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    metadata = draw(_METADATA)
    if metadata:
        header["__metadata__"] = metadata
    for _ in range(draw(st.integers(1, 2)) if _one_in(draw, 2) else 0):
        name = draw(st.sampled_from([*header, "c"]))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        value = draw(st.one_of(_DTYPES, _UNEXPECTED, st.lists(_INTEGERS, max_size=3)))
        header[name] = (
            {**header[name], key: value} if isinstance(header.get(name), dict) and draw(st.booleans()) else draw(_JSON)
        )
    text = json.dumps(header).encode()
    position = draw(st.one_of(st.none(), st.integers(0, len(text) + 8)))
    content = safetensors(
        text, data, None if not _one_in(draw, 10) else draw(st.sampled_from([0, 1, 2**40, 2**64 - 1]))
    )
    if position is None or not _one_in(draw, 5):
        return content
    return content[:position] + draw(st.binary(max_size=4)) + content[position + 1 :]


def _mutate(draw, content: bytes) -> bytes:
    """Return ``content`` unchanged in most cases, else with a few bytes changed, or truncated.

    Draws do not depend on the content, which may contain memory addresses.
    """
    for _ in range(draw(st.integers(1, 3)) if _one_in(draw, 3) else 0):
        at = draw(_UINT16) * len(content) >> 16
        content = content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at + draw(st.integers(0, 8)) :]
    return content[: draw(_UINT16) * len(content) >> 16] if _one_in(draw, 10) else content


_UINT16 = st.integers(0, 0xFFFF)
_LAYER_NAMES = st.one_of(st.sampled_from(_GROUPS[0]), st.sampled_from(_GROUPS[0]), _NAMES)
_LAYERS = st.lists(
    st.tuples(_LAYER_NAMES, st.sampled_from([(16, 16), (32, 64), (32, 64), (7,), ()])),
    min_size=1,
    max_size=5,
    unique_by=lambda layer: layer[0],
)


@st.composite
def _shards(draw) -> dict[str, bytes]:
    """Index and two shards; the index may assign a tensor to a wrong or missing shard, or be missing itself."""
    if _one_in(draw, 5):
        count = draw(st.sampled_from([2, 2, 2, 3, 99_999]))
        return {f"x-{number:05}-of-{count:05}.safetensors": draw(_files()) for number in (1, 2)}
    shards = {f"{letter}.safetensors": draw(_files()) for letter in "xy"}
    names = {}
    for file, content in shards.items():
        try:
            header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
            names |= {name: file for name in header if name != "__metadata__"}
        except (ValueError, struct.error, AttributeError, TypeError):
            continue
    odd = st.one_of(
        _UNEXPECTED, st.sampled_from(["x.safetensors", "y.safetensors", "../x.safetensors", "none.safetensors"])
    )
    names |= draw(st.dictionaries(_NAMES, odd, max_size=2 if _one_in(draw, 3) else 0))
    index = {"metadata": draw(_JSON), "weight_map": names} if not _one_in(draw, 10) else draw(_JSON)
    return {"x.safetensors.index.json": _mutate(draw, json.dumps(index).encode())} | shards


_GGUF_TYPES = [
    (0, 1, 4),
    (1, 1, 2),
    (30, 1, 2),
    (8, 32, 34),
    (2, 32, 18),
]  # (GGUF type, values per block, bytes per block): F32, F16, BF16, Q8_0, Q4_0
_UNSUPPORTED_GGUF_TYPES = [(24, 1, 1), (39, 32, 17), (99, 1, 1)]  # I8, MXFP4, not a type


@st.composite
def _gguf(draw) -> dict[str, bytes]:
    """GGUF file with a few metadata pairs and with tensors of unquantized and quantized types."""

    def text(value: str) -> bytes:
        encoded = value.encode(errors="replace")
        return struct.pack("<Q", len(encoded)) + encoded

    pairs, entries, data = [], [], b""
    if draw(st.booleans()):
        pairs.append(
            text("general.architecture")
            + struct.pack("<I", 8)
            + text("flux" if not _one_in(draw, 5) else draw(st.sampled_from(["t5", ""])))
        )
    if _one_in(draw, 4):
        pairs.append(text("general.alignment") + struct.pack("<II", 4, draw(st.sampled_from([32, 64, 1, 0, 7, 2**31]))))
    for key in draw(st.lists(st.sampled_from(["split.no", "split.count"]), max_size=2)) if _one_in(draw, 5) else ():
        pairs.append(
            text(key) + struct.pack("<IH", draw(st.sampled_from([2, 2, 3, 7])), draw(st.sampled_from([0, 1, 9])))
        )
    if _one_in(draw, 4):
        pairs.append(text("config") + struct.pack("<I", 8) + text(draw(st.text(max_size=9))))
    for key in (
        draw(st.lists(st.sampled_from(["comfy.gguf.orig_shape.a.weight", "a", "b"]), max_size=2))
        if _one_in(draw, 3)
        else ()
    ):
        kind = draw(st.integers(0, 13))
        pairs.append(
            text(key) + struct.pack("<IIQ", 9, kind, draw(st.sampled_from([0, 2, 2**40]))) + struct.pack("<QQ", 16, 16)
        )
    for name, shape in draw(_LAYERS):
        kind, block, size = draw(st.sampled_from(_UNSUPPORTED_GGUF_TYPES if _one_in(draw, 10) else _GGUF_TYPES))
        sides = (
            tuple(reversed(shape))
            if not _one_in(draw, 20)
            else draw(st.lists(st.sampled_from([0, 1, 16, 2**32, 2**63]), max_size=3))
        )
        count = 16 * 64 * 2
        offset = len(data) if not _one_in(draw, 20) else draw(st.sampled_from([1, 2**40, 2**63]))
        entries.append(text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset))
        data += bytes(count * size // block)
        data += bytes(-len(data) % 64)
    counts = (
        (len(entries), len(pairs))
        if not _one_in(draw, 20)
        else draw(st.tuples(*[st.sampled_from([0, 1, 9, 2**40, 2**63])] * 2))
    )
    header = (
        b"GGUF"
        + struct.pack("<IQQ", draw(st.sampled_from([2, 1, 0])) if _one_in(draw, 10) else 3, *counts)
        + b"".join(pairs)
        + b"".join(entries)
    )
    return {"x.gguf": _mutate(draw, header) + bytes(-len(header) % 32) + data}


_LEGACY_DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]
_ARCHIVE_DTYPES = [torch.float8_e4m3fn, torch.uint16]  # not supported by the format of torch before 1.6
_VIEWS = [
    lambda t: t,
    lambda t: t.t() if t.ndim == 2 else t,
    lambda t: t[..., ::2] if t.ndim else t,
    torch.nn.Parameter,
    lambda t: t.expand(3, *t.shape),
]


@st.composite
def _pickles(draw) -> dict[str, bytes]:
    """Checkpoint of torch, as an archive or in the format before 1.6, with a mutated pickle or archive."""
    archive = draw(st.booleans())
    state = {}
    for name, shape in draw(_LAYERS):
        form = draw(st.sampled_from(_VIEWS)) if _one_in(draw, 4) else _VIEWS[0]
        dtype = (
            draw(st.sampled_from([*_LEGACY_DTYPES, *(_ARCHIVE_DTYPES if archive else ())]))
            if _one_in(draw, 3)
            else torch.bfloat16
        )
        values = torch.zeros(shape, dtype=dtype)
        state[name] = form(values) if dtype.is_floating_point or form is not torch.nn.Parameter else values
    checkpoint = (
        state
        if not _one_in(draw, 3)
        else draw(
            st.sampled_from(
                [
                    {"state_dict": state, "step": 3, "more": [1.5, None, ("a", {2})]},
                    {"model": state, "ema": dict(state)},
                    {"ema": state, "step": 3, "config": {"a": {}}},
                    list(state.values()),
                ]
            )
        )
    )
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, _use_new_zipfile_serialization=archive)
    if not archive:
        return {"x.pt": _mutate(draw, buffer.getvalue())}
    made = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(made, "w", 8 if _one_in(draw, 15) else 0) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, _mutate(draw, content) if name.endswith(".pkl") or _one_in(draw, 30) else content)
    return {"x.pt": _mutate(draw, made.getvalue()) if _one_in(draw, 5) else made.getvalue()}


FILES = {
    ".safetensors": _files().map(lambda content: {"x.safetensors": content}),
    ".safetensors.index.json": _shards(),
    ".gguf": _gguf(),
    ".pt": _pickles(),
}


@st.composite
def _journals(draw, records: list[tuple[object, bytes]]) -> tuple[bytes, bool]:
    """First records of an interrupted run's journal, and whether some were forged: changed, with a valid checksum.

    A few bytes may then be changed.
    """
    made, forged = b"", draw(st.booleans())
    for record, payload in records[: draw(st.integers(1, len(records)))]:
        if made and forged and _one_in(draw, 10):
            key = draw(st.sampled_from(["dtype", "shape", "name", "checksum", "layer", "events", "config"]))
            changed = {**record, key: draw(st.one_of(_UNEXPECTED, _JSON))} if isinstance(record, dict) else record
            record = draw(st.sampled_from([changed, draw(_JSON)]))
        text = json.dumps(record).encode()
        made += struct.pack("<IIQ", len(text), zlib.crc32(text), len(payload)) + text + payload
    return (_mutate(draw, made) if draw(st.booleans()) else made), forged


JOURNALS = _journals
_RULES = st.dictionaries(
    st.one_of(st.sampled_from(["a", "b.*", "^blocks", "x{2}"]), st.text("ab.*+?()[]{}|^$\\d0,", max_size=8)),
    st.one_of(
        st.sampled_from(["fp8", "int8", "skip", "none"]),
        st.sampled_from(
            [{"format": "int8_tensorwise"}, {"skip": True}, {"format": "int8_blockwise", "block_size": 64}]
        ),
        st.dictionaries(
            st.sampled_from(["format", "granularity", "block_size", "convrot", "skip", "x"]),
            st.one_of(_UNEXPECTED, st.just("int8")),
            max_size=3,
        ),
    ),
    max_size=3,
).map(json.dumps)
_RECIPE_VALUES = {
    "format": ["float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise", "measured"],
    "granularity": [None, "tensor", "row", "block"],
    "block_size": [None, 128, 64],
    "convrot": [None, False, "auto", 256],
    "preset": ["auto", "none", "flux", "sdxl"],
    "keep": [[], ["norm"], ["a.*b", "^x$"]],
    "heur": [False, True],
    "seed": [0, 7],
    "rounding": ["auto", "nearest", "principal", "stochastic"],
    "num_iter": [None, 10],
    "lr": [None, 0.01],
    "layer_config": ["", '{"a":"fp8"}'],
    "target_size": [None, 1.5],
    "target_time": [None, 0.8],
}


@st.composite
def _recipes(draw) -> dict[str, object]:
    """Up to three fields with values that are valid on their own, sometimes one with an unexpected value."""
    fields = draw(st.lists(st.sampled_from(list(_RECIPE_VALUES)), max_size=3, unique=True))
    made = {name: draw(st.sampled_from(_RECIPE_VALUES[name])) for name in fields}
    if _one_in(draw, 3):
        made[draw(st.sampled_from([*_RECIPE_VALUES, "more"]))] = draw(st.one_of(_UNEXPECTED, _JSON))
    return made


def _toml(fields: dict[str, object]) -> str:
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in fields.items() if value is not None)


_PATTERNS = st.lists(
    st.sampled_from(
        [
            "a",
            "blocks",
            ".",
            ".*",
            "\\d+",
            "[0-3]",
            "(a|b)",
            "x?",
            "{2}",
            "{1,3}",
            "^",
            "$",
            "\\.",
            "(",
            ")",
            "[",
            "*",
            "\\1",
            "(?i)",
        ]
    ),
    max_size=6,
).map("".join)
TEXTS = {
    "layer config": st.one_of(_RULES, st.text(max_size=30)),
    "keep pattern": st.one_of(_PATTERNS, st.text(max_size=30)),
    "recipe in JSON": st.one_of(_recipes().map(json.dumps), _recipes().map(json.dumps), st.text(max_size=30)),
    "recipe in TOML": st.one_of(_recipes().map(_toml), _recipes().map(_toml), st.text(max_size=30)),
}
