"""FP8 formats of the table: element, granularity, and how ComfyUI multiplies them."""

from learned_rounding.quant_core.formats import E4M3, E5M2
from learned_rounding.quant_core.formats.fp8 import FORMATS

BY_NAME = {entry.name: entry for entry in FORMATS}


def test_elements_and_granularities(subtests):
    for name, elements, granularity in (
        ("float8_e4m3fn", E4M3, "tensor"),
        ("float8_e5m2", E5M2, "tensor"),
        ("float8_e4m3fn_rowwise", E4M3, "row"),
        ("float8_e4m3fn_blockwise", E4M3, "block"),
    ):
        with subtests.test(name):
            assert BY_NAME[name].elements is elements
            assert list(BY_NAME[name].granularities) == [granularity]


def test_e4m3_is_multiplied_from_sm_8_9(subtests):
    for name in BY_NAME.keys() - {"float8_e5m2"}:
        with subtests.test(name):
            assert BY_NAME[name].native_since == (8, 9)


def test_e5m2_is_dequantized_on_every_card():
    assert BY_NAME["float8_e5m2"].full_precision_matmul == "always"
    assert BY_NAME["float8_e5m2"].activations is None


def test_only_tensor_scales_leave_a_choice_of_the_product(subtests):
    for name, expected in (
        ("float8_e4m3fn", "choice"),
        ("float8_e4m3fn_rowwise", "never"),
        ("float8_e4m3fn_blockwise", "never"),
    ):
        with subtests.test(name):
            assert BY_NAME[name].full_precision_matmul == expected


def test_scales_per_row_and_block_need_this_node_pack():
    assert {name for name, entry in BY_NAME.items() if entry.stock_since is None} == {
        "float8_e4m3fn_rowwise",
        "float8_e4m3fn_blockwise",
    }
