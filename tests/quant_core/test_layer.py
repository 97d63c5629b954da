"""quantize_weight: what it takes, what it refuses, and that it leaves its input alone."""

from types import SimpleNamespace

import pytest
import torch

from learned_rounding.quant_core import FORMATS, QuantizationError, layer, quantize_layer, quantize_weight
from learned_rounding.quant_core.calibration import LowRankHessian, dense_hessian
from learned_rounding.quant_core.calibration.accumulate import PairedHessianAccumulator
from learned_rounding.quant_core.calibration.panels import packed_size
from learned_rounding.quant_core.errors import CalibrationError, RecipeError, UnknownNameError
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.rounding import RoundingConfig, slabs, solve

CPU = torch.device("cpu")
TARGETS = [(name, granularity) for name, entry in FORMATS.items() for granularity in entry.granularities]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format, granularity", TARGETS)
def test_dtypes_that_hold_the_same_numbers_give_the_same_codes(format, granularity):
    half = (torch.randint(-200, 200, (16, 64), generator=torch.Generator().manual_seed(0)) / 128).to(torch.bfloat16)
    results = [
        quantize_weight(half.to(dtype), format, granularity=granularity)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    for other in results[1:]:
        assert torch.equal(other.qdata.view(torch.uint8), results[0].qdata.view(torch.uint8))
        assert torch.equal(other.scale, results[0].scale) and other.weight_error == results[0].weight_error


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format, granularity", TARGETS)
def test_the_input_is_left_untouched(format, granularity, dtype, rounding):
    """float32 matters most: there ``.float()`` is no copy, and the grid uses what it is given as scratch."""
    weight = random(16, 64).to(dtype)
    before = weight.clone()
    quantize_weight(weight, format, granularity=granularity, rounding=rounding)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("format, channels", [("asym_w4a8_int8", 24), ("convrot_w4a4", 96)])
def test_a_shape_that_the_format_cannot_hold_is_refused(format, channels, sentences):
    with sentences.raises(QuantizationError):
        quantize_weight(random(16, channels), format)


def test_parameters_and_views_are_taken():
    weight = random(24, 16)
    expected = quantize_weight(weight.t().contiguous(), "int8_tensorwise")
    got = quantize_weight(torch.nn.Parameter(weight).t(), "int8_tensorwise")
    assert torch.equal(got.qdata, expected.qdata) and torch.equal(got.scale, expected.scale)
    assert not got.qdata.requires_grad and not got.scale.requires_grad
    assert got.qdata.is_contiguous()


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4),
        torch.zeros(0, 4),
        torch.zeros(4, 0),
        torch.zeros(2, 2, dtype=torch.int8),
        torch.tensor(1.0),
    ],
    ids=["vector", "no rows", "no columns", "integers", "scalar"],
)
def test_anything_but_a_matrix_of_floats_is_refused(weight, sentences):
    with sentences.raises(QuantizationError):
        quantize_weight(weight, "int8_tensorwise")


def test_names_are_checked_first(sentences):
    with sentences.raises(UnknownNameError):
        quantize_weight(random(2, 2), "int9")
    with sentences.raises(UnknownNameError):
        quantize_weight(random(2, 2), "int8_tensorwise", rounding="nearst")
    with sentences.raises(UnknownNameError):
        quantize_weight(random(2, 2), "int8_tensorwise", granularity="column")
    with sentences.raises(RecipeError):
        quantize_weight(random(2, 2), "float8_e4m3fn", granularity="row")


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
@pytest.mark.parametrize("format, granularity", TARGETS)
def test_the_check_can_stop_it_at_any_call(monkeypatch, format, granularity, rounding):
    class Stop(Exception):
        pass

    monkeypatch.setitem(slabs._SLAB, "cpu", 64)
    weight = random(8, 64)
    total = 0

    def count():
        nonlocal total
        total += 1

    quantize_weight(weight, format, granularity=granularity, rounding=rounding, check=count)
    assert total >= 16  # once a slab, in both passes
    for last in (1, total // 2, total):
        calls = 0

        def stop(last=last):
            nonlocal calls
            calls += 1
            if calls == last:
                raise Stop

        with pytest.raises(Stop):
            quantize_weight(weight, format, granularity=granularity, rounding=rounding, check=stop)
        assert calls == last


def test_too_little_memory_means_fewer_rows_then_the_cpu(monkeypatch, caplog, sentences):
    """On a GPU in test_gpu.py; here only the order of the attempts, and what is logged."""
    tried = []

    def attempt(self, codec, device, parts):
        tried.append((device.type, parts))
        if device.type != "cpu":
            raise torch.OutOfMemoryError("no room")
        return "made"

    monkeypatch.setattr(quantize_layer._LayerRun, "_quantize_on", attempt)

    def quantize(method, device="cuda"):
        tried.clear()
        caplog.clear()
        where = layer.Layer(SimpleNamespace(device=torch.device(device), shape=(8, 4)))
        made = quantize_layer._LayerRun(where, method, 0, None).quantize(make_codec("int8_tensorwise"))
        assert made == "made" and len(caplog.records) == len(tried) - 1
        sentences(caplog.messages)
        return tried

    assert quantize(RoundingConfig("calibrated")) == [("cuda", 1), ("cuda", 4), ("cuda", 16), ("cpu", 1)]
    assert quantize(RoundingConfig("principal")) == [("cuda", 1), ("cpu", 1)]  # its rows depend on each other
    assert quantize(RoundingConfig("calibrated", num_iter=5)) == [("cuda", 1), ("cpu", 1)]
    assert quantize(RoundingConfig(), "cpu") == [("cpu", 1)]


def test_what_is_no_layer_of_these_inputs_is_refused(sentences):
    for gram in [
        torch.eye(7),
        torch.full((8, 8), float("nan")),
        -torch.eye(8),
        LowRankHessian(torch.zeros(7, 2), torch.zeros(8)),
    ]:
        with sentences.raises(CalibrationError):
            quantize_weight(random(4, 8), "int8_tensorwise", hessian=gram)


def test_a_low_rank_gram_is_a_gram():
    factor, diagonal = random(32, 5, seed=1), torch.rand(32, generator=torch.Generator().manual_seed(2))
    whole = factor @ factor.t() + torch.diag(diagonal)
    weight = random(16, 32)
    expected = quantize_weight(weight, "int8_tensorwise", hessian=whole)
    made = quantize_weight(weight, "int8_tensorwise", hessian=LowRankHessian(factor.half().float(), diagonal))
    assert (made.qdata == expected.qdata).float().mean() > 0.9
    assert made.output_error == pytest.approx(expected.output_error, rel=0.05)


def test_held_out_inputs_have_the_last_word():
    """Calibrated on activations that others contradict, GPTQ loses to round to nearest."""
    basis = torch.linalg.qr(random(48, 48, seed=3)).Q
    strong = torch.logspace(0, -4, 48)
    gram, others = (basis * strong) @ basis.t(), (basis * strong.flip(0)) @ basis.t()
    weight = random(64, 48)
    assert quantize_weight(weight, "int8_tensorwise", hessian=gram, damping=1e-4).solution.solver == "gptq"
    made = quantize_weight(weight, "int8_tensorwise", hessian=gram, validation_hessian=others, damping=1e-4)
    assert made.solution.solver == "nearest" and made.solution.gain <= 1


def test_held_out_inputs_choose_the_damping():
    """A Gram of few inputs is trusted less, one of many more; either way the best of the dampings is what is taken."""
    spread = torch.logspace(0, -3, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(5))]
    mixing = torch.linalg.qr(random(64, 64, seed=6)).Q
    weight = random(48, 64)

    def gram(count: int, seed: int) -> torch.Tensor:
        inputs = (random(count, 64, seed=seed) * spread.sqrt()) @ mixing
        return inputs.t() @ inputs / count

    held_out, errors = gram(4096, 8), {}
    for count in (24, 4096):
        known = {"hessian": gram(count, 7), "validation_hessian": held_out}
        errors[count] = {
            damping: quantize_weight(weight, "int8_tensorwise", damping=damping, **known).output_error
            for damping in (0.01, 0.1, 1.0, None)
        }
        assert errors[count][None] == min(errors[count].values())
    few, many = errors[24], errors[4096]
    assert few[1.0] < 0.9 * few[0.01] and many[0.01] < 0.9 * many[1.0]


@pytest.mark.parametrize("format, granularity", TARGETS)
@pytest.mark.parametrize("tokens", [24, 4096])
def test_dampening_of_many_rows_is_chosen_on_some(monkeypatch, format, granularity, tokens):
    """The result is that of one dampening, to the last bit, and within 2 % of the best, in every granularity."""
    monkeypatch.setattr(solve, "_SAMPLED_ROWS", 32)
    spread = torch.logspace(0, -3, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(5))]
    mixing = torch.linalg.qr(random(64, 64, seed=6)).Q

    def activations(count: int, seed: int) -> torch.Tensor:
        return (random(count, 64, seed=seed) * spread.sqrt()) @ mixing

    weight, known, others = random(150, 64), activations(tokens, 7), activations(512, 8)
    options = {"granularity": granularity, "block_size": 16 if granularity == "block" else None}
    options |= {"hessian": known.t() @ known / tokens}
    options |= {"validation_hessian": LowRankHessian(others.t() / 512**0.5, torch.zeros(64))}
    output_weight = torch.linspace(0.5, 2, 150)
    for more in ({}, {"output_weight": output_weight}):
        made = quantize_weight(weight, format, **options, **more)
        each = [quantize_weight(weight, format, damping=damping, **options, **more) for damping in (0.01, 0.1, 1.0)]
        assert any(torch.equal(made.qdata.float(), one.qdata.float()) for one in each)
        assert made.solution.solver == "gptq"
        assert made.output_error <= 1.02 * min(one.output_error for one in each)
        assert made.output_error < 0.97 * max(one.output_error for one in each)


def test_validation_activations_give_the_loss_of_their_hessian():
    weight, known, others = random(40, 64), random(400, 64, seed=1), random(100, 64, seed=2)
    factor = others.t() / 10
    made = [
        quantize_weight(weight, "int8_tensorwise", hessian=known.t() @ known, validation_hessian=validation, convrot=64)
        for validation in (LowRankHessian(factor, torch.zeros(64)), factor @ factor.t())
    ]
    assert torch.equal(made[0].qdata, made[1].qdata)
    assert made[0].output_error == pytest.approx(made[1].output_error, rel=1e-4)


def test_validation_activations_with_nan_are_refused(sentences):
    factor = torch.full((64, 10), float("nan"))
    with sentences.raises(CalibrationError):
        quantize_weight(
            random(40, 64),
            "int8_tensorwise",
            hessian=torch.eye(64),
            validation_hessian=LowRankHessian(factor, torch.zeros(64)),
        )


@pytest.fixture
def outliers():
    """outliers(count, seed) → inputs (count, 96), two of whose channels leave the others few INT8 steps."""
    mixing = random(96, 96, seed=20) * torch.logspace(0, -1.5, 96)

    def make(count: int, seed: int) -> torch.Tensor:
        inputs = random(count, 96, seed=seed) @ mixing
        inputs[:, 3] *= 20
        inputs[:, 7] += 15
        return inputs

    return make


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"convrot": 16}], ids=["row", "tensor", "rotated"])
def test_weights_make_up_for_quantized_inputs(outliers, options, sentences):
    """Judged on inputs never seen, with the corrected bias, as INT8 kernels multiply."""
    grams = PairedHessianAccumulator(96, torch.zeros(packed_size(192)), CPU)
    for seed in range(8):
        grams.add(outliers(1000, seed))
    paired, weight, bias = grams.result(), random(64, 96, seed=21) * 0.05, random(64, seed=22)
    others, unseen = outliers(512, 30), outliers(4000, 31)
    known = {
        "validation_hessian": LowRankHessian(others.t() / 512**0.5, torch.zeros(96)),
        "mean": paired.mean[:96],
        "bias": bias,
    }
    errors = {}
    for name, gram in {"inputs as they are": dense_hessian(paired, 96, CPU), "quantized inputs": paired}.items():
        made = quantize_weight(weight, "int8_tensorwise", hessian=gram, **known, **options)
        got = made.codec.quantize_activations(unseen) @ made.dequantize().t() + made.bias
        errors[name] = float((got - unseen @ weight.t() - bias).norm() / (unseen @ weight.t()).norm())
    assert made.output_error == pytest.approx(errors["quantized inputs"], rel=0.1)
    sentences(made.note)
    assert made.weight_error == pytest.approx(float((made.dequantize() - weight).norm() / weight.norm()), rel=1e-4)
    if options.get("convrot"):
        assert errors["quantized inputs"] <= 1.02 * errors["inputs as they are"]
    else:
        assert errors["quantized inputs"] < 0.99 * errors["inputs as they are"]


def test_rotation_is_chosen_for_quantized_inputs_where_some_are_known(outliers):
    """An outlier channel hardly bothers the rounding of weights, and ruins that of inputs."""
    weight, others = random(64, 96, seed=21), outliers(512, 30)
    known = {"hessian": others.t() @ others / 512, "rounding": "nearest", "convrot": "auto"}
    held_out = LowRankHessian(others.t() / 512**0.5, torch.zeros(96))
    made = quantize_weight(weight, "int8_tensorwise", **known, validation_hessian=held_out)
    assert made.codec.rotation.size == 16
    errors = [
        layer.output_error(
            weight, quantize_weight(weight, "int8_tensorwise", rounding="nearest", convrot=group), others
        )
        for group in (None, 16)
    ]
    assert errors[1] < 0.6 * errors[0]


def test_formats_that_leave_inputs_alone_take_paired_grams_as_plain_ones(outliers):
    grams = PairedHessianAccumulator(96, torch.zeros(packed_size(192)), CPU)
    grams.add(outliers(500, 0))
    weight, paired = random(32, 96), grams.result()
    made = [quantize_weight(weight, "float8_e4m3fn", hessian=gram) for gram in (paired, dense_hessian(paired, 96, CPU))]
    assert torch.equal(*(one.qdata.view(torch.uint8) for one in made))


def test_output_channels_may_count_differently():
    """A scale shared by all rows follows the rows that count; the reported gain counts them too."""
    weight, gram = torch.cat([random(8, 64) * 0.01, random(8, 64, seed=1)]), torch.eye(64)
    counts = torch.cat([torch.ones(8), torch.full((8,), 1e-9)])
    plain = quantize_weight(weight, "int8_tensorwise", granularity="tensor", hessian=gram)
    favoured = quantize_weight(weight, "int8_tensorwise", granularity="tensor", hessian=gram, output_weight=counts)
    small = [(made.dequantize()[:8] - weight[:8]).norm() for made in (plain, favoured)]
    assert small[1] < 0.8 * small[0]


@pytest.mark.parametrize(
    "format, scale", [("int8_tensorwise", 0.1), ("float8_e4m3fn", 0.0), ("float8_e4m3fn", float("inf"))]
)
def test_an_input_scale_without_meaning_is_refused(format, scale, sentences):
    with sentences.raises(RecipeError):
        quantize_weight(random(16, 32), format, input_scale=scale)


def test_fp8_is_judged_on_cards_that_dequantize_it_too():
    """Weights that FP8 holds exactly under a scale that bfloat16 rounds by 2⁻⁸, for activations that FP8 holds exactly."""
    scale = torch.tensor(1 + 255 / 2**16)
    weight = torch.arange(-8.0, 8).repeat(8, 2) * scale
    weight[0, 0] = 448 * scale
    activations = torch.arange(64 * 32).view(64, 32).remainder(5).float()
    for options in ({}, {"full_precision_matmul": True}):
        made = quantize_weight(weight, "float8_e4m3fn", rounding="nearest", **options)
        assert torch.equal(made.dequantize(), weight) and made.scale == scale
        cast = scale.bfloat16().float() / scale
        assert layer.output_error(weight, made, activations) == pytest.approx(abs(float(cast) - 1), rel=1e-3)
        assert torch.equal(
            made.dequantize_in(torch.bfloat16).float(), (weight / scale).round() * scale.bfloat16().float()
        )
    integers = quantize_weight(weight, "int8_tensorwise", rounding="nearest")
    got = integers.codec.quantize_activations(activations) @ integers.dequantize().t()
    expected = activations @ weight.t()
    error = float((got - expected).norm() / expected.norm())
    assert layer.output_error(weight, integers, activations) == pytest.approx(error, rel=1e-5)
