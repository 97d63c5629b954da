"""Calibration files: names in the file, plain files without metadata, and files that are not valid."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from learned_rounding.quant_core.calibration import (
    CalibrationFile,
    LayerStatistics,
    LowRankHessian,
    PackedHessian,
    PairedHessian,
    dense_hessian,
)
from learned_rounding.quant_core.calibration.file import write_calibration
from learned_rounding.quant_core.calibration.hessian import pack_triangle
from learned_rounding.quant_core.calibration.histogram import BINS
from learned_rounding.quant_core.calibration.panels import pack_symmetric, packed_size
from learned_rounding.quant_core.errors import CalibrationError

CPU = torch.device("cpu")
METADATA_KEY = "learned_rounding_calibration"
WIDTH = 16
TENSORS = {  # suffix in the file → (field of LayerStatistics, value)
    "gram": ("hessian", torch.eye(WIDTH)),
    "mean": ("mean", torch.ones(WIDTH)),
    "amax": ("amax", torch.full((WIDTH,), 2.0)),
    "histogram": ("histogram", torch.ones(BINS)),
}


@pytest.fixture
def read(tmp_path):
    """read(header, **tensors) → statistics of layer "a" of a file with these tensors."""

    def read(header=None, **tensors):
        path = tmp_path / "x.calib.safetensors"
        values = {suffix: value for suffix, (_, value) in TENSORS.items()} | tensors
        save_file(
            {f"a.{suffix}": value for suffix, value in values.items()}, path, {METADATA_KEY: json.dumps(header or {})}
        )
        with CalibrationFile(path) as file:
            return file.layer_statistics("a")

    return read


def test_tensors_that_are_not_floating_point_are_rejected(read, sentences, subtests):
    for dtype in [torch.complex64, torch.uint16, torch.int64, torch.bool]:
        for suffix in TENSORS:
            with subtests.test(suffix, dtype=dtype), sentences.raises(CalibrationError):
                read(**{suffix: TENSORS[suffix][1].to(dtype)})


def test_tensors_of_any_float_dtype_are_read(read, subtests):
    for dtype in [torch.float8_e4m3fn, torch.bfloat16, torch.float64]:
        for suffix, (field, expected) in TENSORS.items():
            with subtests.test(suffix, dtype=dtype):
                value = getattr(read(**{suffix: expected.to(dtype)}), field)
                assert torch.equal(value.float(), expected)
                assert value.max() == expected.max()


def test_a_sensitivity_must_be_finite_and_non_negative(read, sentences, subtests):
    for value in [-1.0, float("nan"), float("inf"), -1e300]:
        with subtests.test(value=value), sentences.raises(CalibrationError):
            read({"layers": {"a": ["a", WIDTH, WIDTH]}, "sensitivity": {"a": value}})


def test_the_sensitivity_of_a_step_must_be_valid(read, subtests):
    for steps in [[[0.5, -1]], [[1.5, 1]], [[0.5]], [[0.5, "x"]], 3, [[0.5, float("inf")]]]:
        with subtests.test(steps=steps), pytest.raises(CalibrationError, match="invalid calibration header"):
            read({"layers": {"a": ["a", WIDTH, WIDTH]}, "step_sensitivity": {"a": steps}})


def test_a_sensitivity_is_part_of_the_statistics(read):
    assert read({"layers": {"a": ["a", WIDTH, WIDTH]}, "sensitivity": {"a": 0.5}}).sensitivity == 0.5


def test_an_invalid_header_is_rejected(tmp_path, sentences, subtests):
    for header in ["{", '{"layers": 3}', '{"layers": {"q": 1}}', "[]"]:
        with subtests.test(header):
            save_file({"q.gram": torch.eye(2)}, tmp_path / "c", metadata={METADATA_KEY: header})
            with sentences.raises(CalibrationError):
                CalibrationFile(tmp_path / "c")


def test_a_newer_version_is_rejected(tmp_path, sentences):
    save_file({"q.gram": torch.eye(2)}, tmp_path / "c", metadata={METADATA_KEY: '{"version": 99}'})
    with sentences.raises(CalibrationError):
        CalibrationFile(tmp_path / "c")


def test_a_file_without_metadata_is_read(tmp_path):
    save_file({"q.gram": 2 * torch.eye(3), "q.mean": torch.ones(3)}, tmp_path / "c")
    with CalibrationFile(tmp_path / "c") as file:
        assert file.layer_statistics("q").hessian.equal(2 * torch.eye(3))
        assert file.layer_statistics("k") is None
        assert file.layers == {}
        assert file.provenance == {}
        file.check({})


def test_8_bit_factors_are_version_2(tmp_path):
    correlations = torch.eye(WIDTH) + 0.5
    packed = PackedHessian(pack_symmetric(correlations / 1.5, torch.float16), torch.ones(WIDTH))
    path = tmp_path / "c"
    write_calibration(path, {"a": LayerStatistics(pack_triangle(packed, CPU))}, {"a": "a"}, {"a": (3, WIDTH)}, {}, {})
    with safe_open(path, "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}
        assert json.loads(file.metadata()[METADATA_KEY])["version"] == 2
    assert dtypes == {
        "a.gram.triangle": torch.int8,
        "a.gram.triangle_scales": torch.float32,
        "a.gram.triangle_diagonal": torch.float32,
        "a.gram.roots": torch.float32,
    }
    with CalibrationFile(path) as file:
        found = file.layer_statistics("a").hessian
    torch.testing.assert_close(dense_hessian(found, WIDTH, CPU), correlations / 1.5, rtol=0, atol=5e-3)


def test_names_and_dtypes_in_the_file_are_those_of_version_1(tmp_path):
    """Files of release 0.1.0 have these tensors and metadata; they must remain readable."""
    panels, rms, ones = torch.ones(packed_size(WIDTH)), torch.ones(WIDTH), torch.ones(2 * WIDTH)
    low_rank = LowRankHessian(torch.ones(WIDTH, 4), rms)
    statistics = {
        "packed": LayerStatistics(PackedHessian(panels, rms), low_rank, rms, rms, torch.ones(BINS)),
        "paired": LayerStatistics(PairedHessian(torch.ones(packed_size(2 * WIDTH)), ones, ones)),
        "dense": LayerStatistics(torch.eye(WIDTH)),
    }
    owners, shapes = {"packed": "packed", "shared": "packed"}, {"packed": (3, WIDTH), "shared": (5, WIDTH)}
    path = tmp_path / "c"
    write_calibration(path, statistics, owners, shapes, {"packed": (7, 2)}, {"seed": 1}, {"shared": 0.5})
    with safe_open(path, "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}
        header = json.loads(file.metadata()[METADATA_KEY])
    assert dtypes == {
        "packed.gram.panels": torch.float16,
        "packed.gram.roots": torch.float32,
        "packed.holdout_gram.factor": torch.bfloat16,
        "packed.holdout_gram.diagonal": torch.float32,
        "packed.mean": torch.float32,
        "packed.amax": torch.float32,
        "packed.histogram": torch.float32,
        "paired.gram.panels": torch.float16,
        "paired.gram.roots": torch.float32,
        "paired.gram.mean": torch.float32,
        "dense.gram": torch.float32,
    }
    assert header == {
        "version": 1,
        "architecture": header["architecture"],
        "layers": {"packed": ["packed", 3, WIDTH], "shared": ["packed", 5, WIDTH]},
        "tokens": {"packed": [7, 2]},
        "sensitivity": {"shared": 0.5},
        "provenance": {"seed": 1},
    }
    with CalibrationFile(path) as file:
        for owner, expected in statistics.items():
            assert type(file.layer_statistics(owner).hessian) is type(expected.hessian)
        assert file.layer_statistics("shared").sensitivity == 0.5
        assert file.sensitivity("shared") == 0.5
        assert file.tokens("shared") == (7, 2)
