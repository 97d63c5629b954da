import pytest

from learned_rounding.quant_core.errors import UnknownNameError
from learned_rounding.quant_core.rounding import ROUNDINGS, check_rounding


def test_every_listed_rounding_is_known():
    assert {"auto", "nearest"} <= set(ROUNDINGS)
    for name in ROUNDINGS:
        check_rounding(name)


def test_an_unknown_rounding_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="no rounding 'neerest'.*did you mean 'nearest'"):
        check_rounding("neerest")
