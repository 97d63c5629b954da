"""Quantize one layer: what is taken and refused, less memory, smoothing and rotation by error, and the same result on a GPU."""

import gc
import logging
from types import SimpleNamespace

import pytest
import torch

from learned_rounding.quant_core import FORMATS, QuantizationError, layer, quantize_layer, quantize_weight
from learned_rounding.quant_core.calibration import LowRankHessian, dense_hessian
from learned_rounding.quant_core.calibration.accumulate import PairedHessianAccumulator
from learned_rounding.quant_core.calibration.panels import packed_size
from learned_rounding.quant_core.errors import CalibrationError, RecipeError, UnknownNameError
from learned_rounding.quant_core.formats import FormatConfig, make_codec
from learned_rounding.quant_core.rounding import RoundingConfig, slabs
from learned_rounding.tests.quant_core.formats.weights import raw

CPU = torch.device("cpu")
TARGETS = [(name, granularity) for name, entry in FORMATS.items() for granularity in entry.granularities]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_dtypes_that_hold_the_same_numbers_give_the_same_values(subtests):
    half = (torch.randint(-200, 200, (16, 64), generator=torch.Generator().manual_seed(0)) / 128).to(torch.bfloat16)
    for format, granularity in TARGETS:
        expected, *others = (
            quantize_weight(half.to(dtype), format, granularity=granularity)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        )
        for other in others:
            with subtests.test(format, granularity=granularity):
                assert torch.equal(other.qdata.view(torch.uint8), expected.qdata.view(torch.uint8))
                assert torch.equal(other.scale, expected.scale)
                assert other.weight_error == expected.weight_error


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_the_weight_is_left_unchanged(subtests, rounding):
    """float32 matters most: there ``.float()`` is no copy, and solvers use what they are given as scratch."""
    for format, granularity in TARGETS:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            weight = random(16, 64).to(dtype)
            before = weight.clone()
            quantize_weight(weight, format, granularity=granularity, rounding=rounding)
            with subtests.test(format, granularity=granularity, dtype=dtype):
                assert torch.equal(weight, before)


def test_the_same_seed_gives_the_same_bytes(subtests):
    weight, x = random(24, 64), random(128, 64, seed=1)
    for format, options in (
        *((name, {}) for name in FORMATS),
        ("asym_w4a8_int8", {"bits": 6}),
        ("convrot_w4a4", {"linear_dtype": "int4"}),
    ):
        for rounding in ("auto", "stochastic", "principal", "calibrated"):
            hessian = x.t() @ x / 128 if rounding == "calibrated" else None
            first, again = (
                quantize_weight(weight, format, rounding=rounding, hessian=hessian, seed=3, **options).tensors("a")
                for _ in range(2)
            )
            with subtests.test(format, rounding=rounding, **options):
                assert [name for name in first if not torch.equal(raw(first[name]), raw(again[name]))] == []


def test_a_shape_that_the_format_cannot_hold_is_refused(subtests, sentences):
    for format, channels in (("asym_w4a8_int8", 24), ("convrot_w4a4", 96)):
        with subtests.test(format), sentences.raises(QuantizationError):
            quantize_weight(random(16, channels), format)


def test_parameters_and_views_are_taken():
    weight = random(24, 16)
    expected = quantize_weight(weight.t().contiguous(), "int8_tensorwise")
    got = quantize_weight(torch.nn.Parameter(weight).t(), "int8_tensorwise")
    assert torch.equal(got.qdata, expected.qdata)
    assert torch.equal(got.scale, expected.scale)
    assert not got.qdata.requires_grad
    assert not got.scale.requires_grad
    assert got.qdata.is_contiguous()


def test_anything_but_a_matrix_of_floats_is_refused(subtests, sentences):
    for name, weight in {
        "vector": torch.zeros(4),
        "no rows": torch.zeros(0, 4),
        "no columns": torch.zeros(4, 0),
        "integers": torch.zeros(2, 2, dtype=torch.int8),
        "scalar": torch.tensor(1.0),
    }.items():
        with subtests.test(name), sentences.raises(QuantizationError):
            quantize_weight(weight, "int8_tensorwise")


def test_unknown_names_are_refused(subtests, sentences):
    for options in (
        {"format": "int9"},
        {"format": "int8_tensorwise", "rounding": "nearst"},
        {"format": "int8_tensorwise", "granularity": "column"},
    ):
        with subtests.test(**options), sentences.raises(UnknownNameError):
            quantize_weight(random(2, 2), **options)


def test_a_granularity_of_another_format_is_refused(sentences):
    with sentences.raises(RecipeError):
        quantize_weight(random(2, 2), "float8_e4m3fn", granularity="row")


def test_a_rounding_that_runs_the_model_is_refused():
    with pytest.raises(RecipeError, match="runs a whole model"):
        quantize_weight(random(2, 16), "int8_tensorwise", rounding="sequential")


class Stop(Exception):
    pass


class CountedCheck:
    """Cancellation check that counts its calls, and raises Stop at the last one, if that is given."""

    def __init__(self, last: int | None = None):
        self.calls, self.last = 0, last

    def __call__(self):
        self.calls += 1
        if self.calls == self.last:
            raise Stop


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_the_check_can_cancel_at_any_call(subtests, monkeypatch, rounding):
    monkeypatch.setitem(slabs._SLAB, "cpu", 64)
    weight = random(8, 64)
    for format, granularity in TARGETS:
        options, check = {"granularity": granularity, "rounding": rounding}, CountedCheck()
        quantize_weight(weight, format, **options, check=check)
        with subtests.test(format, granularity=granularity):
            assert check.calls >= 16  # once a slab, in both passes
        for last in (1, check.calls // 2, check.calls):
            stop = CountedCheck(last)
            with subtests.test(format, granularity=granularity, last=last):
                with pytest.raises(Stop):
                    quantize_weight(weight, format, **options, check=stop)
                assert stop.calls == last


def test_too_little_memory_means_fewer_rows_then_the_cpu(monkeypatch, caplog, sentences):
    """On a GPU below; here only the order of the attempts, and what is logged."""
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
        assert made == "made"
        assert len(caplog.records) == len(tried) - 1
        sentences(caplog.messages)
        return tried

    assert quantize(RoundingConfig("calibrated")) == [("cuda", 1), ("cuda", 4), ("cuda", 16), ("cpu", 1)]
    assert quantize(RoundingConfig("principal")) == [("cuda", 1), ("cpu", 1)]  # its rows depend on each other
    assert quantize(RoundingConfig("calibrated", num_iter=5)) == [("cuda", 1), ("cpu", 1)]
    assert quantize(RoundingConfig(), "cpu") == [("cpu", 1)]


def test_statistics_of_other_channels_and_damaged_ones_are_refused(subtests, sentences):
    for name, hessian in {
        "channels": torch.eye(7),
        "NaN": torch.full((8, 8), float("nan")),
        "negative": -torch.eye(8),
        "channels of a factor": LowRankHessian(torch.zeros(7, 2), torch.zeros(8)),
    }.items():
        with subtests.test(name), sentences.raises(CalibrationError):
            quantize_weight(random(4, 8), "int8_tensorwise", hessian=hessian)


def test_a_low_rank_hessian_is_taken_as_a_dense_one():
    factor, diagonal = random(32, 5, seed=1), torch.rand(32, generator=torch.Generator().manual_seed(2))
    whole = factor @ factor.t() + torch.diag(diagonal)
    weight = random(16, 32)
    expected = quantize_weight(weight, "int8_tensorwise", hessian=whole)
    made = quantize_weight(weight, "int8_tensorwise", hessian=LowRankHessian(factor.half().float(), diagonal))
    assert (made.qdata == expected.qdata).float().mean() > 0.9
    assert made.output_error == pytest.approx(expected.output_error, rel=0.05)


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
    """outliers(count, seed) → activations (count, 96), two of whose channels leave the others few INT8 steps."""
    mixing = random(96, 96, seed=20) * torch.logspace(0, -1.5, 96)

    def make(count: int, seed: int) -> torch.Tensor:
        inputs = random(count, 96, seed=seed) @ mixing
        inputs[:, 3] *= 20
        inputs[:, 7] += 15
        return inputs

    return make


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"convrot": 16}], ids=["row", "tensor", "rotated"])
def test_weights_compensate_quantized_activations(outliers, options, sentences):
    """Measured on unseen activations, with the corrected bias, as INT8 kernels multiply."""
    accumulated = PairedHessianAccumulator(96, torch.zeros(packed_size(192)), CPU)
    for seed in range(8):
        accumulated.add(outliers(1000, seed))
    paired, weight, bias = accumulated.result(), random(64, 96, seed=21) * 0.05, random(64, seed=22)
    others, unseen = outliers(512, 30), outliers(4000, 31)
    known = {
        "validation_hessian": LowRankHessian(others.t() / 512**0.5, torch.zeros(96)),
        "mean": paired.mean[:96],
        "bias": bias,
    }
    errors = {}
    for name, gram in {"exact activations": dense_hessian(paired, 96, CPU), "quantized activations": paired}.items():
        made = quantize_weight(weight, "int8_tensorwise", hessian=gram, **known, **options)
        got = made.codec.quantize_activations(unseen) @ made.dequantize().t() + made.bias
        errors[name] = float((got - unseen @ weight.t() - bias).norm() / (unseen @ weight.t()).norm())
    assert made.output_error == pytest.approx(errors["quantized activations"], rel=0.1)
    sentences(made.note)
    assert made.weight_error == pytest.approx(float((made.dequantize() - weight).norm() / weight.norm()), rel=1e-4)
    if options.get("convrot"):
        assert errors["quantized activations"] <= 1.02 * errors["exact activations"]
    else:
        assert errors["quantized activations"] < 0.99 * errors["exact activations"]


def test_rotation_is_chosen_by_the_error_of_quantized_activations(outliers):
    """An outlier channel hardly changes the error of the weight, and dominates that of the activations."""
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


def test_formats_with_unquantized_activations_take_paired_hessians_as_plain_ones(outliers):
    accumulated = PairedHessianAccumulator(96, torch.zeros(packed_size(192)), CPU)
    accumulated.add(outliers(500, 0))
    weight, paired = random(32, 96), accumulated.result()
    made = [quantize_weight(weight, "float8_e4m3fn", hessian=gram) for gram in (paired, dense_hessian(paired, 96, CPU))]
    assert torch.equal(*(one.qdata.view(torch.uint8) for one in made))


def test_an_input_scale_without_meaning_is_refused(subtests, sentences):
    for format, scale in (("int8_tensorwise", 0.1), ("float8_e4m3fn", 0.0), ("float8_e4m3fn", float("inf"))):
        with subtests.test(format, scale=scale), sentences.raises(RecipeError):
            quantize_weight(random(16, 32), format, input_scale=scale)


@pytest.mark.parametrize("outlier, size", [(0.0, 256), (400.0, 1024)])
def test_large_rotation_groups_are_taken_where_they_win_clearly(outlier, size):
    weight = random(8, 1024)
    weight[:, 3] += outlier
    rotation = quantize_weight(weight, "int8_tensorwise", rounding="nearest", convrot="auto").codec.rotation
    if outlier:
        assert rotation.size == size
    else:
        assert rotation is None or rotation.size != 1024


# On a GPU


def weights(seed: int, *shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], 1, generator=generator) + 0.1
    return (torch.randn(shape, generator=generator) * rows * 0.02).to(dtype)


def anisotropic(inner: int, seed: int = 0) -> torch.Tensor:
    """Hessian of activations with few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * inner, inner, generator=generator) * torch.logspace(0, -2, inner)
    inputs = inputs @ torch.linalg.qr(torch.randn(inner, inner, generator=generator)).Q
    return inputs.t() @ inputs / len(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["nearest", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_and_cpu_agree_within_ties(subtests, rounding, dtype):
    for format, granularity in TARGETS:
        for shape in ((1, 1), (7, 13), (1024, 3072), (4096, 257)):
            if FormatConfig(format, granularity).codecs(shape[1])[0].admits(shape):
                continue  # refused, see above
            weight = weights(0, *shape, dtype=dtype)
            cpu = quantize_weight(weight, format, granularity=granularity, rounding=rounding)
            gpu = quantize_weight(weight.cuda(), format, granularity=granularity, rounding=rounding)
            same_scale = (gpu.scale.cpu() / cpu.scale - 1).abs() < 1e-6
            comparable = cpu.codec.groups(shape).spread(same_scale).expand_as(weight)
            differ = (gpu.qdata.cpu().float() != cpu.qdata.float()) & comparable
            with subtests.test(format, granularity=granularity, shape=shape):
                assert gpu.qdata.is_cuda
                assert gpu.scale.is_cuda
                # Of a search two candidates may be equally good to the last bit.
                assert same_scale.all() if rounding == "nearest" else same_scale.float().mean() > 0.99
                assert differ.sum() <= max(1, weight.numel() // 100_000)
                assert gpu.weight_error == pytest.approx(cpu.weight_error, rel=1e-4, abs=1e-7)


@pytest.mark.gpu
def test_values_on_a_gpu_are_torchs_casts(subtests):
    weight = weights(1, 512, 768).cuda()
    for format, granularity in TARGETS:
        quantized = quantize_weight(weight, format, granularity=granularity, rounding="nearest")
        space = quantized.codec.solve_space((512, 768))
        if space.levels or quantized.codec.basis:
            continue  # values among 16 levels, or of a rotated weight
        scaled = weight.float() / space.divisor(quantized.scale)
        with subtests.test(format, granularity=granularity):
            assert torch.equal(quantized.qdata.float(), quantized.format.elements.encode(scaled).float())


LEARNED = {
    "gptq": {"rounding": "calibrated", "beam_width": 1},
    "beam": {"rounding": "calibrated", "beam_width": 4},
    "descent": {"rounding": "calibrated", "beam_width": 1, "sweeps": 2},
    "principal": {"rounding": "principal"},
    "adamw": {"rounding": "calibrated", "optimizer": "adamw", "num_iter": 60},
    "original": {"rounding": "principal", "optimizer": "original", "num_iter": 60},
}


@pytest.mark.gpu
@pytest.mark.parametrize("solver", LEARNED)
def test_solutions_on_a_gpu_are_as_good_as_on_a_cpu(subtests, solver):
    """A tie that rounds the other way moves what follows it: some values differ, the error does not."""
    options, weight = LEARNED[solver], weights(2, 300, 640)
    hessian = anisotropic(640) if options["rounding"] == "calibrated" else None
    moved = None if hessian is None else hessian.cuda()
    for format, granularity in TARGETS:
        cpu = quantize_weight(weight, format, granularity=granularity, hessian=hessian, **options)
        gpu, again = (
            quantize_weight(weight.cuda(), format, granularity=granularity, hessian=moved, **options) for _ in range(2)
        )
        # Gradient steps amplify last bits and find another local minimum; principal rounding may stop its search for the
        # dampening one step sooner. The result is about as good.
        loose = "optimizer" in options or options["rounding"] == "principal"
        with subtests.test(format, granularity=granularity):
            assert torch.equal(gpu.qdata.view(torch.uint8), again.qdata.view(torch.uint8))
            assert torch.equal(gpu.scale, again.scale)
            assert gpu.solution.solver == cpu.solution.solver
            assert gpu.solution.gain == pytest.approx(cpu.solution.gain, rel=0.5 if loose else 0.03)
            assert gpu.weight_error == pytest.approx(cpu.weight_error, rel=0.02)


@pytest.fixture
def capped():
    """capped(bytes): what this process may use of the GPU's memory, until the test ends."""
    total = torch.cuda.get_device_properties(0).total_memory

    def cap(limit: float) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_24576_input_channels_fit_a_12_gb_card(capped, caplog):
    weight, hessian = weights(0, 3072, 24576).cuda(), torch.eye(24576, dtype=torch.bfloat16)
    capped(12e9)
    with caplog.at_level(logging.WARNING):
        result = quantize_weight(weight, "int8_tensorwise", hessian=hessian)
    assert not caplog.records
    assert result.qdata.is_cuda


@pytest.mark.gpu
def test_too_little_memory_changes_the_place_and_not_the_result(capped, caplog):
    weight, hessian = weights(0, 16384, 2048), anisotropic(2048)
    options = {"hessian": hessian, "beam_width": 1}  # a CPU searches no beam by default
    roomy = quantize_weight(weight.cuda(), "int8_tensorwise", **options)
    places = []
    for limit in (560e6, 240e6):  # enough for fewer rows at a time, and for nothing
        capped(limit)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made = quantize_weight(weight.cuda(), "int8_tensorwise", **options)
        places.append([record.name for record in caplog.records])
        assert made.qdata.is_cuda
        assert made.solution.solver == roomy.solution.solver
        assert made.solution.gain == pytest.approx(roomy.solution.gain, rel=0.01)
    assert {name for names in places for name in names} == {quantize_weight.__module__}
    assert len(places[1]) == 3  # one part, 4, 16, and then the CPU


@pytest.mark.gpu
def test_many_rows_are_rounded_as_on_a_cpu():
    """More rows than the dampening is chosen on, more columns than a panel."""
    weight = weights(0, 640, 1100)
    rows = torch.randn(3000, 1100, generator=torch.Generator().manual_seed(1)) * torch.linspace(2, 0.2, 1100)
    known = {
        "hessian": rows[:2500].t() @ rows[:2500] / 2500,
        "validation_hessian": LowRankHessian(rows[2500:].t() / 500**0.5, torch.zeros(1100)),
    }
    cpu, gpu = (
        quantize_weight(weight.to(device), "int8_tensorwise", beam_width=2, **known).output_error
        for device in ("cpu", "cuda")
    )
    assert cpu == pytest.approx(gpu, rel=0.01)


@pytest.mark.gpu
def test_weights_compensate_quantized_activations_as_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(256, 256, generator=generator) * torch.logspace(0, -1.5, 256)
    rows = torch.randn(4512, 256, generator=generator) @ mixing
    rows[:, 3] *= 20
    weight = (torch.randn(320, 256, generator=generator) * 0.05).bfloat16()
    held_out = LowRankHessian(rows[4000:].t() / 512**0.5, torch.zeros(256))
    errors = []
    for device in ("cpu", "cuda"):
        paired = PairedHessianAccumulator(256, torch.zeros(packed_size(512), device=device), torch.device(device))
        paired.add(rows[:4000].to(device))
        made = quantize_weight(
            weight.to(device), "int8_tensorwise", hessian=paired.result(), validation_hessian=held_out
        )
        errors.append(made.output_error)
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
