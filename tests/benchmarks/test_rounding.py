"""Rounding benchmark: a tiny run has a row for every format and method, and its errors are plausible."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from learned_rounding.benchmarks import rounding, rounding_encoder
from learned_rounding.benchmarks.harness import environment
from learned_rounding.benchmarks.minilm import LAYERS, SPLITS, MiniLM, MiniLMModule
from learned_rounding.benchmarks.rounding_encoder import CARDS, quantize_activations
from learned_rounding.benchmarks.rounding_methods import CASES, Case, ComfyKitchen, LibraryMethod, dequantize
from learned_rounding.benchmarks.rounding_report import markdown
from learned_rounding.benchmarks.rounding_sequential import SequentialMethod
from learned_rounding.quant_core import FORMATS, quantize_weight


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    target = tmp_path_factory.mktemp("rounding") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        command = ["--quick", "--only", "synthetic", "--size", "128", "--iterations", "0", "--json", str(target)]
        patch.setattr(sys, "argv", ["rounding.py", *command])
        rounding.main()
    return json.loads(target.read_text(encoding="utf-8"))


def test_every_format_has_a_row_for_every_main_method(result):
    measured = {(row["weight"], row["format"], row["per"], row["method"]) for row in result["rows"]}
    assert len(measured) == len(result["rows"])
    for weight in {row["weight"] for row in result["rows"]}:
        for case in CASES:
            for method in ("nearest", "scale search", "principal", "calibrated, 0 sweeps", "calibrated, 4 sweeps"):
                assert (weight, *case.columns.values(), method) in measured


def test_gptq_beats_nearest_with_correlated_activations(result):
    rows = {(row["weight"], row["format"], row["per"], row["method"]): row for row in result["rows"]}
    for (*where, method), row in rows.items():
        if method.startswith("calibrated"):
            nearest = rows[(*where, "nearest")]
            for activations in ("anisotropic", "aligned"):
                assert row[activations] < 0.9 * nearest[activations]


def test_tables_have_device_and_date(result):
    text = markdown(result)
    assert result["device"] in text and result["date"] in text
    assert "| float8_e4m3fn tensor | calibrated, 0 sweeps |" in text


@pytest.mark.parametrize(
    "case", [case for case in CASES if FORMATS[case.format].storage is None and case.granularity != "group"], ids=str
)
def test_qdata_and_scale_of_another_tool_are_dequantized(case):
    """Also if the scale has another shape: flat instead of one column."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    quantized = quantize_weight(
        weight, case.format, granularity=case.granularity, convrot=case.rotated or None, rounding="nearest"
    )
    codec = case.codec(512)
    assert codec == quantized.codec
    tensors = quantized.tensors("a")
    for scale in (tensors["a.weight_scale"], quantized.scale.flatten()):
        torch.testing.assert_close(dequantize(codec, tensors["a.weight"], scale), quantized.dequantize())


@pytest.mark.parametrize("capability", CARDS.values(), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_activations_are_quantized_as_on_the_card(case, capability):
    x = torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(0))
    quantized = quantize_activations(case, x, capability)
    assert quantized.shape == x.shape
    codec = case.codec(256)
    assert torch.equal(quantized.flatten(0, -2), codec.quantize_activations(x.flatten(0, -2), capability))
    largest = 0.2 if codec.activation_elements(capability).bits == 4 else 0.06
    assert ((quantized - x).norm() / x.norm() < largest) and codec.quantizes_activations(capability) != torch.equal(
        quantized, x
    )


@pytest.mark.parametrize("bits", [4, 6])
def test_comfy_kitchen_is_measured_where_it_has_the_format(bits):
    pytest.importorskip("comfy_kitchen.tensor")
    case, method = Case("asym_w4a8_int8", "group", bits=bits), ComfyKitchen()
    if not method.covers(case):
        pytest.skip("this comfy-kitchen has no 6 bits")
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    errors = [float((made(weight, case).weight - weight).norm()) for made in (method, LibraryMethod("", "nearest"))]
    # Of 6 bits its default is a scale search.
    assert errors[0] == pytest.approx(errors[1], rel=1e-3) if bits == 4 else errors[0] < errors[1]


def make_text_encoder(texts):
    """Tensors of a MiniLM with random weights, and random evaluation texts."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    embeddings = {"word_embeddings": 100, "position_embeddings": 64, "token_type_embeddings": 2}
    tensors = {f"embeddings.{name}.weight": random(count, 384) for name, count in embeddings.items()}
    shapes = {"intermediate.dense": (1536, 384), "output.dense": (384, 1536)}
    norms = {"embeddings.LayerNorm"}
    for name in LAYERS:
        block, _, layer = name.removeprefix("encoder.layer.").partition(".")
        out, channels = shapes.get(layer, (384, 384))
        tensors |= {f"{name}.weight": random(out, channels), f"{name}.bias": random(out)}
        norms |= {f"encoder.layer.{block}.{part}.LayerNorm" for part in ("attention.output", "output")}
    for name in norms:
        tensors |= {f"{name}.weight": torch.ones(384), f"{name}.bias": torch.zeros(384)}
    return tensors | {"tokens.evaluation": torch.randint(100, (texts, 64), generator=generator)}


def test_statistics_of_the_text_encoder_are_those_of_its_activations():
    model = MiniLM(make_text_encoder(texts=2), torch.device("cpu"))
    activations = {}

    def linear(name, x):
        activations[name] = x.flatten(0, -2)
        return model.linear(name, x)

    tokens = model.tokens("evaluation")
    exact = model.embed(tokens, linear)
    torch.testing.assert_close(exact.norm(dim=-1), torch.ones(2))
    statistics = model.statistics(tokens)
    assert statistics.keys() == set(LAYERS)
    for name, x in activations.items():
        torch.testing.assert_close(statistics[name].hessian, x.t() @ x / len(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(statistics[name].mean, x.mean(dim=0), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_module_of_the_text_encoder_has_its_layers_and_embeddings():
    tensors = make_text_encoder(texts=2)
    model, module = MiniLM(tensors, torch.device("cpu")), MiniLMModule(tensors)
    assert {name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)} == set(LAYERS)
    tokens = model.tokens("evaluation")
    assert torch.equal(module(tokens), model.embed(tokens))


def test_sequential_rounding_of_the_text_encoder_rounds_every_layer():
    tensors = make_text_encoder(texts=8)
    model = MiniLM(tensors, torch.device("cpu"))
    tokens = model.tokens("evaluation")
    texts, statistics = {"calibration": tokens, "validation": tokens}, model.statistics(tokens)
    method = SequentialMethod("sequential", tensors, texts, statistics, (12, 0))
    made = method.round_layers(Case("asym_w4a8_int8", "group"))
    assert set(made) == set(LAYERS)
    assert all(0 < (made[name].weight - model.weights[name]).norm() < model.weights[name].norm() for name in LAYERS)


def test_errors_of_the_text_encoder_are_those_of_each_card(monkeypatch):
    """NVFP4 activations from SM 10.0; INT4 of ConvRot W4A4 before SM 9.0, with the same weights as for INT8."""
    monkeypatch.setattr(rounding_encoder, "_check_embeddings", lambda *_: None)
    tensors = make_text_encoder(texts=2)
    for split in SPLITS:
        tensors |= {f"tokens.{split}": tensors["tokens.evaluation"], f"topics.{split}": torch.arange(2)}
    formats = ["convrot_w4a4", "nvfp4"]
    args = SimpleNamespace(tensors=tensors, formats=formats, texts=8, quick=False, sequential=False)
    with torch.no_grad():
        rows = rounding_encoder.minilm(args, [LibraryMethod("nearest", "nearest")])
    assert [row["method"] for row in rows] == ["exact weights", "nearest"] * 3
    measured = {(row["format"], row["per"]): row for row in rows[1::2]}
    int8, int4 = (measured["convrot_w4a4", f"row, {dtype} activations"] for dtype in ("int8", "int4"))
    nvfp4, exact = measured["nvfp4", "group"], rows[[row["format"] for row in rows].index("convrot_w4a4")]
    assert int8["embedding"] == int4["embedding"] and int8["SM 12.0"] == int4["SM 12.0"]
    assert int8["embedding"] < int8["SM 8.9"] == int8["SM 12.0"] < int4["SM 8.9"]
    assert nvfp4["embedding"] == nvfp4["SM 8.9"] == nvfp4["SM 9.0"] < nvfp4["SM 12.0"]
    assert exact["embedding"] == 0 < exact["SM 12.0"] < int8["SM 12.0"] and int8["median"] == 1
    assert "SM 8.9" in markdown({**environment(), "rows": rows})
