"""Names of version 0.1.0 that its documents mention: they work, and warn."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.calibration import LayerStatistics
from learned_rounding.quant_core.convert.dequantize import DecodedSource
from learned_rounding.quant_core.sources import open_source


@pytest.fixture
def quantized():
    return quantize_weight(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), "int8_tensorwise")


def test_codes_are_the_quantized_values(quantized):
    with pytest.deprecated_call():
        assert quantized.codes is quantized.qdata


def test_rounded_has_the_winner(quantized):
    with pytest.deprecated_call():
        assert quantized.rounded.winner == quantized.solution.solver == "nearest"


def test_statistics_have_their_old_names(subtests):
    for old, new in [("gram", "hessian"), ("holdout_gram", "validation_hessian")]:
        with subtests.test(old=old, new=new):
            statistics = LayerStatistics(**{new: torch.eye(3)})
            with pytest.deprecated_call():
                assert getattr(statistics, old) is getattr(statistics, new)


def test_parameters_of_quantize_weight_have_their_old_names(subtests):
    for old, new in [("gram", "hessian"), ("holdout_gram", "validation_hessian"), ("mean_input", "mean")]:
        with subtests.test(old=old, new=new):
            weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
            value = torch.ones(16) if new == "mean" else torch.diag(torch.linspace(1, 2, 16))
            with pytest.deprecated_call():
                made = quantize_weight(weight, "int8_tensorwise", bias=torch.zeros(8), **{old: value})
            expected = quantize_weight(weight, "int8_tensorwise", bias=torch.zeros(8), **{new: value})
            assert torch.equal(made.qdata, expected.qdata)
            assert torch.equal(made.bias, expected.bias)


def test_modules_that_moved_have_their_documented_names():
    with pytest.deprecated_call():
        from learned_rounding.quant_core.checkpoints import open_source as old_open_source
    with pytest.deprecated_call():
        from learned_rounding.quant_core.requantize import DecodedSource as OldDecodedSource
    assert old_open_source is open_source
    assert OldDecodedSource is DecodedSource
