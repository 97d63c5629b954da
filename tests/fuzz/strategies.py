"""Files and texts that are nearly right: made from sound ones, with a few things changed. Used by hypothesis and by the coverage-guided run."""

import json
import struct

from hypothesis import strategies as st

from learned_rounding.attacks.cases import safetensors

__all__ = ["FILES", "TEXTS"]

_DTYPES = st.sampled_from(["F32", "BF16", "F8_E4M3", "I8", "U8", "F64", "BOOL", "X9", 7, None])
_WHOLE = st.one_of(st.integers(-1, 40), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**30]))
_ODD = st.one_of(st.none(), st.booleans(), _WHOLE, st.floats(), st.text(max_size=5), st.just([]), st.just({}), st.just([[[]]]))
_SUFFIXES = ["weight", "weight_scale", "scale_weight", "input_scale", "comfy_quant", "bias", "gram", "gram.panels", "gram.roots"]
_SUFFIXES += ["gram.factor", "gram.diagonal", "mean", "amax", "histogram", "holdout_gram"]
_NAMES = st.one_of(
    st.tuples(st.sampled_from("ab"), st.sampled_from(_SUFFIXES)).map(".".join), st.just("scaled_fp8"), st.text(max_size=6)
)
_JSON = st.recursive(_ODD, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)), max_leaves=6)
_CONFIG = st.dictionaries(
    st.sampled_from(["format", "per_row", "convrot", "convrot_groupsize", "group_size", "full_precision_matrix_mult"]),
    st.one_of(st.sampled_from(["float8_e4m3fn", "int8_tensorwise", "int8_blockwise", "mxfp8"]), _ODD),
).map(json.dumps)
_METADATA = st.dictionaries(
    st.sampled_from(["_quantization_metadata", "learned_rounding", "learned_rounding_calibration", "format"]),
    st.one_of(
        _JSON.map(json.dumps),
        st.dictionaries(st.sampled_from(["layers", "tokens", "version", "sensitivity", "provenance", "fingerprint"]), _JSON).map(json.dumps),
        st.dictionaries(st.just("layers"), st.dictionaries(st.sampled_from("ab"), _CONFIG.map(json.loads))).map(json.dumps),
        st.text(max_size=8),
    ),
)
_SIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "F64": 8, "BOOL": 1}
_VALUES = [0.0, 1.0, -1.0, float("nan"), float("inf"), 1e-45, 3e38]


@st.composite
def _files(draw) -> bytes:
    """A header whose tensors lie one behind the other, then a few entries spoilt."""
    header, data = {}, b""
    for name in draw(st.lists(_NAMES, max_size=6, unique=True)):
        if name.endswith("comfy_quant"):
            dtype, content = "U8", draw(st.one_of(_CONFIG, _JSON.map(json.dumps), st.text(max_size=9))).encode(errors="replace")
            shape = [len(content)]
        else:
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
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*header, "c"]))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        value = draw(st.one_of(_DTYPES, _ODD, st.lists(_WHOLE, max_size=3)))
        header[name] = {**header[name], key: value} if isinstance(header.get(name), dict) and draw(st.booleans()) else draw(_JSON)
    text = json.dumps(header).encode()
    cut = draw(st.one_of(st.none(), st.integers(0, len(text) + 8)))
    made = safetensors(text, data, draw(st.one_of(st.none(), st.none(), st.sampled_from([0, 1, 2**40, 2**64 - 1]))))
    return made if cut is None or draw(st.booleans()) else made[:cut] + draw(st.binary(max_size=4)) + made[cut + 1 :]


FILES = _files()
_RULES = st.dictionaries(
    st.text("ab.*+?()[]{}|^$\\d0,", max_size=8),
    st.one_of(
        st.sampled_from(["fp8", "int8", "skip", "none"]),
        st.dictionaries(st.sampled_from(["format", "granularity", "block_size", "convrot", "skip", "x"]), st.one_of(_ODD, st.just("int8")), max_size=3),
    ),
    max_size=3,
).map(json.dumps)
_FIELDS = ["format", "granularity", "block_size", "convrot", "preset", "keep", "heur", "seed", "target_size", "layer_config", "rounding", "num_iter", "lr"]
_RECIPES = st.dictionaries(st.sampled_from(_FIELDS), st.one_of(_JSON, st.sampled_from(["int8_tensorwise", "measured", "row", "block"])), max_size=4)
TEXTS = st.one_of(
    _RULES,
    _RECIPES.map(json.dumps),
    _RECIPES.map(lambda fields: "\n".join(f"{key} = {json.dumps(value)}" for key, value in fields.items())),
    st.text(max_size=30),
)
