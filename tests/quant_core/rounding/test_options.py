"""Options of the rounding: every one acts or is refused by name."""

import dataclasses

import pytest

from learned_rounding.quant_core.errors import RecipeError, UnknownNameError
from learned_rounding.quant_core.rounding import (
    MODEL_ROUNDINGS,
    OPTIONS,
    ROUNDINGS,
    RoundingConfig,
)

VALUES = {
    "optimizer": "adamw",
    "num_iter": 10,
    "lr": 0.1,
    "lr_schedule": "plateau",
    "early_stop": 5,
    "top_p": 0.3,
    "min_k": 2,
    "max_k": 64,
    "full_matrix": True,
    "weight_cost": 0.05,
    "damping": 0.1,
    "sweeps": 2,
    "bias_correction": "none",
    "smoothing": True,
    "beam_width": 4,
}


def test_every_option_is_a_field_with_a_value_to_try():
    assert {field.name for field in dataclasses.fields(RoundingConfig)} == {"rounding", *OPTIONS}
    assert set(VALUES) | {"calib_samples"} == set(OPTIONS)


def test_options_act_on_roundings_that_exist(subtests):
    for name, option in OPTIONS.items():
        with subtests.test(name):
            assert set(option.acts) <= set(ROUNDINGS)


def test_an_option_acts_or_is_refused(subtests, sentences):
    for name, value in VALUES.items():
        for rounding in ROUNDINGS:
            if rounding == "auto":
                continue
            with subtests.test(name, rounding=rounding):
                if rounding in OPTIONS[name].acts:
                    assert getattr(RoundingConfig(rounding, **{name: value}), name) == value
                else:
                    with sentences.raises(RecipeError):
                        RoundingConfig(rounding, **{name: value})


def test_values_without_meaning_are_refused(subtests, sentences):
    for options in (
        {"optimizer": "adamww"},
        {"lr_schedule": "cosine"},
        {"bias_correction": "yes"},
        {"num_iter": -1},
        {"num_iter": 2.5},
        {"num_iter": True},
        {"lr": 0.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"full_matrix": 1},
        {"damping": float("nan")},
        {"min_k": 100, "max_k": 50},
        {"sweeps": 1, "num_iter": 5},
        {"beam_width": 4, "optimizer": "adamw"},
        {"beam_width": 17},
        {"calib_samples": 10},
        {"top_p": 0.1, "damping": 0.1},
    ):
        with subtests.test(**options), sentences.raises((RecipeError, UnknownNameError)):
            RoundingConfig(**options)


def test_an_unknown_rounding_suggests_the_nearest(sentences):
    with sentences.raises(UnknownNameError):
        RoundingConfig("neerest")


def test_a_rounding_that_is_no_name_is_refused():
    with pytest.raises(UnknownNameError):
        RoundingConfig(7)


def test_auto_becomes_what_options_and_calibration_allow(subtests):
    for method, calibrated, expected in (
        (RoundingConfig(), True, "calibrated"),
        (RoundingConfig(), False, "auto"),
        (RoundingConfig(top_p=0.1), False, "principal"),
        (RoundingConfig(num_iter=10), False, "principal"),
        (RoundingConfig(num_iter=10), True, "calibrated"),
        (RoundingConfig(bias_correction="none"), False, "auto"),
        (RoundingConfig("nearest"), True, "nearest"),
    ):
        with subtests.test(str(method), calibrated=calibrated):
            assert method.resolve(calibrated=calibrated).rounding == expected


def test_options_without_effect_on_the_resolved_rounding_are_refused(subtests, sentences):
    for method, calibrated in (
        (RoundingConfig(top_p=0.1), True),
        (RoundingConfig(damping=0.1), False),
        (RoundingConfig("calibrated"), False),
    ):
        with subtests.test(str(method), calibrated=calibrated), sentences.raises(RecipeError):
            method.resolve(calibrated=calibrated)


def test_options_of_gradient_steps_ask_for_them(subtests):
    for options in ({"num_iter": 10}, {"optimizer": "radam"}, {"early_stop": 0}):
        with subtests.test(**options):
            assert RoundingConfig(**options).gradient


def test_other_options_ask_for_no_gradient_steps(subtests):
    for options in ({}, {"top_p": 0.1}):
        with subtests.test(**options):
            assert not RoundingConfig(**options).gradient


def test_a_layer_without_statistics_is_searched():
    method = RoundingConfig("calibrated", damping=0.1, bias_correction="none").uncalibrated()
    assert method == RoundingConfig(bias_correction="none")


# Roundings that run the model


@pytest.mark.parametrize("rounding", MODEL_ROUNDINGS)
def test_model_roundings_need_a_calibration_and_stay_what_they_are(rounding, sentences):
    method = RoundingConfig(rounding, damping=0.1)
    assert method.runs_model
    assert method.resolve(calibrated=True) == method
    with sentences.raises(RecipeError):
        method.resolve(calibrated=False)


def test_other_roundings_do_not_run_the_model(subtests):
    for rounding in ROUNDINGS:
        if rounding not in MODEL_ROUNDINGS:
            method = RoundingConfig(rounding)
            with subtests.test(rounding):
                assert not method.runs_model
                assert method.layerwise() is method


def test_options_of_calibrated_rounding_act_on_model_roundings_too():
    calibrated = {name for name, option in OPTIONS.items() if "calibrated" in option.acts}
    steps = {"optimizer", "num_iter", "lr", "lr_schedule", "early_stop"}
    assert {name for name, option in OPTIONS.items() if "sequential" in option.acts} == calibrated - steps
    assert {name for name, option in OPTIONS.items() if "reconstructed" in option.acts} == calibrated


def test_layers_of_model_roundings_are_calibrated_by_gptq():
    options = {"damping": 0.1, "sweeps": 2, "beam_width": 4, "bias_correction": "none", "smoothing": True}
    expected = RoundingConfig("calibrated", **options)
    assert RoundingConfig("sequential", **options).layerwise() == expected
    learned = {"optimizer": "adamw", "num_iter": 10, "lr": 0.1, "lr_schedule": "plateau", "early_stop": 5}
    layerwise = RoundingConfig("reconstructed", **options, **learned).layerwise()
    assert layerwise == expected
    assert not layerwise.gradient


def test_reconstructed_takes_options_of_gptq_and_of_gradient_steps():
    method = RoundingConfig("reconstructed", optimizer="radam", num_iter=10, sweeps=2)
    assert method.optimizer == "radam"
    assert method.num_iter == 10
    assert method.sweeps == 2


@pytest.mark.parametrize("rounding", MODEL_ROUNDINGS)
def test_a_layer_without_statistics_is_searched_in_a_model_rounding_too(rounding):
    method = RoundingConfig(rounding, damping=0.1, bias_correction="none").layerwise().uncalibrated()
    assert method == RoundingConfig(bias_correction="none")
