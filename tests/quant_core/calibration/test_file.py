"""Calibration files that others made: what is read, and what is refused by a sentence."""

import json

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core.calibration import CalibrationFile
from learned_rounding.quant_core.calibration.histogram import BINS
from learned_rounding.quant_core.errors import CalibrationError

STATISTICS = {
    "gram": torch.eye(16),
    "mean": torch.ones(16),
    "amax": torch.full((16,), 2.0),
    "histogram": torch.ones(BINS),
}


@pytest.fixture
def opened(tmp_path):
    """opened(header, **tensors) → what is known of the one layer, "a"."""

    def read(header=None, **tensors):
        path = tmp_path / "x.calib.safetensors"
        save_file(
            {f"a.{name}": tensor for name, tensor in (STATISTICS | tensors).items()},
            path,
            {"learned_rounding_calibration": json.dumps(header or {})},
        )
        with CalibrationFile(path) as known:
            return known.inputs("a")

    return read


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.int64, torch.bool])
def test_statistics_of_other_dtypes_are_refused(opened, name, dtype, sentences):
    with sentences.raises(CalibrationError):
        opened(**{name: STATISTICS[name].to(dtype)})


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_statistics_may_be_of_any_float_dtype(opened, name, dtype):
    value = getattr(opened(**{name: STATISTICS[name].to(dtype)}), name)
    assert torch.equal(value.float(), STATISTICS[name]) and value.max() == STATISTICS[name].max()


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), -1e300])
def test_a_sensitivity_is_finite_and_not_negative(opened, value, sentences):
    with sentences.raises(CalibrationError):
        opened({"layers": {"a": ["a", 16, 16]}, "sensitivity": {"a": value}})
    assert opened({"layers": {"a": ["a", 16, 16]}, "sensitivity": {"a": 0.5}}).sensitivity == 0.5
