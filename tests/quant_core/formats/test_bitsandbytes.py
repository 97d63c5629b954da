"""NF4 and FP4 of bitsandbytes: values of the specification, and tensors that contradict each other."""

import torch

from learned_rounding.quant_core.convert import DecodedSource
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.formats.bitsandbytes import decode
from learned_rounding.quant_core.sources import SafetensorsFile
from learned_rounding.tests.quant_core.formats.external_layers import (
    INNER,
    LAYER,
    OUT,
    bitsandbytes_4_bit,
    js,
    zeros,
)

STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
CONTRADICTIONS = {
    "no matrix": {STATE: js({"shape": [OUT * INNER], "blocksize": 64})},
    "another shape": {STATE: js({"shape": [OUT, INNER + 64], "blocksize": 64})},
    "negative": {STATE: js({"shape": [-OUT, -INNER], "blocksize": 64})},
    "huge blocks": {STATE: js({"shape": [OUT, INNER], "blocksize": 10**18})},
    "blocks of zero": {STATE: js({"shape": [OUT, INNER], "blocksize": 0})},
    "no JSON": {STATE: torch.full((40,), 7, dtype=torch.uint8)},
    "floats": {STATE: torch.ones(40)},
    "short table": {f"{LAYER}.weight.quant_map": torch.ones(8)},
    "values of 32 bits": {f"{LAYER}.weight": zeros(torch.int32, OUT * INNER // 2, 1)},
    "absmax without its state": {f"{LAYER}.weight.absmax": zeros(torch.uint8, OUT * INNER // 64)},
}


def test_tensors_that_contradict_each_other_are_refused(subtests, layer_file, sentences):
    tensors = bitsandbytes_4_bit()[0]
    for name, change in CONTRADICTIONS.items():
        with (
            subtests.test(name),
            SafetensorsFile(layer_file(tensors | change)) as opened,
            sentences.raises(SourceError),
        ):
            DecodedSource(opened)


TABLE = torch.linspace(-1, 1, 16)
PACKED = torch.tensor([[0x0F], [0x37]], dtype=torch.uint8)  # codes 0, 15, 3, 7


def test_the_first_value_of_a_byte_is_in_its_high_bits():
    state = js({"blocksize": 4, "shape": [2, 2]})
    parts = {"weight": PACKED, "absmax": torch.ones(1), "quant_map": TABLE, "quant_state": state}
    assert torch.equal(decode(parts, (2, 2)), TABLE[[0, 15, 3, 7]].view(2, 2))


def test_blocks_run_over_the_flattened_weight():
    state = js({"blocksize": 3, "shape": [2, 2]})
    parts = {"weight": PACKED, "absmax": torch.tensor([2.0, 5.0]), "quant_map": TABLE, "quant_state": state}
    expected = TABLE[[0, 15, 3, 7]] * torch.tensor([2.0, 2.0, 2.0, 5.0])
    assert torch.equal(decode(parts, (2, 2)), expected.view(2, 2))


def test_quantized_magnitudes_have_an_offset():
    state = js({"blocksize": 2, "nested_blocksize": 256, "nested_offset": 0.5, "shape": [2, 2]})
    parts = {
        "weight": PACKED,
        "quant_map": TABLE,
        "quant_state": state,
        "absmax": torch.tensor([1, 2], dtype=torch.uint8),
        "nested_quant_map": torch.arange(256.0),
        "nested_absmax": torch.tensor([3.0]),
    }
    expected = TABLE[[0, 15, 3, 7]] * torch.tensor([3.5, 3.5, 6.5, 6.5])
    torch.testing.assert_close(decode(parts, (2, 2)), expected.view(2, 2))
