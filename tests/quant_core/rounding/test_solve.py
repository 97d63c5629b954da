"""From a weight to its quantized values: what holds for every weight, format and rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_rounding.quant_core import FORMATS, quantize_weight
from learned_rounding.quant_core.calibration import LowRankHessian
from learned_rounding.quant_core.errors import NonFiniteWeightError
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.rounding import Principal, RoundingConfig, WeightSolver, hessian_quadratic, solve
from learned_rounding.tests.quant_core.rounding.targets import COLUMNS, TARGETS, held_shape

METHODS = ["auto", "nearest", "stochastic", "principal", "calibrated", "descent", "gradient"]
OPTIONS = {
    "calibrated": {"rounding": "calibrated"},
    "descent": {"rounding": "calibrated", "sweeps": 2},
    "gradient": {"rounding": "calibrated", "optimizer": "adamw", "num_iter": 12},
}
SIDES = st.integers(1, 24)
methods = st.sampled_from(METHODS)
PLAIN = [target for target in TARGETS if not FORMATS[target[0]].always_rotated]


@st.composite
def weights(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16), multiple=1) -> torch.Tensor:
    """Any shape of so many columns, with zero rows, zero columns, an outlier, or subnormal numbers among the others."""
    columns = draw(SIDES) if multiple == 1 else multiple * draw(st.integers(1, 3))
    shape, seed = (draw(SIDES), columns), draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.05
    for change in draw(st.lists(st.sampled_from(["zero row", "zero column", "outlier", "subnormal"]), max_size=3)):
        if change == "zero row":
            weight[seed % shape[0]] = 0
        elif change == "zero column":
            weight[:, seed % shape[1]] = 0
        elif change == "outlier":
            weight[seed % shape[0], seed % shape[1]] = 300.0
        else:
            weight[seed % shape[0]] *= 1e-7
    return weight.to(draw(st.sampled_from(dtypes)))


@st.composite
def cases(draw, among=TARGETS, **options) -> tuple[torch.Tensor, tuple[str, str]]:
    """A weight, and a format and granularity that hold it."""
    target = draw(st.sampled_from(among))
    return draw(weights(multiple=COLUMNS.get(target[0], 1), **options)), target


def hessian_of(inner: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=generator)
    inputs = torch.randn(3 * inner + 2, inner, generator=generator) @ mix
    return inputs.t() @ inputs / len(inputs)


def quantized(weight, target, method, **more):
    options = OPTIONS.get(method, {"rounding": method})
    known = {"hessian": hessian_of(weight.shape[1])} if options["rounding"] == "calibrated" else {}
    block = {"block_size": 8} if target[1] == "block" else {}
    return quantize_weight(weight, target[0], granularity=target[1], **block, **known, **options, **more)


def raw(result) -> tuple[bytes, bytes]:
    return result.qdata.view(torch.uint8).numpy().tobytes(), result.scale.numpy().tobytes()


@given(cases(), methods)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_values_are_elements_and_decode_to_finite_numbers(case, method):
    weight, target = case
    result = quantized(weight, target, method)
    values = result.qdata.float()
    assert result.qdata.dtype is result.format.elements.dtype
    assert result.qdata.shape == weight.shape
    assert torch.isfinite(values).all()
    assert (values.abs() <= result.format.elements.max).all()
    assert torch.isfinite(result.scale).all()
    assert (result.scale >= 0).all()
    assert (result.scale > 0).all() or not result.codec.scales.continuous
    assert torch.isfinite(result.dequantize()).all()
    assert 0 <= result.weight_error < 2


@given(cases(), methods)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_same_seed_gives_the_same_bytes(case, method):
    weight, target = case
    assert raw(quantized(weight, target, method, seed=5)) == raw(quantized(weight, target, method, seed=5))


@given(cases(PLAIN), methods)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_what_was_decoded_is_quantized_without_loss(case, method):
    """All its values are representable; round to nearest finds them again where the largest is the largest element."""
    weight, target = case
    result = quantized(weight, target, method)
    groups = result.codec.groups(tuple(weight.shape))
    largest = groups.join_rows(groups.row_amax(result.qdata.float()), torch.amax)
    reaches = (largest == result.format.elements.max) | (largest == 0)
    again = quantized(result.dequantize(), target, "nearest")
    known = (groups.spread(reaches.float()) > 0).expand_as(weight)
    torch.testing.assert_close(again.dequantize()[known], result.dequantize()[known], rtol=1e-5, atol=1e-36)


@given(cases(dtypes=(torch.float32,)), st.sampled_from(["principal", "calibrated", "descent", "gradient"]))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_no_solver_is_worse_than_nearest_on_its_own_objective(case, method):
    weight, target = case
    learned, nearest = quantized(weight, target, method), quantized(weight, target, "nearest")
    hessian = hessian_of(weight.shape[1])
    quadratic = Principal().quadratic(weight) if method == "principal" else hessian_quadratic(hessian, 0.01)

    def loss(result):
        return quadratic.loss([(0, weight.shape[0], result.dequantize() - weight)])

    assert loss(learned) <= loss(nearest) * (1 + 1e-3) + 1e-7
    assert learned.solution.gain <= 1
    if loss(nearest) > 1e-6:
        assert learned.solution.gain == pytest.approx(loss(learned) / loss(nearest), rel=2e-2, abs=1e-4)


@given(
    weights(dtypes=(torch.float32,)), st.sampled_from(["auto", "nearest", "calibrated", "descent"]), st.integers(0, 99)
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_rows_are_independent_where_they_have_their_own_scale(weight, method, seed):
    """Permuting rows permutes quantized values; scaling rows by powers of two scales their scales.

    Solvers are compared with round to nearest on the whole weight, where rows of another size would count differently.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(weight.shape[0], generator=generator)
    powers = 2.0 ** torch.randint(-3, 4, (weight.shape[0], 1), generator=generator)
    if method in OPTIONS:
        powers = powers[:1].expand_as(powers)
    for format in ("int8_tensorwise", "float8_e4m3fn_rowwise"):
        target = (format, "row")
        result = quantized(weight, target, method)
        moved = quantized(weight[order] * powers[order], target, method)
        # Products of rows in other places may differ in the last bit, and a tie then falls the other way.
        same = (moved.qdata.float() == result.qdata.float()[order]).all(dim=1)
        assert (~same).sum() <= max(1, len(same) // 10)
        filled = same & (weight[order].abs().amax(dim=1) > 0)
        torch.testing.assert_close(
            moved.scale[filled], (result.scale[order] * powers[order])[filled], rtol=1e-6, atol=0
        )


def test_an_all_zero_weight_stays_zero(subtests):
    for format, granularity in TARGETS:
        for method in METHODS:
            result = quantized(torch.zeros(held_shape(format, (9, 20))), (format, granularity), method)
            with subtests.test(format, granularity=granularity, method=method):
                assert not result.qdata.float().any()
                assert result.weight_error == 0
                assert (result.scale > 0).all() or not result.codec.scales.continuous


def test_rows_and_groups_of_zeros_stay_zero(subtests):
    weight = torch.randn(12, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[2] = 0
    weight[5, 256:] = 0
    for index, (format, granularity) in enumerate(TARGETS):
        for method in {"nearest", METHODS[index % 5]}:
            result = quantized(weight, (format, granularity), method).dequantize()
            with subtests.test(format, granularity=granularity, method=method):
                assert not result[2].any()
                assert result[5, :256].any()
                if method in ("nearest", "auto", "stochastic"):  # others compensate errors of the other group
                    assert not result[5, 256:].any()


def test_an_outlier_does_not_harm_other_rows(subtests):
    """NVFP4 has one scale of the tensor for all rows, so that their scales lose bits; those of others are theirs alone."""
    weight = torch.randn(12, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[4, 9] = 3e3
    others = torch.arange(12) != 4
    for format, granularity in TARGETS:
        if granularity in ("tensor", "block"):
            continue
        for method in ("nearest", "auto", "calibrated"):
            result = quantized(weight, (format, granularity), method).dequantize()
            plain = quantized(weight[others], (format, granularity), method).dequantize()
            error, expected = ((values - weight[others]).norm() for values in (result[others], plain))
            with subtests.test(format, granularity=granularity, method=method):
                assert float((result[4] - weight[4]).norm() / weight[4].norm()) < 0.2
                assert error < (1.3 if format == "nvfp4" else 1.01) * expected


@pytest.mark.parametrize("method", METHODS)
def test_weights_with_nan_or_inf_are_refused(subtests, sentences, method):
    for index, (format, granularity) in enumerate(TARGETS):
        weight = torch.randn(held_shape(format, (9, 16)), generator=torch.Generator().manual_seed(0))
        weight[4, 7] = (float("nan"), float("inf"), -float("inf"))[index % 3]
        with subtests.test(format, granularity=granularity), sentences.raises(NonFiniteWeightError):
            quantized(
                weight.to((torch.float32, torch.float16, torch.bfloat16)[index % 3]), (format, granularity), method
            )


def test_rotated_weights_compose_with_every_rounding(subtests):
    weight = torch.randn((12, 48), generator=torch.Generator().manual_seed(0))
    weight[0, 3] = 40.0
    for method in METHODS:
        plain = quantized(weight, ("int8_tensorwise", "row"), method)
        rotated = quantized(weight, ("int8_tensorwise", "row"), method, convrot=True)
        tried = quantized(weight, ("int8_tensorwise", "row"), method, convrot="auto")
        with subtests.test(method):
            assert rotated.codec == make_codec("int8_tensorwise", "row", convrot=16)
            assert rotated.solution.solver == plain.solution.solver
            assert (rotated.dequantize() - weight).norm() <= 0.7 * (plain.dequantize() - weight).norm()
            assert tried.codec.rotation is not None


# Calibrated


def test_calibration_halves_the_output_error(subtests, gaussian, anisotropic, output_error):
    weight, known = gaussian(32, 128) * 0.02, anisotropic(128)
    statistics = {"hessian": known.hessian, "validation_hessian": known.holdout}
    for format, granularity in TARGETS:
        plain = quantize_weight(weight, format, granularity=granularity, rounding="nearest")
        learned = quantize_weight(weight, format, granularity=granularity, **statistics)
        error = output_error(learned, weight, known.holdout)
        with subtests.test(format, granularity=granularity):
            assert learned.solution.solver == "gptq"
            assert error < 0.55 * output_error(plain, weight, known.holdout)
            assert learned.output_error == pytest.approx(error, rel=1e-3)
            assert learned.weight_error > plain.weight_error  # why the weight error misleads


def test_int8_rows_take_the_better_of_two_scales(gaussian, anisotropic, monkeypatch):
    weight, known = gaussian(48, 256) * gaussian(48, 256, seed=1).abs(), anisotropic(256)
    space = make_codec("int8_tensorwise", "row").solve_space((48, 256))
    solver = WeightSolver(weight, space, RoundingConfig("calibrated"), known.hessian)
    made = solver.solve()
    monkeypatch.setattr(solve, "_BOTH_SCALES", ())
    searched = solver.solve()
    assert 0 < (made.scale != searched.scale).sum() < 48
    assert made.output_error < searched.output_error
    form = hessian_quadratic(known.hessian, 0.01)
    assert (solver._row_losses(form, made) <= solver._row_losses(form, searched) * (1 + 1e-5)).all()


def test_the_solution_has_the_dampening_it_was_rounded_with(subtests, gaussian, anisotropic):
    """One is chosen for weights of many rows, on some of them."""
    activations = anisotropic(96)
    options = {"hessian": activations.hessian, "validation_hessian": activations.holdout, "rounding": "calibrated"}
    for rows in (64, 600):
        for damping, candidates in ((None, [0.01, 0.1, 1.0]), (0.03, [0.03])):
            made = quantize_weight(gaussian(rows, 96), "int8_tensorwise", **options, damping=damping)
            with subtests.test(rows=rows, damping=damping):
                assert min(abs(made.solution.dampening / each - 1) for each in candidates) < 1e-5


def test_round_to_nearest_has_no_dampening(gaussian):
    assert quantize_weight(gaussian(8, 16), "int8_tensorwise", rounding="nearest").solution.dampening is None


def test_validation_activations_decide_between_solver_and_round_to_nearest(gaussian):
    """Calibrated on activations that others contradict, GPTQ loses to round to nearest."""
    basis = torch.linalg.qr(gaussian(48, 48, seed=3)).Q
    strong = torch.logspace(0, -4, 48)
    hessian, others = (basis * strong) @ basis.t(), (basis * strong.flip(0)) @ basis.t()
    weight = gaussian(64, 48)
    assert quantize_weight(weight, "int8_tensorwise", hessian=hessian, damping=1e-4).solution.solver == "gptq"
    made = quantize_weight(weight, "int8_tensorwise", hessian=hessian, validation_hessian=others, damping=1e-4)
    assert made.solution.solver == "nearest"
    assert made.solution.gain <= 1


@pytest.fixture
def of_tokens(gaussian):
    """of_tokens(count, seed) → activations (count, 64) with few strong directions."""
    spread = torch.logspace(0, -3, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(5))]
    mixing = torch.linalg.qr(gaussian(64, 64, seed=6)).Q
    return lambda count, seed: (gaussian(count, 64, seed=seed) * spread.sqrt()) @ mixing


def test_validation_activations_choose_the_dampening(gaussian, of_tokens):
    """A Hessian of few tokens is trusted less than one of many; either way the best dampening is taken."""
    held_out, errors = of_tokens(4096, 8), {}
    for count in (24, 4096):
        known = of_tokens(count, 7)
        statistics = {"hessian": known.t() @ known / count, "validation_hessian": held_out.t() @ held_out / 4096}
        errors[count] = {
            damping: quantize_weight(gaussian(48, 64), "int8_tensorwise", damping=damping, **statistics).output_error
            for damping in (0.01, 0.1, 1.0, None)
        }
        assert errors[count][None] == min(errors[count].values())
    assert errors[24][1.0] < 0.9 * errors[24][0.01]
    assert errors[4096][0.01] < 0.9 * errors[4096][1.0]


@pytest.mark.parametrize("tokens", [24, 4096])
def test_the_dampening_of_many_rows_is_chosen_on_some(subtests, monkeypatch, gaussian, of_tokens, tokens):
    """The result is that of one dampening, to the last bit, and within 2 % of the best; each format with one Hessian."""
    monkeypatch.setattr(solve, "_SAMPLED_ROWS", 32)
    weight, known, others = gaussian(150, 64), of_tokens(tokens, 7), of_tokens(512, 8)
    statistics = {"hessian": known.t() @ known / tokens}
    statistics["validation_hessian"] = LowRankHessian(others.t() / 512**0.5, torch.zeros(64))
    for index, (format, granularity) in enumerate(TARGETS[tokens == 24 :: 2]):
        options = {"granularity": granularity, "block_size": 16 if granularity == "block" else None, **statistics}
        if index % 2:
            options["output_weight"] = torch.linspace(0.5, 2, 150)
        made = quantize_weight(weight, format, **options)
        each = [quantize_weight(weight, format, damping=damping, **options) for damping in (0.01, 0.1, 1.0)]
        with subtests.test(format, granularity=granularity):
            assert any(torch.equal(made.qdata.float(), one.qdata.float()) for one in each)
            assert made.solution.solver == "gptq"
            assert made.output_error <= 1.02 * min(one.output_error for one in each)
            assert made.output_error < 0.97 * max(one.output_error for one in each)


def test_output_channels_may_count_differently(gaussian):
    """A scale shared by all rows follows the rows that count; the reported gain counts them too."""
    weight, hessian = torch.cat([gaussian(8, 64) * 0.01, gaussian(8, 64, seed=1)]), torch.eye(64)
    counts = torch.cat([torch.ones(8), torch.full((8,), 1e-9)])
    plain = quantize_weight(weight, "int8_tensorwise", granularity="tensor", hessian=hessian)
    favoured = quantize_weight(weight, "int8_tensorwise", granularity="tensor", hessian=hessian, output_weight=counts)
    before, after = ((made.dequantize()[:8] - weight[:8]).norm() for made in (plain, favoured))
    assert after < 0.8 * before
