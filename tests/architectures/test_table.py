"""docs/models.md against the plans of the listed models. The whole sweeps are in the soak tier."""

import pytest

from learned_rounding.quant_core import FORMATS
from learned_rounding.tests.architectures import architectures
from learned_rounding.tests.architectures.collect import TEXT_ENCODERS
from learned_rounding.tests.architectures.table import DOCUMENT, document, examine, row

# A model of linear layers, a U-Net, banks of experts, an embedding, no preset, nothing to quantize, widths of 2520.
FEW = ["wan_t2v_1_3b", "sd15", "gpt_oss_20b", "qwen3_06b", "triposplat", "omnigen2"]
BYTES_PER_VALUE = {  # with the scales of groups
    "nvfp4": 1 / 2 + 1 / 16,
    "mxfp8": 1 + 1 / 32,
    "asym_w4a8_int8": 1 / 2 + 1 / 16,
    "convrot_w4a4": 1 / 2,
}


@pytest.fixture(scope="module")
def models_document():
    return DOCUMENT.read_text(encoding="utf-8")


def test_document_has_the_rows_of_todays_plans(subtests, models_document):
    for name in [*FEW, "clip_l"]:
        with subtests.test(name):
            assert row(name) in models_document


@pytest.mark.soak
def test_document_is_the_whole_table(models_document):
    assert models_document == document()


def check_sizes(name: str) -> None:
    """Sizes as `lrq plan` estimates them: quantized weights by their format, the rest in 16 bits, scales and padding."""
    found = examine(name)
    assert found.sizes.keys() == FORMATS.keys()
    for format, size in found.sizes.items():
        value = BYTES_PER_VALUE.get(format, 1)
        expected = found.parameters * (2 - found.share * (2 - value))
        # In formats of fewer bits some layers take 8 bits, rotated, whose JSON is longer.
        most = found.sizes["int8_tensorwise"] * 1.001 if value < 1 else expected * 1.01
        assert expected < size < most, format


def test_sizes_are_those_of_the_formats(subtests):
    for name in FEW:
        with subtests.test(name):
            check_sizes(name)


@pytest.mark.soak
def test_sizes_of_all_models_are_those_of_the_formats(subtests):
    for name in filter(lambda name: examine(name).quantized, architectures()):
        with subtests.test(name):
            check_sizes(name)


def diffusion_models(names: list[str]) -> list[str]:
    """Those that a preset is for."""
    return [name for name in names if name not in TEXT_ENCODERS and examine(name).preset and examine(name).quantized]


def test_diffusion_models_have_the_same_decisions_in_a_checkpoint(subtests):
    for name in diffusion_models(FEW):
        with subtests.test(name):
            assert examine(name).checkpoint


@pytest.mark.soak
def test_all_diffusion_models_have_the_same_decisions_in_a_checkpoint(subtests):
    for name in diffusion_models(architectures()):
        with subtests.test(name):
            assert examine(name).checkpoint
