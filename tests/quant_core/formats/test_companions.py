"""Tensors beside quantized values: those that change what the values mean are found, others are not."""

import pytest
import torch

from learned_rounding.quant_core.convert import DecodedSource, migrate_file
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.formats.companions import (
    PACKED_DTYPES,
    find_unknown_companions,
    is_weight_scale,
    is_zero,
)
from learned_rounding.quant_core.formats.external import find_external
from learned_rounding.quant_core.formats.kinds import quantized_formats
from learned_rounding.quant_core.output import inspect_file
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo, TensorSource
from learned_rounding.tests.architectures import architectures, read
from learned_rounding.tests.quant_core.formats.external_layers import (
    E4M3,
    INNER,
    LAYER,
    OUT,
    PER_ROW,
    TORCHAO_INT8,
    below,
    torchao_int8,
    zeros,
)


class Header:
    """Names, dtypes and shapes alone."""

    name, metadata = "model", {}

    def __init__(self, tensors):
        self.tensors = tensors


def test_tensors_below_a_quantized_layer_are_companions(subtests):
    for key in ("weight_zero_point", "smooth_scale", "weight_rotation.matrix", "lora_A.weight", "g_idx"):
        source = TensorSource(below(PER_ROW) | {f"{LAYER}.{key}": torch.ones(3)})
        with subtests.test(key):
            assert find_unknown_companions(source, (), ()) == {f"{LAYER}.{key}": f"{LAYER}.weight"}


def test_tensors_that_belong_to_a_format_are_no_companions():
    source = TensorSource(below(PER_ROW) | {f"{LAYER}.smooth_scale": torch.ones(3)})
    assert find_unknown_companions(source, (), {f"{LAYER}.smooth_scale"}) == {}


def test_scales_that_the_json_names_are_no_companions_of_declared_layers():
    source = TensorSource(below(PER_ROW) | {f"{LAYER}.pre_quant_scale": torch.ones(3)})
    assert find_unknown_companions(source, {LAYER}, ()) == {}
    assert find_unknown_companions(source, (), ()) == {f"{LAYER}.pre_quant_scale": f"{LAYER}.weight"}


def test_zero_points_of_zero_are_no_companions(subtests, layer_file):
    """compressed-tensors and torchao write them for symmetric quantization too."""
    for dtype in (torch.int8, torch.bfloat16, E4M3):
        path = layer_file(below(PER_ROW | {"weight_zero_point": zeros(dtype, OUT, 1)}))
        with subtests.test(str(dtype)), SafetensorsFile(path) as opened:
            assert DecodedSource(opened).layers == {"int8_tensorwise per row": 1}


def test_zero_points_are_zero_only_if_all_are():
    source = TensorSource({"zeros": zeros(torch.int8, 4), "some": torch.tensor([0, 1], dtype=torch.int8)})
    assert is_zero(source, "zeros")
    assert not is_zero(source, "some")


def test_smoothing_factors_of_torchao_are_companions(layer_file, sentences):
    """Its activations are multiplied by ``act_pre_scale``, so the weight alone is another one."""
    tensors = torchao_int8()[0] | {f"{LAYER}._weight_act_pre_scale": torch.full((INNER,), 2.0)}
    path = layer_file(tensors, TORCHAO_INT8)
    assert inspect_file(path).quantized == {"an unknown quantization": 1}
    with SafetensorsFile(path) as opened, sentences.raises(SourceError):
        DecodedSource(opened)
    with sentences.raises(SourceError):
        migrate_file(path, path.with_name("new.safetensors"))


def test_scales_of_activations_and_caches_are_no_companions(layer_file):
    harmless = {key: torch.ones(()) for key in ("input_scale", "output_scale", "k_scale", "v_scale")}
    with SafetensorsFile(layer_file(below(PER_ROW | harmless))) as opened:
        assert DecodedSource(opened).layers == {"int8_tensorwise per row": 1}


def find_any_companions(names: list[str]) -> dict[str, object]:
    """{architecture: companions found in a file of FP8 layers beside full precision, or in one cast to FP8 as a whole}."""
    found = {}
    for architecture in names:
        shapes = {key: info.shape for key, info in read(architecture).items()}
        layers = {key.removesuffix(".weight") for key in shapes if key.endswith(".weight")}
        matrices = {key for key, shape in shapes.items() if key.endswith("weight") and len(shape) == 2}
        named = [key for key in shapes if is_weight_scale(key, layers)]
        for quantized in (matrices, shapes.keys()):
            dtypes = {key: E4M3 if key in quantized else torch.float32 for key in shapes}
            header = Header({key: TensorInfo(dtypes[key], shape) for key, shape in shapes.items()})
            companions = find_unknown_companions(header, (), ())
            if companions or named or (external := list(find_external(header))):
                found[architecture] = companions or named or external
    return found


def test_models_of_every_kind_have_no_companions_by_themselves():
    """Each tenth architecture; all of them below."""
    assert find_any_companions(architectures()[::10]) == {}


@pytest.mark.soak
def test_no_model_has_companions_by_itself():
    assert find_any_companions(architectures()) == {}


def test_long_names_are_searched_in_bounded_time():
    """A name of a million separators is cut at its last eight."""
    long = "_" * 1_000_000
    tensors = {"a.weight": TensorInfo(E4M3, (8, 8))} | {f"a.{long}{n}": TensorInfo(E4M3, (1,)) for n in range(20)}
    assert find_unknown_companions(Header(tensors), (), ()) == {}


def test_indices_are_no_packed_weights():
    assert torch.int64 not in PACKED_DTYPES
    tensors = {"attn.relative_position_index": torch.zeros(8, 8, dtype=torch.int64), "attn.logit_scale": torch.ones(4)}
    assert quantized_formats(TensorSource(tensors)) == []


def test_scales_of_a_weight_are_known_by_name_in_any_format(subtests):
    for name, expected in {
        "a.weight_scale": True,
        "a.scale_weight": True,
        "a.weight.absmax": True,
        "a.wscales": True,
        "a.weight_zero_point": True,
        "a.bias": False,
        "a.input_scale": False,
        "b.weight_scale": False,
    }.items():
        with subtests.test(name):
            assert is_weight_scale(name, {"a"}) is expected
