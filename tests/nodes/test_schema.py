"""What the page and other people's workflows rely on: ids, order of widgets, tooltips, search words."""

import json
from pathlib import Path

import pytest

from learned_rounding.quant_core.recipes.option_table import OPTION_TABLE

ALIASES = json.loads((Path(__file__).resolve().parents[2] / "web" / "search_aliases.json").read_text(encoding="utf-8"))
# Saved workflows hold node ids, input names and widget values by place: nothing here may change, new inputs come last.
INPUTS = {
    "LearnedRoundingLoadModel": "model clip_type requantize",
    "LearnedRoundingConfigure": "format granularity preset seed rounding keep heur full_precision_matrix_mult convrot target_size target_error "
    "block_formats layer_config bits linear_dtype card target_time options",
    "LearnedRoundingOptions": "optimizer num_iter lr lr_schedule early_stop top_p min_k max_k full_matrix weight_cost damping sweeps bias_correction "
    "calib_samples block_size smoothing beam_width",
    "LearnedRoundingQuantize": "source recipe calibration native_int8_kernels general devices",
    "LearnedRoundingSave": "quantized filename_prefix folder quality_card comparison",
    "LearnedRoundingCalibrate": "model positive negative latent_image seed steps cfg sampler_name scheduler samples keep tokens "
    "calibration vae sensitivity max_vram_gb replay_calls start_at_step end_at_step",
    "LearnedRoundingCalibrateText": "clip prompts keep seed tokens calibration sensitivity max_vram_gb replay_calls",
    "LearnedRoundingCompare": "reference compared positive negative latent_image seed steps cfg sampler_name scheduler vae",
    "LearnedRoundingCompareText": "reference compared prompts",
    "LearnedRoundingReport": "quantized",
    "LearnedRoundingInspect": "model",
    "LearnedRoundingSaveCalibration": "calibration filename_prefix save_calls",
    "LearnedRoundingLoadCalibration": "file",
    "LearnedRoundingLoadQuantized": "model clip_type",
}
WIDGETS_OF_RECIPE = ("LearnedRoundingConfigure", "LearnedRoundingOptions")
OUTPUTS = {
    "LearnedRoundingLoadModel": "source",
    "LearnedRoundingConfigure": "recipe",
    "LearnedRoundingOptions": "options",
    "LearnedRoundingQuantize": "MODEL CLIP quantized report",
    "LearnedRoundingSave": "path",
    "LearnedRoundingCalibrate": "calibration pictures summary latents",
    "LearnedRoundingCalibrateText": "calibration summary",
    "LearnedRoundingCompare": "reference compared plot report comparison",
    "LearnedRoundingCompareText": "plot report",
    "LearnedRoundingReport": "report picture",
    "LearnedRoundingInspect": "text",
    "LearnedRoundingSaveCalibration": "path",
    "LearnedRoundingLoadCalibration": "calibration",
    "LearnedRoundingLoadQuantized": "MODEL CLIP",
}
ADVANCED = {
    "LearnedRoundingLoadModel": {"clip_type", "requantize"},
    "LearnedRoundingLoadQuantized": {"clip_type"},
    "LearnedRoundingConfigure": {
        "rounding", "keep", "heur", "full_precision_matrix_mult", "target_error", "block_formats", "layer_config",
        "bits", "linear_dtype", "card", "target_time",
    },
    "LearnedRoundingQuantize": {"native_int8_kernels", "general", "devices"},
    "LearnedRoundingCalibrate": {"tokens", "max_vram_gb", "replay_calls", "start_at_step", "end_at_step"},
    "LearnedRoundingCalibrateText": {"tokens", "max_vram_gb", "replay_calls"},
    "LearnedRoundingSaveCalibration": {"save_calls"},
}  # fmt: skip


@pytest.fixture(scope="module")
def nodes(comfy):
    """Node id → its definition, as pages get it."""
    return {name: info for name, info in comfy.object_info().items() if name.startswith("LearnedRounding")}


def test_every_option_of_the_recipe_has_a_widget():
    """In Configure Quantization, or in Rounding Options if it is one of the rounding."""
    widgets = " ".join(INPUTS[node] for node in WIDGETS_OF_RECIPE).replace("matrix_mult", "matmul").split()
    assert [name for names in OPTION_TABLE.values() for name in names if name not in widgets] == []


def options(info):
    """Input → its options, in order."""
    return {name: spec[1] for group in ("required", "optional") for name, spec in info["input"].get(group, {}).items()}


def test_ids_and_their_order_are_frozen(nodes):
    assert {name: " ".join(options(info)) for name, info in nodes.items()} == INPUTS
    assert {name: " ".join(info["output_name"]) for name, info in nodes.items()} == OUTPUTS


def test_everything_has_a_tooltip_in_english(nodes):
    for name, info in nodes.items():
        tips = {
            **{key: spec.get("tooltip") for key, spec in options(info).items()},
            **dict(enumerate(info["output_tooltips"])),
        }
        assert info["description"].endswith((".", "?")), name
        assert {key: tip for key, tip in tips.items() if not (tip or "").endswith(".")} == {}, name
        assert info["category"] == "quantization/learned rounding"


def test_rare_options_are_advanced_and_every_node_is_found_by_what_people_search(nodes, host):
    if host.version.startswith("0.3."):
        assert not any(
            "search_aliases" in info or any("advanced" in spec for spec in options(info).values())
            for info in nodes.values()
        )
        return
    advanced = {
        name: {key for key, spec in options(info).items() if spec.get("advanced")} for name, info in nodes.items()
    }
    assert {name: keys for name, keys in advanced.items() if keys} == ADVANCED
    for name, info in nodes.items():
        assert info["search_aliases"] == [info["display_name"], *ALIASES[name]], name


def test_every_node_has_search_aliases_of_its_own():
    aliases = [alias for words in ALIASES.values() for alias in words]
    assert set(ALIASES) == set(INPUTS)
    assert all(ALIASES.values())
    assert len(set(aliases)) == len(aliases)
    assert aliases == [alias.lower() for alias in aliases]


def test_dependent_inputs_name_inputs_of_their_own_node(nodes):
    found = {
        (name, key): spec["matters_for"]
        for name, info in nodes.items()
        for key, spec in options(info).items()
        if "matters_for" in spec
    }
    assert {name for name, _ in found} == {"LearnedRoundingConfigure", "LearnedRoundingOptions"}
    assert len(found) > 10
    for (name, key), conditions in found.items():
        assert conditions, f"{name}: nothing makes {key} matter"
        assert {other for condition in conditions for other in condition} <= options(nodes[name]).keys()
        assert "default" in options(nodes[name])[key], "what pages send while it is hidden"
