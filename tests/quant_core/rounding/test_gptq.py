"""GPTQ against its published form in float64, and the error it saves."""

import itertools

import pytest
import torch

from learned_rounding.kernels.reference import round_to_levels
from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.errors import CalibrationError
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.rounding import (
    Principal,
    Quadratic,
    RoundingConfig,
    WeightSolver,
    gptq,
    hessian_quadratic,
    projected,
    round_gptq,
    solve,
)
from learned_rounding.tests.quant_core.rounding.targets import TARGETS, held_shape, start


def space_and_scale(format, granularity, weight):
    """The solve space of a weight, and the scales with which it is rounded to nearest."""
    scaling = start(weight, format, granularity)
    return scaling.space, scaling.scale


def nearest(space, scaled, column):
    """The nearest elements, or levels of their groups, of one column."""
    if space.levels is None:
        return space.elements.encode(scaled).float()
    levels = space.levels
    return round_to_levels(scaled[:, None], levels.codes, levels.scale[:, column // levels.columns], 127.0)[:, 0]


def published_gptq(weight, scale, space, hessian, dampening):
    """GPTQ as published: columns by falling diagonal, errors through the Cholesky factor of the inverse; float64."""
    order = hessian.diagonal().argsort(stable=True).flip(0)
    h = hessian.double() + dampening * torch.eye(hessian.shape[0])
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    left, values = weight.double()[:, order].clone(), torch.empty_like(weight)
    spread = scale.double().expand(weight.shape)[:, order]
    for j in range(weight.shape[1]):
        values[:, j] = nearest(space, (left[:, j] / spread[:, j]).float(), int(order[j]))
        error = (left[:, j] - values[:, j] * spread[:, j]) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    back = torch.empty_like(values)
    back[:, order] = values
    return back


@pytest.mark.parametrize("format, granularity", TARGETS)
@pytest.mark.parametrize("shape", [(24, 200), (7, 40), (1, 9), (5, 1)])
def test_gptq_matches_the_published_form_in_float64(gaussian, anisotropic, format, granularity, shape):
    """Blocks, the transposed layout and the factor of H instead of its inverse change nothing but ties."""
    shape = held_shape(format, shape)
    weight, known = gaussian(*shape) * 0.02, anisotropic(shape[1])
    space, scale = space_and_scale(format, granularity, weight)
    quadratic = hessian_quadratic(known.hessian, 0.05)
    got = round_gptq(weight, scale, space, quadratic).float()
    want = published_gptq(weight, space.groups.spread(scale), space, known.hessian, quadratic.dampening)
    assert (got == want).float().mean() > 0.99


def two_nearest(space, row, column, target):
    """The one or two numbers that enclose ``target``, in units of the scale; float64."""
    if levels := space.levels:
        values = (levels.codes * levels.scale[row, column // levels.columns]).round().clamp(-127, 127)
    else:
        codes = torch.arange(-128, 128, dtype=torch.int8)
        values = codes.view(space.elements.dtype).float()
        values = values[values.isfinite() & (values.abs() <= space.elements.max)]
        values = space.elements.encode(values).float()
    values = values.double().unique()
    above = int((values < target).sum())
    return values[max(above - 1, 0) : above + 1].tolist()


def beam_in_float64(weight, scale, space, hessian, dampening, width, size=128):
    """Each row by itself: GPTQ, and the roundings of least cost among continuations of the kept ones, by blocks."""
    order = hessian.diagonal().argsort(stable=True)
    lower = torch.linalg.cholesky((hessian.double() + dampening * torch.eye(len(hessian)))[order][:, order])
    unit, values = lower / lower.diagonal(), torch.empty(weight.shape)
    for row in range(weight.shape[0]):
        w, s = weight[row, order].double(), scale[row, order].double()
        kept = [(0.0, torch.zeros_like(w), torch.zeros_like(w))]
        for i in range(len(w) - 1, -1, -1):
            continued = []
            for rank, (cost, errors, chosen) in enumerate(kept):
                target = float(w[i] - errors @ unit[:, i])
                pair = two_nearest(space, row, int(order[i]), target / float(s[i]))
                for other, value in enumerate(sorted(pair, key=lambda q: abs(q - target / float(s[i])))):
                    added = (value * float(s[i]) - target) ** 2 * float(lower[i, i]) ** 2
                    first = rank == 0 and other == 0  # nearest values only
                    continued.append((not first, cost + added, errors, chosen, value))
            kept = []
            for _, cost, errors, chosen, value in sorted(continued, key=lambda entry: entry[:2])[:width]:
                errors, chosen = errors.clone(), chosen.clone()
                errors[i], chosen[i] = value * s[i] - w[i], value
                kept.append((cost, errors, chosen))
            if (len(w) - i) % size == 0 or i == 0:
                _, errors, chosen = min(kept, key=lambda entry: entry[0])
                kept = [(0.0, errors, chosen)]
        values[row, order] = chosen.float()
    return values


BEAM_TARGETS = [
    ("int8_tensorwise", "row"),
    ("float8_e4m3fn", "tensor"),
    ("asym_w4a8_int8", "group"),
    ("nvfp4", "group"),
]


@pytest.mark.parametrize("format, granularity", BEAM_TARGETS)
@pytest.mark.parametrize("shape, width", [((3, 160), 4), ((5, 32), 8)])
def test_beam_search_matches_float64(gaussian, anisotropic, format, granularity, shape, width):
    weight, known = gaussian(*shape) * 0.02, anisotropic(shape[1])
    space, scale = space_and_scale(format, granularity, weight)
    quadratic = hessian_quadratic(known.hessian, 0.05)
    got = round_gptq(weight, scale, space, quadratic, beam_width=width).float()
    spread = space.groups.spread(scale).expand(weight.shape)
    want = beam_in_float64(weight, spread, space, known.hessian, quadratic.dampening, width)
    assert (got == want).float().mean() > 0.99


@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("format, granularity", BEAM_TARGETS)
def test_beam_search_lowers_the_loss(gaussian, anisotropic, format, granularity, passes):
    weight, known = gaussian(64, 256) * 0.02, anisotropic(256)
    space, scale = space_and_scale(format, granularity, weight)
    quadratic = hessian_quadratic(known.hessian, 0.01)

    def loss(width):
        qdata = round_gptq(weight, scale, space, quadratic, passes=passes, beam_width=width)
        error = space.decode(qdata, scale) - weight
        return float((quadratic.gradient(error) * error).sum())

    losses = [loss(width) for width in (1, 8)]
    assert losses[1] < losses[0] * (0.97 if format != "float8_e4m3fn" else 1.0)


def test_int8_rows_take_the_better_of_two_scales(gaussian, anisotropic, monkeypatch):
    weight, known = gaussian(48, 256) * gaussian(48, 256, seed=1).abs(), anisotropic(256)
    space = make_codec("int8_tensorwise", "row").solve_space((48, 256))
    solver = WeightSolver(weight, space, RoundingConfig("calibrated"), known.hessian)
    made = solver.solve()
    monkeypatch.setattr(solve, "_BOTH_SCALES", ())
    searched = solver.solve()
    assert 0 < (made.scale != searched.scale).sum() < 48 and made.output_error < searched.output_error
    form = hessian_quadratic(known.hessian, 0.01)
    assert (solver._row_losses(form, made) <= solver._row_losses(form, searched) * (1 + 1e-5)).all()


@pytest.mark.parametrize("rows", [64, 600])
def test_solution_has_the_dampening_it_was_rounded_with(gaussian, anisotropic, rows):
    """One is chosen for weights of many rows, on some of them."""
    weight, activations = gaussian(rows, 96), anisotropic(96)
    for given in (None, 0.03):
        options = {"hessian": activations.hessian, "validation_hessian": activations.holdout, "rounding": "calibrated"}
        made = quantize_weight(weight, "int8_tensorwise", **options, damping=given)
        candidates = [0.01, 0.1, 1.0] if given is None else [given]
        assert min(abs(made.solution.dampening / each - 1) for each in candidates) < 1e-5
    assert quantize_weight(weight, "int8_tensorwise", rounding="nearest").solution.dampening is None


def test_a_cpu_searches_only_when_asked():
    for format, granularity in TARGETS:
        space = make_codec(format, granularity).solve_space((64, 128))
        widths = [gptq.default_beam_width(space, torch.device(device)) for device in ("cpu", "cuda")]
        assert widths == [1, 1 if format.startswith(("float8", "mxfp8")) else 4]


@pytest.mark.parametrize("format, granularity", TARGETS)
def test_gptq_with_a_diagonal_hessian_is_round_to_nearest(gaussian, format, granularity):
    weight = gaussian(*held_shape(format, (40, 150))) * 0.02
    space, scale = space_and_scale(format, granularity, weight)
    hessian = torch.diag(torch.linspace(0.1, 3, weight.shape[1]))
    for quadratic in (Quadratic(), hessian_quadratic(hessian, 0.01)):
        qdata = round_gptq(weight, scale, space, quadratic)
        assert torch.equal(qdata.float(), space.encode(weight, scale).float())


@pytest.mark.parametrize("format, granularity", TARGETS)
def test_parts_change_nothing(gaussian, anisotropic, format, granularity):
    weight, known = gaussian(50, 64), anisotropic(64)
    space, scale = space_and_scale(format, granularity, weight)
    quadratic = hessian_quadratic(known.hessian, 0.01)
    whole = round_gptq(weight, scale, space, quadratic, passes=1).float()
    for count in (2, 4, 16, 1000):
        some = round_gptq(weight, scale, space, quadratic, passes=1, parts=count).float()
        assert (some == whole).float().mean() > 0.99  # products of other sizes may round differently


@pytest.mark.parametrize("passes", [0, 2])
def test_panels_change_nothing(monkeypatch, gaussian, anisotropic, passes):
    weight, known = gaussian(50, 200), anisotropic(200)
    space, scale = space_and_scale("int8_tensorwise", "row", weight)
    quadratic = hessian_quadratic(known.hessian, 0.01)
    whole = round_gptq(weight, scale, space, quadratic, passes=passes)
    monkeypatch.setattr(gptq, "_PANEL", 48)
    monkeypatch.setattr(gptq, "_BLOCK", 16)
    assert (round_gptq(weight, scale, space, quadratic, passes=passes) == whole).float().mean() > 0.99


@pytest.mark.parametrize("passes", [0, 1])
def test_dampenings_share_a_factorization(gaussian, anisotropic, passes):
    """A factorization derived from that of another dampening is the same as one of its own."""
    known, weight = anisotropic(60), gaussian(20, 60)
    first, second = (hessian_quadratic(known.hessian, dampening) for dampening in (0.01, 1.0))
    device = weight.device
    derived = gptq.factorize(second, 60, device, passes=passes, like=gptq.factorize(first, 60, device, passes=passes))
    own = gptq.factorize(second, 60, device, passes=passes)
    assert torch.equal(derived.unit, own.unit) and torch.equal(derived.order, own.order)


@pytest.mark.parametrize("format, granularity", TARGETS)
def test_coordinate_descent_never_raises_the_loss(gaussian, anisotropic, format, granularity):
    weight, known = gaussian(32, 160), anisotropic(160)
    space, scale = space_and_scale(format, granularity, weight)
    quadratic = hessian_quadratic(known.hessian, 0.01)
    losses = []
    for passes in range(6):
        error = space.decode(round_gptq(weight, scale, space, quadratic, passes=passes), scale) - weight
        losses.append(float((quadratic.gradient(error) * error).sum()))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("format, granularity", TARGETS)
def test_calibration_halves_the_output_error(gaussian, anisotropic, output_error, format, granularity):
    weight, known = gaussian(64, 256) * 0.02, anisotropic(256)
    plain = quantize_weight(weight, format, granularity=granularity, rounding="nearest")
    learned = quantize_weight(
        weight, format, granularity=granularity, hessian=known.hessian, validation_hessian=known.holdout
    )
    assert output_error(learned, weight, known.holdout) < 0.55 * output_error(plain, weight, known.holdout)
    assert learned.solution.solver == "gptq"
    assert learned.output_error == pytest.approx(output_error(learned, weight, known.holdout), rel=1e-3)
    assert learned.weight_error > plain.weight_error  # the price, and why weight error misleads


@pytest.mark.parametrize("format, granularity", TARGETS)
@pytest.mark.parametrize("shape", [(256, 256), (512, 128), (128, 512)])
def test_principal_keeps_its_bargain(gaussian, weight_error, format, granularity, shape):
    """Goal: at most 0.55 of the loss at 3 % more weight error; k = 0.2·min(out, in), U and V from the exact SVD."""
    weight = gaussian(*shape) * 0.02
    searched = quantize_weight(weight, format, granularity=granularity)
    learned = quantize_weight(weight, format, granularity=granularity, rounding="principal")
    u, _, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    k = int(0.2 * min(shape))

    def loss(quantized):
        return float((u[:, :k].t() @ (quantized.dequantize().double() - weight.double()) @ vt[:k].t()).norm())

    assert loss(learned) < 0.55 * loss(searched)
    assert weight_error(learned, weight) <= 1.03 * weight_error(searched, weight) * (1 + 1e-5)


def test_principal_keeps_its_bargain_on_localized_directions(gaussian):
    """Singular vectors of trained weights lean on few rows and columns; the cost is then searched, not computed."""
    weight = gaussian(200, 200) * 0.02
    weight[:40] *= 8
    weight[:, :30] *= 5
    nearest = quantize_weight(weight, "int8_tensorwise").weight_error
    made = quantize_weight(weight, "int8_tensorwise", rounding="principal")
    assert made.solution.solver == "gptq" and made.solution.gain < 0.8
    assert made.weight_error <= 1.03 * nearest * (1 + 1e-6)


def test_the_cost_bounds_the_weight_error(gaussian):
    weight = gaussian(200, 200)
    nearest = quantize_weight(weight, "int8_tensorwise").weight_error
    results = [
        quantize_weight(weight, "int8_tensorwise", rounding="principal", weight_cost=c) for c in (0.003, 0.02, 0.2)
    ]
    for cost, result in zip((0.003, 0.02, 0.2), results, strict=True):
        assert nearest < result.weight_error <= nearest * (1 + cost)
    gains = [result.solution.gain for result in results]
    assert gains == sorted(gains, reverse=True)


def test_the_low_rank_factor_is_that_of_the_matrix(gaussian):
    weight = gaussian(30, 90)
    quadratic = Principal(top_p=0.3).quadratic(weight)
    found = gptq.factorize(quadratic, 90, weight.device)
    unit, order = found.unit, found.order
    blocks = [slice(start, min(90, start + 20)) for start in range(0, 90, 20)]
    multipliers = projected._multipliers(quadratic.factor[order], quadratic.dampening, blocks)
    for block in blocks[:-1]:
        want = unit[block.stop :, block]
        got = quadratic.factor[order][block.stop :] @ multipliers[block].t()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_nearly_singular_hessian_gets_more_dampening(gaussian):
    column = gaussian(8, 1)
    gram = column @ column.t()
    result = quantize_weight(gaussian(4, 8, seed=1), "int8_tensorwise", hessian=gram, damping=1e-8)
    assert torch.isfinite(result.dequantize()).all()


def test_an_indefinite_hessian_is_rejected(gaussian, sentences):
    gram = torch.eye(8)
    gram[0, 1] = gram[1, 0] = 50.0
    with sentences.raises(CalibrationError):
        quantize_weight(gaussian(4, 8), "int8_tensorwise", hessian=gram)
