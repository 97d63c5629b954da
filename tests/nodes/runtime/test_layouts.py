"""Every operation of this pack's layouts on quantized tensors."""

import functools

import pytest
import torch
from torch.nn.functional import linear

from learned_rounding.quant_core import FORMATS
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.formats.layer_json import config_tensor
from learned_rounding.tests.in_comfyui import IN_COMFYUI
from learned_rounding.tests.nodes.probing import takes_layouts

if IN_COMFYUI:
    import comfy.ops
    import comfy.quant_ops

    from learned_rounding.nodes import host as pack
    from learned_rounding.tests.nodes.host.tiny_model import DEVICE, distance

pytestmark = pytest.mark.usefixtures("in_comfyui")

OURS = [name for name, entry in FORMATS.items() if entry.stock_since is None]
# Largest relative difference of an output from that of the dequantized weight.
NEAR = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 8e-3}
SHAPE, BLOCK = (70, 100), 32
INPUTS = ((5, 100), (2, 5, 100), (100,), (2, 3, 4, 100))


class Quantized:
    """A random weight that a layout quantizes, with a bias and activations.

    Attributes:
        codec: our codec of the same format.
        coded: ComfyUI's quantized tensor of the weight.
        decoded: its values in ``dtype``.
        near: largest relative difference of outputs.
    """

    def __init__(self, format: str, dtype: torch.dtype):
        from learned_rounding.nodes.runtime.layouts import LAYOUTS

        self.dtype, self.near, self._generator = dtype, NEAR[dtype], torch.Generator().manual_seed(0)
        options = {"block_size": BLOCK} if "block" in FORMATS[format].granularities else {}
        self.codec = make_codec(format, **options)
        self.weight, self.bias = self.normal(*SHAPE), self.normal(SHAPE[0])
        self.coded = comfy.quant_ops.QuantizedTensor.from_float(self.weight, LAYOUTS[format].__name__, **options)
        self.decoded = self.coded.dequantize()
        self.inputs = [self.normal(*shape) for shape in INPUTS]
        self.x = self.inputs[0]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(DEVICE, self.dtype)

    def decode(self) -> torch.Tensor:
        """The values of the stored tensors by our codec, in float32."""
        return self.codec.dequantize({"weight": self.coded._qdata, "weight_scale": self.coded._params.scale}, SHAPE)


@pytest.fixture
def each(host, subtests):
    """Iterator of a Quantized per layout and dtype, each in a subtest."""
    if not takes_layouts(host):
        pytest.skip(f"ComfyUI {host.version} has no way to add formats")
    pack.add_layouts()

    def iterate():
        for format in OURS:
            for dtype in NEAR:
                yield functools.partial(subtests.test, f"{format} {dtype}"), Quantized(format, dtype)

    with torch.inference_mode(False):
        yield iterate()


def test_weight_has_the_values_of_its_codes(each):
    for case, q in each:
        with case():
            assert torch.equal(q.decoded, q.decode().to(q.dtype))
            assert 0 < distance(q.decoded, q.weight) < 0.03
            assert q.coded.shape == q.weight.shape
            assert q.coded.dtype == q.dtype


def test_linear_quantizes_the_activations(each):
    for case, q in each:
        weight = q.decode()
        for x in q.inputs:
            seen = q.codec.quantize_activations(x.reshape(-1, SHAPE[1])).reshape(x.shape)
            for bias in (None, q.bias):
                with case(), torch.inference_mode():
                    product = linear(x, q.coded, bias)
                    assert product.dtype is q.dtype
                    assert distance(product, linear(seen, weight, None if bias is None else bias.float())) < q.near


def test_linear_is_t_and_mm_in_every_mode(each):
    for case, q in each:
        for x in q.inputs:
            for bias in (None, q.bias):
                with case():
                    with torch.inference_mode():
                        whole = linear(x, q.coded, bias)
                    with torch.no_grad():
                        assert torch.equal(whole, linear(x, q.coded, bias))
                    assert torch.equal(whole, linear(x.clone().requires_grad_(), q.coded, bias).detach())


def test_transposed_weight(each):
    for case, q in each:
        with case():
            assert q.coded.t().shape == q.weight.t().shape
            assert torch.equal(q.coded.t().dequantize(), q.decoded.t())
            assert torch.equal(q.coded.t().clone().dequantize(), q.decoded.t())
            assert torch.equal(linear(q.x, q.coded.t().t()), linear(q.x, q.coded))
            assert torch.equal(linear(q.x[:, :70], q.coded.t()), linear(q.x[:, :70], q.decoded.t()))


def test_mm_and_addmm(each):
    for case, q in each:
        with case():
            product, x = linear(q.x, q.coded), q.x
            assert torch.equal(torch.mm(x, q.coded.t()), product)
            assert torch.equal(torch.mm(q.coded, x.t()), torch.mm(q.decoded, x.t()))
            assert torch.equal(torch.mm(x[:, :70], q.coded), torch.mm(x[:, :70], q.decoded))
            assert torch.equal(torch.addmm(q.bias, x, q.coded.t()), linear(x, q.coded, q.bias))
            with_factor = torch.addmm(q.bias, x, q.decoded.t(), beta=0.5)
            assert torch.equal(torch.addmm(q.bias, x, q.coded.t(), beta=0.5), with_factor)
            assert torch.equal(torch.addmm(product, x, q.coded.t()), torch.addmm(product, x, q.decoded.t()))


def test_views_and_other_operations(each):
    for case, q in each:
        with case():
            assert q.coded.view(-1, 100)._qdata.data_ptr() == q.coded._qdata.data_ptr()
            assert torch.equal(q.coded.view(100, 70), q.decoded.view(100, 70))
            assert torch.equal(q.coded.reshape(-1), q.decoded.reshape(-1))
            assert torch.equal(q.coded + 1, q.decoded + 1)
            assert torch.equal(q.coded.detach().dequantize(), q.decoded)


def test_casts_moves_and_copies(each):
    for case, q in each:
        other = torch.float16 if q.dtype is torch.bfloat16 else torch.bfloat16
        with case():
            cast, moved, clone = q.coded.to(other), q.coded.to("meta"), q.coded.clone()
            assert cast.dtype is other
            assert has_same_bytes(cast._qdata, q.coded._qdata)
            assert {tensor.device.type for tensor in (moved, moved._qdata, moved._params.scale)} == {"meta"}
            clone._params.scale.zero_()
            assert torch.equal(q.coded.dequantize(), q.decoded)
            assert not clone.dequantize().any()
            target = torch.empty_like(q.coded, dtype=other)
            target.copy_(q.coded)
            assert target.dtype is other
            assert torch.equal(target.to(q.dtype).dequantize(), q.decoded)


def has_same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_state_dict_has_the_dtypes_of_the_file(each):
    for case, q in each:
        with case():
            dtypes = {name: tensor.dtype for name, tensor in q.coded.state_dict("a.weight").items()}
            assert dtypes == {
                "a.weight": FORMATS[q.codec.format.name].storage_dtype,
                "a.weight_scale": torch.float32,
            }


def test_weight_copied_through_a_flat_buffer_is_unchanged(each):
    """As ComfyUI streams weights from main memory."""
    import comfy.memory_management  # not in every release

    for case, q in each:
        with case():
            size = comfy.memory_management.vram_aligned_size([q.coded])
            buffer = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
            (view,) = comfy.memory_management.interpret_gathered_like([q.coded], buffer)
            view.copy_(q.coded)
            assert torch.equal(linear(q.x, view), linear(q.x, q.coded))


def test_requantization_keeps_the_block_size_and_rounds_stochastically_by_seed(each):
    for case, q in each:
        with case():
            again = q.coded.requantize_from_float(q.decoded, scale="recalculate", stochastic_rounding=0)
            assert again._params.block_size == q.codec.block_size
            assert distance(again.dequantize(), q.decoded) < q.near
            draws = [
                q.coded.requantize_from_float(q.weight, scale="recalculate", stochastic_rounding=seed).dequantize()
                for seed in (*range(1, 65), 1)
            ]
            assert torch.equal(draws[0], draws[-1])
            assert not torch.equal(draws[0], draws[1])
            mean = torch.stack([draw.float() for draw in draws[:64]]).mean(0)
            assert distance(mean, q.weight) < 0.5 * distance(q.decoded, q.weight)


def test_gradient_of_the_activations(each):
    for case, q in each:
        with case():
            x = q.x.clone().requires_grad_()
            linear(x, q.coded, q.bias).sum().backward()
            assert torch.allclose(x.grad.float(), q.decoded.float().sum(0).expand_as(x), rtol=0.02, atol=0.1)


def test_layer_of_comfyui_loads_runs_and_saves_the_weight(each):
    for case, q in each:
        x = q.normal(2, 100, 5).transpose(1, 2)  # not contiguous
        state = {**q.coded.state_dict("a.weight"), "a.comfy_quant": config_tensor(q.codec.config)}
        layer = comfy.ops.mixed_precision_ops({}, q.coded.dtype).Linear(*reversed(SHAPE), bias=False)

        def load(state_dict, layer=layer):
            layer._load_from_state_dict(dict(state_dict), "a.", {}, True, [], [], [])
            return layer.state_dict(prefix="a.")

        with case():
            saved, kind = load(state), type(layer)
            with torch.no_grad():
                parts = layer(x)
            with torch.inference_mode():
                assert torch.equal(layer(x), parts)
            assert torch.equal(parts, linear(x.contiguous(), q.coded))
            assert saved.keys() == state.keys()
            assert [name for name in state if not has_same_bytes(saved[name], state[name])] == []
            again = load(state)
            assert [name for name in state if not has_same_bytes(again[name], state[name])] == []
            assert type(layer) is kind
            assert load({"a.weight": q.decoded}).keys() == {"a.weight"}
            load(state)
            assert layer.to("meta").weight._params.scale.device.type == "meta"


def test_compiled_linear_gives_the_same_output(each):
    for case, q in each:
        torch.compiler.reset()
        compiled = torch.compile(
            lambda x, coded=q.coded, bias=q.bias: linear(x, coded, bias), backend="aot_eager", fullgraph=True
        )
        for mode in (torch.inference_mode, torch.no_grad):
            with case(), mode():
                for x in q.inputs[:2]:
                    assert torch.equal(compiled(x), linear(x, q.coded, q.bias))
