"""TOML of untrusted sources: that of the standard library, with a bounded number of parts in a key."""

import pytest

from learned_rounding.quant_core.recipes.toml import parse_bounded_toml, tomllib


def test_it_is_the_toml_of_the_standard_library():
    text = 'a = 1\n[b.c]\nd = ["x.y", 2.5, true]\n"e.f" = \'g\''
    assert parse_bounded_toml(text) == tomllib.loads(text)


def test_invalid_toml_is_a_value_error(subtests):
    for text in ["a = ", "a = 1\na = 2", "a"]:
        with subtests.test(text=text), pytest.raises(ValueError):
            parse_bounded_toml(text)


# The time of the reader is quadratic in the parts of a key.
LONG_KEYS = {
    "bare": "a." * 64 + "b = 1",
    "table": "[" + '"a" . ' * 64 + "b]",
    "in a table": "x = {" + "'a.b'\t." * 64 + "b = 1}",
    "escaped quote": '"a\\"b".' * 64 + "b = 1",
}


def test_keys_of_many_parts_are_refused(subtests):
    for text in LONG_KEYS.values():
        with subtests.test(text=text), pytest.raises(ValueError, match="a key of 64 parts or more"):
            parse_bounded_toml(text)


def test_keys_of_fewer_parts_are_read():
    table = parse_bounded_toml("a." * 63 + "b = 1")
    for _ in range(63):
        table = table["a"]
    assert table == {"b": 1}


def test_names_of_layers_are_no_dotted_keys():
    names = [f"double_blocks.{index}.img_attn.qkv.norm.weight" for index in range(100)]
    assert parse_bounded_toml(f"keep = {names}") == {"keep": names}
