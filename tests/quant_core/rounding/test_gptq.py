"""GPTQ, its beam search and coordinate descent against their published forms in float64."""

import itertools

import pytest
import torch

from learned_rounding.kernels.reference import round_to_levels
from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.errors import CalibrationError
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.rounding import Quadratic, amax_scale, gptq, hessian_quadratic, round_gptq
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


def test_gptq_matches_the_published_form_in_float64(subtests, gaussian, anisotropic):
    """Blocks, the transposed layout and the factor of H instead of its inverse change nothing but ties."""
    for index, (format, granularity) in enumerate(TARGETS):
        for shape in {(24, 200), [(7, 40), (1, 9), (5, 1)][index % 3]}:
            shape = held_shape(format, shape)
            weight, known = gaussian(*shape) * 0.02, anisotropic(shape[1])
            space, scale = space_and_scale(format, granularity, weight)
            quadratic = hessian_quadratic(known.hessian, 0.05)
            got = round_gptq(weight, scale, space, quadratic).float()
            want = published_gptq(weight, space.groups.spread(scale), space, known.hessian, quadratic.dampening)
            with subtests.test(format, granularity=granularity, shape=shape):
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


def test_beam_search_matches_float64(subtests, gaussian, anisotropic):
    """Each element with a narrow and a wide beam; the last shape has more columns than a block."""
    cases = [(target, (5, 32), 8) for target in BEAM_TARGETS] + [(BEAM_TARGETS[0], (1, 144), 4)]
    for (format, granularity), shape, width in cases:
        weight, known = gaussian(*shape) * 0.02, anisotropic(shape[1])
        space, scale = space_and_scale(format, granularity, weight)
        quadratic = hessian_quadratic(known.hessian, 0.05)
        got = round_gptq(weight, scale, space, quadratic, beam_width=width).float()
        spread = space.groups.spread(scale).expand(weight.shape)
        want = beam_in_float64(weight, spread, space, known.hessian, quadratic.dampening, width)
        with subtests.test(format, shape=shape, width=width):
            assert (got == want).float().mean() > 0.99


def dampened_loss(quadratic: Quadratic, error: torch.Tensor) -> float:
    return float((quadratic.gradient(error) * error).sum())


@pytest.mark.parametrize("passes", [0, 1])
def test_beam_search_lowers_the_loss(subtests, gaussian, anisotropic, passes):
    weight, known = gaussian(48, 192) * 0.02, anisotropic(192)
    quadratic = hessian_quadratic(known.hessian, 0.01)
    for format, granularity in BEAM_TARGETS:
        space, scale = space_and_scale(format, granularity, weight)
        qdata = [round_gptq(weight, scale, space, quadratic, passes=passes, beam_width=width) for width in (1, 8)]
        one, eight = (dampened_loss(quadratic, space.decode(values, scale) - weight) for values in qdata)
        with subtests.test(format, granularity=granularity):
            assert eight < one * (0.97 if format != "float8_e4m3fn" else 1.0)


def test_only_a_gpu_searches_by_default(subtests):
    for format, granularity in TARGETS:
        space = make_codec(format, granularity).solve_space((64, 128))
        with subtests.test(format, granularity=granularity):
            assert gptq.default_beam_width(space, torch.device("cpu")) == 1
            expected = 1 if format.startswith(("float8", "mxfp8")) else 4
            assert gptq.default_beam_width(space, torch.device("cuda")) == expected


def test_gptq_with_a_diagonal_hessian_is_round_to_nearest(subtests, gaussian):
    for format, granularity in TARGETS:
        weight = gaussian(*held_shape(format, (40, 150))) * 0.02
        space, scale = space_and_scale(format, granularity, weight)
        diagonal = hessian_quadratic(torch.diag(torch.linspace(0.1, 3, weight.shape[1])), 0.01)
        nearest = space.encode(weight, scale).float()
        for name, quadratic in (("identity", Quadratic()), ("diagonal", diagonal)):
            with subtests.test(format, granularity=granularity, hessian=name):
                assert torch.equal(round_gptq(weight, scale, space, quadratic).float(), nearest)


def test_parts_change_nothing(subtests, gaussian, anisotropic):
    weight, known = gaussian(50, 64), anisotropic(64)
    quadratic = hessian_quadratic(known.hessian, 0.01)
    for format, granularity in TARGETS:
        space, scale = space_and_scale(format, granularity, weight)
        whole = round_gptq(weight, scale, space, quadratic, passes=1).float()
        for count in (2, 16, 1000) if format == "int8_blockwise" else (4,):
            some = round_gptq(weight, scale, space, quadratic, passes=1, parts=count).float()
            with subtests.test(format, granularity=granularity, parts=count):
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
    assert torch.equal(derived.unit, own.unit)
    assert torch.equal(derived.order, own.order)


def test_coordinate_descent_never_raises_the_loss(subtests, gaussian, anisotropic):
    weight, known = gaussian(24, 160), anisotropic(160)
    quadratic = hessian_quadratic(known.hessian, 0.01)
    for format, granularity in TARGETS:
        space, scale = space_and_scale(format, granularity, weight)
        losses = []
        for passes in (0, 1, 2, 4):
            qdata = round_gptq(weight, scale, space, quadratic, passes=passes)
            losses.append(dampened_loss(quadratic, space.decode(qdata, scale) - weight))
        with subtests.test(format, granularity=granularity):
            assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
            assert losses[-1] < losses[0]


def test_a_nearly_singular_hessian_gets_more_dampening(gaussian):
    column = gaussian(8, 1)
    result = quantize_weight(gaussian(4, 8, seed=1), "int8_tensorwise", hessian=column @ column.t(), damping=1e-8)
    assert torch.isfinite(result.dequantize()).all()


def test_an_indefinite_hessian_is_rejected(gaussian, sentences):
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 50.0
    with sentences.raises(CalibrationError):
        quantize_weight(gaussian(4, 8), "int8_tensorwise", hessian=hessian)


def memory_bytes(out: int, inner: int, parts: int, *, passes: int = 0) -> int:
    """Peak of what round_gptq may allocate, without the weight, its quantized values and the Hessian.

    8·in² while H + λI is put in order, to be factored in place; then 4·in², and 18·⌈out/parts⌉·in for the columns, their
    errors and values, and a copy of each while it is put in order. Coordinate descent needs 4·in² more.
    """
    more = 4 * inner**2 if passes else 0
    return more + max(8 * inner**2, 4 * inner**2 + 18 * -(-out // parts) * inner)


@pytest.mark.gpu
@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("shape, parts", [((512, 8192), 1), ((16384, 2048), 1), ((16384, 2048), 4)])
def test_gptq_needs_the_memory_it_states(gaussian, shape, parts, passes):
    weight, hessian = gaussian(*shape).bfloat16().cuda(), torch.eye(shape[1], device="cuda")
    space = make_codec("int8_tensorwise", "row").solve_space(shape)
    scale, quadratic = amax_scale(weight, space)[0], hessian_quadratic(hessian, 0.01)
    for _ in range(2):  # the first run also loads libraries, whose workspace stays
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        round_gptq(weight, scale, space, quadratic, passes=passes, parts=parts)
        used = torch.cuda.max_memory_allocated() - before
    assert used - weight.numel() <= 1.1 * memory_bytes(*shape, parts, passes=passes) + 2**26
