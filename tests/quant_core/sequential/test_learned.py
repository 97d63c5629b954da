"""Rounding offsets of the weights near a tie."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.sequential.learned import LearnedLayer, Offsets, RoundedLayer

OUT, IN, CARD = 32, 64, (12, 0)
FORMATS = {
    "W4A8": {"format": "asym_w4a8_int8"},
    "nvfp4": {"format": "nvfp4"},
    "INT8, rotated": {"format": "int8_tensorwise", "convrot": 16},
    "FP8": {"format": "float8_e4m3fn"},
}


def make_layer(kind: str = "W4A8", seed: int = 0) -> tuple[LearnedLayer, RoundedLayer]:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
    quantized = quantize_weight(weight, **FORMATS[kind], rounding="nearest", bias=torch.ones(OUT))
    rounded = RoundedLayer(weight, weight, quantized)
    return LearnedLayer(rounded, CARD), rounded


def test_start_is_the_rounding_that_is_given(subtests):
    for kind in FORMATS:
        with subtests.test(kind):
            layer, rounded = make_layer(kind)
            assert torch.equal(layer.qdata(layer.start).float(), rounded.quantized.qdata.float())
            assert layer.qdata(layer.start).dtype is rounded.quantized.qdata.dtype
            torch.testing.assert_close(layer.dequantize(layer.start), rounded.quantized.dequantize())


def test_only_weights_near_a_tie_have_an_offset_and_none_is_past_it(subtests):
    for kind in FORMATS:
        with subtests.test(kind):
            layer, _ = make_layer(kind)
            assert 0.1 * OUT * IN < len(layer.start) < 0.9 * OUT * IN
            assert layer.start.min() > 0.2
            assert layer.start.max() <= 0.45


def test_offset_above_one_half_rounds_to_the_other_neighbour(subtests):
    """The other neighbour is on the far side of the weight, so each error is larger, but less than twice half a step."""
    for kind in FORMATS:
        with subtests.test(kind):
            layer, rounded = make_layer(kind)
            moved = layer.qdata(torch.ones_like(layer.start)).float() != rounded.quantized.qdata.float()
            assert int(moved.sum()) == len(layer.start)
            one = layer.start.clone()
            one[3] = 0.51
            assert int((layer.qdata(one).float() != rounded.quantized.qdata.float()).sum()) == 1


def test_result_has_its_own_error_and_solver():
    layer, rounded = make_layer()
    made = layer.result(torch.ones_like(layer.start))
    error = (made.dequantize() - rounded.weight).norm() / rounded.weight.norm()
    assert made.solver == "reconstructed"
    assert made.weight_error == pytest.approx(float(error), rel=1e-5)
    assert made.weight_error > rounded.quantized.weight_error
    assert torch.equal(made.bias, rounded.quantized.bias)


def squared_outputs(x: torch.Tensor):
    """A loss of two layers."""
    return lambda linears: sum(linear(x).square().sum() for linear in linears.values())


def test_gradient_of_offsets_is_that_of_the_weights_times_the_distance_of_the_neighbours():
    """The difference of two states that differ in one offset, for a loss that is linear in the weights."""
    layer, _ = make_layer("INT8, rotated")
    offsets, direction = Offsets({"a": layer}), torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5))
    gradient = offsets.gradient(lambda linears: (linears["a"].weight * direction).sum())
    other = layer.start.clone()
    other[7] = 1.0
    change = ((layer.dequantize(other) - layer.dequantize(layer.start)) * direction).sum()
    assert float(gradient[7]) == pytest.approx(float(change), rel=1e-3)


def test_offsets_of_all_layers_are_one_vector_in_their_order():
    layers = {"a": make_layer(seed=1)[0], "b": make_layer("nvfp4", seed=2)[0]}
    offsets = Offsets(layers)
    assert torch.equal(offsets.x.detach(), torch.cat([layer.start for layer in layers.values()]))
    gradient = offsets.gradient(squared_outputs(torch.randn(4, IN, generator=torch.Generator().manual_seed(3))))
    assert gradient.shape == offsets.x.shape
    assert gradient.isfinite().all()
    assert gradient.any()


def test_layer_that_is_not_called_has_no_gradient():
    layers = {"a": make_layer(seed=1)[0], "b": make_layer(seed=2)[0]}
    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(3))
    gradient = Offsets(layers).gradient(lambda linears: linears["a"](x).square().sum())
    first = len(layers["a"].start)
    assert gradient[:first].any()
    assert not gradient[first:].any()


def test_called_layer_without_a_gradient_is_an_error():
    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(3))
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient reaches a"):
        Offsets({"a": make_layer()[0]}).gradient(lambda linears: (linears["a"](x).detach() * weight).sum())


def test_step_goes_against_the_gradient_whose_components_are_limited():
    offsets = Offsets({"a": make_layer()[0]})
    before, gradient = offsets.x.detach().clone(), torch.zeros_like(offsets.x)
    gradient[0], gradient[1] = 1.0, -100.0
    offsets.descend(torch.optim.SGD([offsets.x], lr=1.0), gradient, 1.0)
    moved = offsets.x.detach() - before
    assert moved[0] < 0
    assert float(moved[1] / moved[0]) == pytest.approx(-3.0, rel=1e-4)
    assert not moved[2:].any()


def test_linears_and_results_are_those_of_the_current_offsets():
    layer, _ = make_layer()
    offsets = Offsets({"a": layer})
    with torch.no_grad():
        offsets.x.fill_(1.0)
    expected = layer.dequantize(torch.ones_like(layer.start))
    assert torch.equal(offsets.linears()["a"].weight, expected)
    assert torch.equal(offsets.results()["a"].dequantize(), layer.result(torch.ones_like(layer.start)).dequantize())
