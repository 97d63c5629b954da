"""ComfyUI's native INT8 and W4A8 layers on this pack's kernels, with the CPU in the place of a GPU."""

import itertools
from unittest.mock import patch

import pytest
import torch
from torch.nn.functional import linear

from learned_rounding.tests.in_comfyui import IN_COMFYUI
from learned_rounding.tests.nodes.probing import stock_loads

if IN_COMFYUI:
    import comfy.ops
    import comfy.quant_ops

    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.host import native_layers
    from learned_rounding.tests.nodes.host.cpu_in_place_of_gpu import on_cpu, set_mode
    from learned_rounding.tests.nodes.host.tiny_model import DEVICE, TinyModel, distance

pytestmark = pytest.mark.usefixtures("in_comfyui", "has_int8")

INT8, W4A8 = "TensorWiseINT8Layout", "AsymW4A8Int8Layout"
ROTATED = {"per_channel": True, "convrot": True}
RECIPES = {
    "row": {"format": "int8_tensorwise"},
    "tensor": {"format": "int8_tensorwise", "granularity": "tensor"},
    "convrot": {"format": "int8_tensorwise", "convrot": True},
    "w4a8": {"format": "asym_w4a8_int8"},
}
W4A8_CASES = {
    "codebook": {},
    "uniform": {"codebook": False},
    "group of 32": {"group_size": 32},
    "asymmetric": {"symmetric": False, "codebook": False},
}


@pytest.fixture
def has_int8(host):
    if not stock_loads(host, "int8_tensorwise"):
        pytest.skip(f"ComfyUI {host.version} has no INT8 layers of its own")


@pytest.fixture
def recorded():
    with on_cpu() as recorded:
        yield recorded


def calls(ours=0, stock=0, searches=0, measured=0):
    return {"ours": ours, "stock": stock, "searches": searches, "measured": measured}


def run_in_modes(recorded, run) -> tuple[dict, dict]:
    """Run ``run(mode)`` twice in each mode; returns the calls of each run, and the last results."""
    counted, results = {}, {}
    for mode in ("off", "on", "auto"):
        set_mode(mode)

        def once(mode=mode):
            results[mode] = run()

        counted[mode] = [recorded.during(once), recorded.during(once)]
    return counted, results


# Calls of two runs in each mode of a layer that our kernels support; a measurement runs both implementations.
SUPPORTED = {
    "off": [calls(stock=1, searches=1)] * 2,
    "on": [calls(ours=1)] * 2,
    "auto": [calls(ours=2, stock=1, measured=1), calls(ours=1)],
}


@pytest.mark.parametrize("inference", [True, False], ids=["linear", "mm"])  # under inference mode, and without it
def test_each_mode_runs_its_implementation_of_int8(recorded, inference, subtests):
    x, weight = torch.randn(3, 5, 256, device=DEVICE), torch.randn(32, 256, device=DEVICE)
    for options, bias in itertools.product(
        ({}, {"per_channel": True}, ROTATED), (None, torch.randn(32, device=DEVICE))
    ):
        coded = comfy.quant_ops.QuantizedTensor.from_float(weight, INT8, **options)
        recorded.transposed.clear()
        name = f"{'+'.join(options) or 'tensor'}, {'no ' if bias is None else ''}bias"
        with subtests.test(name), torch.inference_mode(inference):
            inputs = x.clone()  # made in the same mode

            def run(coded=coded, bias=bias, inputs=inputs):
                return linear(inputs, coded, None if bias is None else bias.clone())

            counted, results = run_in_modes(recorded, run)
            assert counted == SUPPORTED
            assert distance(results["on"], results["off"]) < 0.005
            recorded.winner = "stock"
            set_mode("auto")
            assert [recorded.during(run), recorded.during(run)] == [
                calls(ours=1, stock=2, measured=1),
                calls(stock=1),
            ]
            assert torch.equal(run(), results["off"])
            recorded.winner = "ours"
            assert list(recorded.transposed) == [not inference]


@pytest.mark.parametrize("inference", [True, False], ids=["linear", "mm"])
def test_each_mode_runs_its_implementation_of_w4a8(host, recorded, inference, subtests):
    if not stock_loads(host, "asym_w4a8_int8"):
        pytest.skip(f"ComfyUI {host.version} has no W4A8 layers of its own")
    x, bias = torch.randn(3, 5, 256, device=DEVICE), torch.randn(32, device=DEVICE)
    weight = torch.randn(32, 256, device=DEVICE)
    unsupported = {**SUPPORTED, "on": [calls(stock=1)] * 2, "auto": [calls(stock=1)] * 2}
    for name, options in W4A8_CASES.items():
        coded = comfy.quant_ops.QuantizedTensor.from_float(weight, W4A8, **options)
        recorded.transposed.clear()
        with subtests.test(name), torch.inference_mode(inference):
            inputs = x.clone()
            counted, results = run_in_modes(
                recorded, lambda inputs=inputs, coded=coded: linear(inputs, coded, bias.clone())
            )
            assert counted == (unsupported if name == "asymmetric" else SUPPORTED)
            assert distance(results["on"], results["off"]) < 0.005
            assert list(recorded.transposed) == [not inference]


def test_fused_activations_run_in_every_mode(recorded, subtests):
    """They reach our backend through comfy-kitchen's registry."""
    x, weight = torch.randn(3, 128, device=DEVICE), torch.randn(32, 128, device=DEVICE)
    coded = comfy.quant_ops.QuantizedTensor.from_float(weight, INT8)
    activations = getattr(comfy.ops, "INPUT_ACT_EAGER", {})
    assert {"gelu_tanh", "swiglu"} <= activations.keys()
    for name, act in activations.items():
        inputs = torch.cat([x, x], 1) if name == "swiglu" else x

        def run(name=name, inputs=inputs):
            return comfy.quant_ops.ck.int8_linear(
                inputs, coded._qdata, coded._params.scale, None, torch.float32, input_act=name
            )

        with subtests.test(name):
            counted, results = run_in_modes(recorded, run)
            assert counted == {
                "off": [calls(stock=1, searches=1)] * 2,
                "on": [calls(ours=1, searches=1)] * 2,
                "auto": [calls(ours=2, stock=1, searches=1, measured=1), calls(ours=1, searches=1)],
            }
            assert distance(results["on"], linear(act(inputs), coded)) < 0.005


@pytest.fixture
def int8_weight():
    return torch.randn(32, 1024, device=DEVICE)


@pytest.fixture
def plain(int8_weight):
    return comfy.quant_ops.QuantizedTensor.from_float(int8_weight, INT8, per_channel=True)


MEASURED = calls(ours=2, stock=1, measured=1)


def test_each_shape_is_measured_once(recorded, int8_weight, plain, subtests):
    other = comfy.quant_ops.QuantizedTensor.from_float(int8_weight[:16].clone(), INT8, per_channel=True)
    x = torch.randn(4, 1024, device=DEVICE)
    set_mode("auto")
    cases = {
        "first": (x, plain, MEASURED),
        "again": (x, plain, calls(ours=1)),
        "other tokens": (x[:3].clone(), plain, MEASURED),
        "other weight": (x, other, MEASURED),
        "other dtype": (x.to(torch.bfloat16), plain, MEASURED),
        "not contiguous": (torch.cat([x, x], 1)[:, :1024], plain, calls(ours=1)),
    }
    for name, (inputs, coded, expected) in cases.items():
        with subtests.test(name):
            assert recorded.during(linear, inputs, coded) == expected
    assert len(set(recorded.measured)) == 3  # 3 and 4 tokens have one result in the cache file


def test_layers_that_our_kernels_do_not_support_run_on_comfyuis(recorded, int8_weight):
    wide = comfy.quant_ops.QuantizedTensor.from_float(int8_weight, INT8, **ROTATED, convrot_groupsize=1024)
    for mode in ("auto", "on"):
        set_mode(mode)
        assert recorded.during(linear, torch.randn(4, 1024, device=DEVICE), wide) == calls(stock=1)


def test_earlier_comfy_kitchen_without_fused_activations(recorded, plain):
    from comfy_kitchen.registry import registry

    eager = registry._backends["eager"]
    stock = eager.int8_linear

    def int8_linear(x, weight, weight_scale, bias, out_dtype, convrot, convrot_groupsize):
        return stock(x, weight, weight_scale, bias, out_dtype, convrot, convrot_groupsize)

    set_mode("auto")
    with patch.object(eager, "int8_linear", int8_linear):
        assert recorded.during(linear, torch.randn(2, 1024, device=DEVICE), plain) == MEASURED


def test_choices_are_kept_for_a_limited_number_of_shapes(recorded, plain):
    set_mode("on")
    with patch.object(native_layers._kept, "limit", 2):
        for tokens in range(1, 8):
            linear(torch.randn(1, 1024, device=DEVICE).expand(tokens, -1), plain)
            assert len(native_layers._kept) <= 2


def test_float64_is_refused_alike_in_every_mode(recorded, plain):
    said = set()
    for mode in ("off", "on", "auto"):
        set_mode(mode)
        with pytest.raises(ValueError) as error:
            linear(torch.randn(4, 1024, device=DEVICE).double(), plain)
        said.add(str(error.value))
    assert len(said) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_models_run_in_the_mode_of_their_node_or_of_the_setting(host, recorded, name):
    if not stock_loads(host, RECIPES[name]["format"]):
        pytest.skip(f"ComfyUI {host.version} has no W4A8 layers of its own")
    tiny = TinyModel()
    file = tiny.file(**RECIPES[name])
    plain = pack.build_model(tiny.original, file)
    on, off, auto = (pack.build_model(tiny.original, file, mode) for mode in ("on", "off", "auto"))
    expected, layers = tiny.sampled(plain), len(pack.quantized_layers(on))
    assert layers > 30

    def sample(model) -> tuple[dict, torch.Tensor]:
        results = []
        counted = recorded.during(lambda: results.append(tiny.sampled(model)))
        return counted, results[0]

    def check_ours(counted) -> None:
        assert counted["ours"] >= layers
        assert counted["stock"] == 0
        assert counted["measured"] == 0

    def check_stock(counted) -> None:
        assert counted["stock"] >= layers
        assert counted["ours"] == 0

    counted, ours = sample(on)
    check_ours(counted)
    assert distance(ours, expected) < 0.02
    counted, _ = sample(auto)  # the setting is off
    check_stock(counted)
    assert native_layers._mode == "off"
    set_mode("on")
    counted, stock = sample(off)
    check_stock(counted)
    assert torch.equal(stock, expected)
    counted, result = sample(auto)
    check_ours(counted)
    assert torch.equal(result, ours)
    set_mode("auto")
    counted, _ = sample(auto)
    assert 0 < counted["measured"] < layers
    counted, result = sample(auto)
    check_ours(counted)
    assert torch.equal(result, ours)


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_models_with_a_lora_and_with_low_vram(recorded, mode):
    tiny = TinyModel()
    plain = pack.build_model(tiny.original, tiny.file(**RECIPES["convrot"]))
    with_lora = tiny.with_lora(plain)
    cases = {"whole": (with_lora, {}), "low VRAM": (with_lora, {"lowvram_model_memory": 1})}
    expected = {case: tiny.run(model, **options) for case, (model, options) in cases.items()}
    without = tiny.sampled(plain)
    set_mode(mode)
    for case, (model, options) in cases.items():
        assert distance(tiny.run(model, **options), expected[case]) < 0.02, case
    assert distance(tiny.run(plain, lowvram_model_memory=1), without) < 0.02


# Case → layout, its options of a layer with 256 input channels, the options of a recipe, and the modes that can be compiled:
# comfy-kitchen has no operator of torch for W4A8, and tracers fail in its code.
COMPILED = {
    "int8": (INT8, {"per_channel": True}, RECIPES["convrot"], ("on", "auto", "off")),
    "w4a8": (W4A8, {"convrot_groupsize": 256}, RECIPES["w4a8"], ("on", "auto")),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers_and_models_run_in_every_mode(host, recorded, name, backend, subtests):
    layout, options, recipe, modes = COMPILED[name]
    if not stock_loads(host, recipe["format"]):
        pytest.skip(f"ComfyUI {host.version} has no W4A8 layers of its own")
    tiny = TinyModel()
    model = pack.build_model(tiny.original, tiny.file(**recipe))
    coded = comfy.quant_ops.QuantizedTensor.from_float(torch.randn(32, 256, device=DEVICE), layout, **options)
    x = torch.randn(3, 256, device=DEVICE)
    expected, whole = linear(x, coded), tiny.run(model)
    diffusion_model = model.model.diffusion_model
    # A graph of aot_eager has our operator of W4A8, which runs without the function that is counted.
    least = 0 if (name, backend) == ("w4a8", "aot_eager") else len(pack.quantized_layers(model))
    for mode in modes:
        set_mode(mode)
        torch.compiler.reset()
        layer = torch.compile(lambda x: linear(x, coded), backend=backend)
        model.model.diffusion_model = torch.compile(diffusion_model, backend=backend)
        layer(x), tiny.run(model)  # compiled, and measured
        results = []
        with subtests.test(mode):
            counted = recorded.during(lambda layer=layer, results=results: results.extend((layer(x), tiny.run(model))))
            used, unused = ("stock", "ours") if mode == "off" else ("ours", "stock")
            assert counted[used] > least
            assert counted[unused] == 0
            assert counted["measured"] == 0
            assert distance(results[0], expected) < 0.005
            assert distance(results[1], whole) < 0.02
