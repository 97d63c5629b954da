"""What is foreseen is what comes."""

import torch

from learned_rounding.quant_core import FORMATS, Recipe, quantize_file, quantize_tensors
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.run.estimate import estimate_seconds, estimate_size
from learned_rounding.quant_core.sources import SafetensorsFile, TensorSource

UNROTATED = {"convrot": False}  # "auto" decides layer by layer, which changes the JSON of a layer


def test_the_size_is_foreseen_to_the_byte(model_file, tmp_path, subtests):
    for options in [{"format": name, **UNROTATED} for name in FORMATS] + [{"format": "int8_tensorwise", "convrot": 16}]:
        with subtests.test(options=options):
            recipe = Recipe(rounding="nearest", **options)
            quantize_file(model_file(), tmp_path / "q.safetensors", recipe, overwrite=True)
            with SafetensorsFile(model_file()) as source, SafetensorsFile(tmp_path / "q.safetensors") as made:
                assert estimate_size(source, recipe, recipe.plan(source)) == sum(
                    info.nbytes for info in made.tensors.values()
                )


def test_each_shape_is_timed_once(model, model_file, monkeypatch):
    timed = []
    monkeypatch.setattr(
        "learned_rounding.quant_core.run.estimate._time_layer", lambda info, *_: timed.append(info.shape) or 1.0
    )
    with SafetensorsFile(model_file()) as source:
        assert estimate_seconds(source, Recipe(), Recipe().plan(source), torch.device("cpu")) == 6.0
    assert sorted(timed) == [(32, 80), (80, 32), (96, 32)]


def test_the_plan_tells_size_and_time(model_file, capsys, sentences):
    assert main(["plan", "-i", str(model_file()), "--general", "--int8", "--time", "--device", "cpu"]) == 0
    sentences(*capsys.readouterr().out.splitlines()[-2:])
    assert main(["plan", "-i", str(model_file()), "--general", "--time", "--device", "nowhere"]) == 1
    sentences(capsys.readouterr().err)


def test_nothing_is_foreseen_of_formats_still_to_be_measured(model_file, capsys, sentences):
    assert main(["plan", "-i", str(model_file()), "--general", "--format", "measured", "--time"]) == 0
    sentences(capsys.readouterr().out.splitlines()[-1])


def test_the_size_of_banks_of_experts_is_foreseen(gpt_oss, subtests):
    for format in ["mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"]:
        with subtests.test(format):
            source, recipe = TensorSource(gpt_oss(6)), Recipe(format=format, rounding="nearest", **UNROTATED)
            made = quantize_tensors(gpt_oss(6), recipe).tensors
            assert estimate_size(source, recipe, recipe.plan(source)) == sum(tensor.nbytes for tensor in made.values())


def test_the_time_of_a_bank_is_that_of_its_experts(gpt_oss, monkeypatch):
    timed = "learned_rounding.quant_core.run.estimate._time_layer"
    monkeypatch.setattr(timed, lambda info, *_: 1.0 if info.shape == (144, 64) else 0.0)
    source = TensorSource(gpt_oss(6))
    assert estimate_seconds(source, Recipe(), Recipe().plan(source), torch.device("cpu")) == 6 * 3
