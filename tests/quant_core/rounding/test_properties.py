"""What holds for every weight, format and rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_rounding.quant_core import FORMATS, quantize_weight
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.rounding import Principal, hessian_quadratic
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


def gram_of(inner: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=generator)
    inputs = torch.randn(3 * inner + 2, inner, generator=generator) @ mix
    return inputs.t() @ inputs / len(inputs)


def quantized(weight, target, method, **more):
    options = OPTIONS.get(method, {"rounding": method})
    gram = {"hessian": gram_of(weight.shape[1])} if options["rounding"] == "calibrated" else {}
    block = {"block_size": 8} if target[1] == "block" else {}
    return quantize_weight(weight, target[0], granularity=target[1], **block, **gram, **options, **more)


def raw(result) -> tuple[bytes, bytes]:
    return result.qdata.view(torch.uint8).numpy().tobytes(), result.scale.numpy().tobytes()


@given(cases(), methods)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_codes_lie_on_the_grid_and_decode_to_finite_numbers(case, method):
    weight, target = case
    result = quantized(weight, target, method)
    codes = result.qdata.float()
    assert result.qdata.dtype is result.format.elements.dtype and result.qdata.shape == weight.shape
    assert torch.isfinite(codes).all() and (codes.abs() <= result.format.elements.max).all()
    assert (result.scale >= 0).all() and torch.isfinite(result.scale).all()
    assert (result.scale > 0).all() or not result.codec.scales.continuous
    assert torch.isfinite(result.dequantize()).all()
    assert 0 <= result.weight_error < 2


@given(cases(), methods)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_same_seed_gives_the_same_bytes(case, method):
    weight, target = case
    assert raw(quantized(weight, target, method, seed=5)) == raw(quantized(weight, target, method, seed=5))


@given(cases(PLAIN), methods)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_was_decoded_is_quantized_without_loss(case, method):
    """All its values lie on a grid already; nearest finds it again where the largest code is the grid's end."""
    weight, target = case
    result = quantized(weight, target, method)
    groups = result.codec.groups(tuple(weight.shape))
    largest = groups.join_rows(groups.row_amax(result.qdata.float()), torch.amax)
    reaches = (largest == result.format.elements.max) | (largest == 0)
    again = quantized(result.dequantize(), target, "nearest")
    known = (groups.spread(reaches.float()) > 0).expand_as(weight)
    torch.testing.assert_close(again.dequantize()[known], result.dequantize()[known], rtol=1e-5, atol=1e-36)


@given(cases(dtypes=(torch.float32,)), st.sampled_from(["principal", "calibrated", "descent", "gradient"]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_solver_is_worse_than_nearest_on_its_own_objective(case, method):
    weight, target = case
    learned, nearest = quantized(weight, target, method), quantized(weight, target, "nearest")
    hessian = gram_of(weight.shape[1])
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
@settings(max_examples=100, deadline=None, derandomize=True)
def test_rows_are_independent_where_they_have_their_own_scale(weight, method, seed):
    """Permuting rows permutes codes; scaling rows by powers of two scales their scales.

    Learned codes are held against nearest on the whole weight, where rows of another size would count differently.
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


@pytest.mark.parametrize("format, granularity", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_an_all_zero_weight_stays_zero(format, granularity, method):
    result = quantized(torch.zeros(held_shape(format, (9, 20))), (format, granularity), method)
    assert not result.qdata.float().any() and result.weight_error == 0
    assert (result.scale > 0).all() or not result.codec.scales.continuous


@pytest.mark.parametrize("size", [(1, 16), (7, 48), (33, 80)])
@pytest.mark.parametrize("method", METHODS)
def test_rotated_weights_compose_with_every_rounding(method, size):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0))
    weight[0, 3] = 40.0
    plain = quantized(weight, ("int8_tensorwise", "row"), method)
    rotated = quantized(weight, ("int8_tensorwise", "row"), method, convrot=True)
    assert rotated.codec.rotation.size == 16 and rotated.solution.solver == plain.solution.solver
    assert (rotated.dequantize() - weight).norm() <= 0.7 * (plain.dequantize() - weight).norm()
    tried = quantized(weight, ("int8_tensorwise", "row"), method, convrot="auto")
    assert tried.codec.rotation is not None
    assert make_codec("int8_tensorwise", "row", convrot=16) == rotated.codec


@pytest.mark.parametrize("outlier, size", [(0.0, 256), (400.0, 1024)])
def test_large_rotation_groups_are_taken_where_they_win_clearly(outlier, size):
    weight = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    weight[:, 3] += outlier
    tried = quantized(weight, ("int8_tensorwise", "row"), "nearest", convrot="auto")
    group = tried.codec.rotation and tried.codec.rotation.size
    assert group == size if outlier else group != 1024
