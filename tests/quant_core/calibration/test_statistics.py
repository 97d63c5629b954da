"""Statistics of a layer, and calibrations in memory."""

import torch

from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics, LowRankHessian
from learned_rounding.quant_core.errors import CalibrationError

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))


def test_validation_activations_are_those_whose_hessian_is_stored():
    statistics = LayerStatistics(validation_hessian=LowRankHessian((X.t() / 20**0.5).bfloat16(), torch.zeros(6)))
    found = statistics.validation_activations
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, X, rtol=1e-2, atol=0)


def test_validation_activations_are_none_where_only_their_hessian_is_known(subtests):
    for label, hessian in {
        "none": None,
        "dense": torch.eye(6),
        "with directions left out": LowRankHessian(X.t(), torch.ones(6)),
    }.items():
        with subtests.test(label):
            assert LayerStatistics(validation_hessian=hessian).validation_activations is None


def test_only_the_hessian_moves_to_a_device():
    moved = LayerStatistics(torch.eye(6), mean=torch.ones(6)).move_hessian(torch.device("meta"))
    assert moved.hessian.device.type == "meta"
    assert moved.mean.device.type == "cpu"


def test_statistics_without_a_hessian_do_not_move():
    statistics = LayerStatistics(mean=torch.ones(6))
    assert statistics.move_hessian(torch.device("meta")) is statistics


def test_calibration_in_memory_has_the_statistics_of_its_layers():
    known = LayerStatistics(torch.eye(6), sensitivity=0.5)
    calibration = InMemoryCalibration({"a": known})
    assert calibration.layer_statistics("a") is known
    assert calibration.layer_statistics("b") is None
    assert calibration.sensitivity("a") == 0.5
    assert calibration.sensitivity("b") is None
    assert calibration.step_sensitivity("a") is None


def test_calibration_in_memory_has_no_fingerprint_unless_it_is_set():
    assert InMemoryCalibration({}).fingerprint is None


def test_calibration_of_another_model_is_refused(sentences):
    calibration = InMemoryCalibration({"a": LayerStatistics()})
    calibration.check({"a": (4, 6), "b": (6, 4)})
    with sentences.raises(CalibrationError):
        calibration.check({"b": (6, 4)})
