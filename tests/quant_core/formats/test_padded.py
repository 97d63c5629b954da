"""Padded weights: the JSON key that holds their own shape."""

import pytest

from learned_rounding.quant_core.formats.padded import padded_config, padded_shape


def test_a_padded_weight_has_its_shape_in_the_json(subtests):
    for shape in ((17, 32), (16, 33), (1, 1)):
        with subtests.test(shape=shape):
            assert padded_config(shape, 16) == {"orig_shape": list(shape)}


def test_a_weight_of_whole_multiples_needs_no_key():
    assert padded_config((32, 48), 16) == {}


def test_the_shape_is_read_back():
    assert padded_shape((32, 48), padded_config((17, 33), 16)) == (17, 33)


def test_without_the_key_the_stored_shape_is_the_shape():
    assert padded_shape((32, 48), {}) == (32, 48)


def test_a_shape_that_contradicts_the_stored_weight_is_refused(subtests):
    for given in ([33, 48], [17, 49], [0, 48], [-1, 48], [17], [17, 33, 1], [17.0, 33], [True, 33], "17", 17, None):
        with subtests.test(given=given), pytest.raises(ValueError, match="its JSON has orig_shape="):
            padded_shape((32, 48), {"orig_shape": given})
