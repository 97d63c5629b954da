"""Quality cards: facts of the run and of the file, as Markdown."""

import pytest

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.comparison import Comparison, ModelCost
from learned_rounding.quant_core.run.quality_card import make_quality_card
from learned_rounding.quant_core.run.report import Report


@pytest.fixture
def made(model_file, tmp_path):
    """made(recipe fields) → (report, path of the output)."""

    def make(**recipe):
        path = tmp_path / "small model_int8.safetensors"
        return quantize_file(model_file(), path, Recipe(**recipe)), path

    return make


def test_card_has_the_facts_of_the_run(made):
    report, path = made(format="int8_tensorwise", convrot=16)
    card = make_quality_card(report, [path])
    assert card.title == "small model_int8"
    assert card.bytes_out == path.stat().st_size
    rows = dict(card.rows)
    assert card.format == "int8_tensorwise per row, ConvRot 16"
    assert rows["layers"] == f"6 quantized, {len(report.kept)} other tensors unquantized"
    assert rows["weight error"].startswith("median ")
    assert "output error" not in rows
    assert rows["loads in"] == "Stock ComfyUI 0.27 and newer loads it."
    assert len(card.layers) == 6
    assert float(card.layers[0][2].split()[0]) >= float(card.layers[-1][2].split()[0])


def test_markdown_names_its_image_and_the_comparison(made):
    report, path = made(format="float8_e4m3fn")
    costs = ModelCost(2_000_000, 0.5, 0, 0), ModelCost(1_000_000, 0.25, 6, 6)
    comparison = Comparison("2 prompts", [{"PSNR (dB)": 40.0}], [[20.0]], costs)
    text = make_quality_card(report, [path], comparison).markdown("small model_int8.png")
    assert text.startswith("# small model_int8\n\n![Quality card](small%20model_int8.png)\n\n* **format**: ")
    assert "* **weight memory**: 2 MB → 1 MB\n" in text
    assert "* **time per step**: 0.5 s → 0.25 s\n" in text
    assert "## 2 prompts" in text
    assert "| prompt | PSNR (dB) |" in text
    assert "| 1 | 40.0 |" in text
    assert "| step" not in text
    assert "| blocks.0.attn.qkv.weight | 96×32 |" in text
    assert text.endswith(" |\n")


def test_card_of_a_run_that_was_already_done_has_no_layers(made):
    report, path = made(format="float8_e4m3fn")
    report = Report(report.source, report.format, report.granularity, "nearest", "none", already_done=True)
    card = make_quality_card(report, [path])
    assert card.format == "float8_e4m3fn per tensor"
    assert not card.layers
    assert "layers" not in dict(card.rows)
