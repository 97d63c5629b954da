"""INT8 formats of the table: granularities, their JSON, and where they are rotated."""

from learned_rounding.quant_core.formats import INT8
from learned_rounding.quant_core.formats.int8 import FORMATS

TENSORWISE, BLOCKWISE = FORMATS


def test_names_are_those_of_comfyui():
    assert [entry.name for entry in FORMATS] == ["int8_tensorwise", "int8_blockwise"]


def test_elements_are_int8(subtests):
    for entry in FORMATS:
        with subtests.test(entry.name):
            assert entry.elements is INT8


def test_rows_come_first_and_are_marked_in_the_json():
    assert list(TENSORWISE.granularities) == ["row", "tensor"]
    assert TENSORWISE.granularities["row"] == {"per_row": True}
    assert TENSORWISE.granularities["tensor"] == {}


def test_only_rows_are_rotated():
    assert TENSORWISE.rotated == ("row",)
    assert BLOCKWISE.rotated == ()


def test_every_card_multiplies_int8(subtests):
    for entry in FORMATS:
        with subtests.test(entry.name):
            assert entry.native_since == (0, 0)
            assert entry.full_precision_matmul == "never"


def test_blocks_need_this_node_pack():
    assert TENSORWISE.stock_since == "0.27"
    assert BLOCKWISE.stock_since is None
