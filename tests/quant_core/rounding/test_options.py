"""Options of the rounding: every one acts or is refused by name."""

import dataclasses

import pytest

from learned_rounding.quant_core.errors import RecipeError, UnknownNameError
from learned_rounding.quant_core.rounding import (
    MODEL_ROUNDINGS,
    OPTIMIZERS,
    OPTIONS,
    ROUNDINGS,
    SCHEDULES,
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


def test_the_table_is_the_method():
    assert {field.name for field in dataclasses.fields(RoundingConfig)} == {"rounding", *OPTIONS}
    assert set(VALUES) | {"calib_samples"} == set(OPTIONS)
    for option in OPTIONS.values():
        assert set(option.acts) <= set(ROUNDINGS)
    assert all(choice.schedule in SCHEDULES for choice in OPTIMIZERS.values())


@pytest.mark.parametrize("rounding", [name for name in ROUNDINGS if name != "auto"])
@pytest.mark.parametrize("name", VALUES)
def test_an_option_acts_or_is_refused(name, rounding, sentences):
    if rounding in OPTIONS[name].acts:
        assert getattr(RoundingConfig(rounding, **{name: VALUES[name]}), name) == VALUES[name]
    else:
        with sentences.raises(RecipeError):
            RoundingConfig(rounding, **{name: VALUES[name]})


@pytest.mark.parametrize(
    "options",
    [
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
    ],
)
def test_what_makes_no_sense_is_refused(options, sentences):
    with sentences.raises((RecipeError, UnknownNameError)):
        RoundingConfig(**options)


def test_an_unknown_rounding_suggests_the_nearest(sentences):
    with sentences.raises(UnknownNameError):
        RoundingConfig("neerest")
    with pytest.raises(UnknownNameError):
        RoundingConfig(7)


def test_auto_becomes_what_the_layer_allows(sentences):
    assert RoundingConfig().resolve(calibrated=True).rounding == "calibrated"
    assert RoundingConfig().resolve(calibrated=False).rounding == "auto"
    assert RoundingConfig(top_p=0.1).resolve(calibrated=False).rounding == "principal"
    assert RoundingConfig(num_iter=10).resolve(calibrated=False).rounding == "principal"
    assert RoundingConfig(num_iter=10).resolve(calibrated=True).rounding == "calibrated"
    assert RoundingConfig(bias_correction="none").resolve(calibrated=False).rounding == "auto"
    assert RoundingConfig("nearest").resolve(calibrated=True).rounding == "nearest"
    with sentences.raises(RecipeError):
        RoundingConfig(top_p=0.1).resolve(calibrated=True)
    with sentences.raises(RecipeError):
        RoundingConfig(damping=0.1).resolve(calibrated=False)
    with sentences.raises(RecipeError):
        RoundingConfig("calibrated").resolve(calibrated=False)


def test_iterations_alone_mean_gradient_steps():
    assert (
        RoundingConfig(num_iter=10).gradient
        and RoundingConfig(optimizer="radam").gradient
        and RoundingConfig(early_stop=0).gradient
    )
    assert not RoundingConfig().gradient and not RoundingConfig(top_p=0.1).gradient


def test_a_layer_of_unknown_inputs_is_searched():
    method = RoundingConfig("calibrated", damping=0.1, bias_correction="none").uncalibrated()
    assert method == RoundingConfig(bias_correction="none")


# Roundings that run the model


@pytest.mark.parametrize("rounding", MODEL_ROUNDINGS)
def test_model_roundings_need_a_calibration_and_stay_what_they_are(rounding, sentences):
    method = RoundingConfig(rounding, damping=0.1)
    assert method.runs_model and method.resolve(calibrated=True) == method
    with sentences.raises(RecipeError):
        method.resolve(calibrated=False)


@pytest.mark.parametrize("rounding", [name for name in ROUNDINGS if name not in MODEL_ROUNDINGS])
def test_other_roundings_do_not_run_the_model(rounding):
    method = RoundingConfig(rounding)
    assert not method.runs_model and method.layerwise() is method


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
    assert layerwise == expected and not layerwise.gradient


def test_reconstructed_takes_options_of_gptq_and_of_gradient_steps():
    method = RoundingConfig("reconstructed", optimizer="radam", num_iter=10, sweeps=2)
    assert (method.optimizer, method.num_iter, method.sweeps) == ("radam", 10, 2)


@pytest.mark.parametrize("rounding", MODEL_ROUNDINGS)
def test_layer_of_unknown_inputs_is_searched_in_a_model_rounding_too(rounding):
    method = RoundingConfig(rounding, damping=0.1, bias_correction="none").layerwise().uncalibrated()
    assert method == RoundingConfig(bias_correction="none")
