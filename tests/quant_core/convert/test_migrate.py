"""Migration: old and mislabelled files become sound ones, whose qdata mean what they meant."""

import json

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file, quantize_tensors
from learned_rounding.quant_core.calibration import CalibrationFile, InMemoryCalibration, LayerStatistics
from learned_rounding.quant_core.calibration.histogram import histogram
from learned_rounding.quant_core.convert.migrate import migrate_file
from learned_rounding.quant_core.errors import NothingToQuantizeError, OutputError, OutputExistsError, SourceError
from learned_rounding.quant_core.formats.layer_json import config_tensor, layer_configs
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.sources import SafetensorsFile

FP8, INT8 = torch.float8_e4m3fn, torch.int8


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qdata(dtype=FP8, out=64, inner=96):
    return (random(out, inner) * 20).round().clamp(-127, 127).to(dtype)


@pytest.fixture
def migrate(tmp_path):
    """migrate(tensors, metadata=None, **options) → (Migration, tensors of the new file, {layer: JSON} of its header)."""

    def run(tensors, metadata=None, **options):
        save_file(tensors, tmp_path / "old.safetensors", metadata)
        done = migrate_file(tmp_path / "old.safetensors", tmp_path / "new.safetensors", **options)
        assert verify_file(tmp_path / "new.safetensors").problems == []
        made = load((tmp_path / "new.safetensors").read_bytes())  # not mapped: Windows replaces no mapped file
        jsons = {
            name.rpartition(".")[0]: json.loads(value.numpy().tobytes())
            for name, value in made.items()
            if name.endswith("comfy_quant")
        }
        return done, made, jsons

    return run


def old_fp8(marker=0, prefix="", **more):
    layer = f"{prefix}blocks.0.mlp"
    return {
        f"{prefix}scaled_fp8": torch.zeros(marker, dtype=FP8),
        f"{layer}.weight": qdata(),
        f"{layer}.scale_weight": torch.tensor([0.02]),
        f"{layer}.bias": random(64).bfloat16(),
        f"{prefix}norm.weight": torch.ones(64),
        **{f"{layer}.{name}": value for name, value in more.items()},
    }


def test_old_scaled_fp8_gets_layer_json(subtests, migrate):
    for prefix in ["", "model.diffusion_model."]:
        for marker, full in [(0, False), (2, True)]:
            with subtests.test(prefix=prefix, marker=marker, full=full):
                done, _, jsons = migrate(old_fp8(marker, prefix), {"title": "x"}, overwrite=True)
                expected = {"format": "float8_e4m3fn"} | ({"full_precision_matrix_mult": True} if full else {})
                assert jsons == {f"{prefix}blocks.0.mlp": expected}
                assert done.layers.total() == 1


@pytest.mark.parametrize("marker, full", [(0, False), (2, True)])
def test_old_scaled_fp8_gets_the_names_of_today(migrate, marker, full):
    """An input scale is of no use to a layer in full precision."""
    _, made, _ = migrate(old_fp8(marker, scale_input=torch.tensor(0.5)))
    names = ("weight", "weight_scale", "bias", "comfy_quant", *([] if full else ["input_scale"]))
    assert set(made) == {*(f"blocks.0.mlp.{name}" for name in names), "norm.weight"}


def test_old_scaled_fp8_keeps_its_values(migrate):
    old = old_fp8()
    _, made, _ = migrate(old)
    assert torch.equal(made["blocks.0.mlp.weight"].view(torch.uint8), old["blocks.0.mlp.weight"].view(torch.uint8))
    assert torch.equal(made["blocks.0.mlp.bias"], old["blocks.0.mlp.bias"])


def test_old_scaled_fp8_keeps_its_scale_as_a_scalar(migrate):
    _, made, _ = migrate(old_fp8())
    assert made["blocks.0.mlp.weight_scale"].shape == ()
    assert float(made["blocks.0.mlp.weight_scale"]) == pytest.approx(0.02)


INPUT_SCALES = {
    "measured": (0.5, True),
    "of one element": ([0.5], True),
    "one": (1.0, False),
    "a copy of the weight's": (0.02, False),
    "of channels": ([0.5, 0.25], False),
}


def test_input_scales_stay_where_they_were_measured(subtests, migrate, sentences):
    for kind, (value, stays) in INPUT_SCALES.items():
        with subtests.test(kind):
            done, made, _ = migrate(old_fp8(scale_input=torch.tensor(value)), overwrite=True)
            assert ("blocks.0.mlp.input_scale" in made) is stays
            sentences(str(dict(done.changes)))


def test_input_scales_can_be_left_out(subtests, migrate, sentences):
    for value in [value for value, _ in INPUT_SCALES.values()]:
        with subtests.test(value=value):
            done, made, _ = migrate(old_fp8(scale_input=torch.tensor(value)), drop_input_scale=True, overwrite=True)
            assert "blocks.0.mlp.input_scale" not in made
            sentences(str(dict(done.changes)))


def test_input_scales_from_a_calibration(migrate, sentences):
    rows = random(256, 96, seed=3) * 4000
    known = InMemoryCalibration({"blocks.0.mlp": LayerStatistics(amax=rows.abs().amax(0), histogram=histogram(rows))})
    done, made, _ = migrate(old_fp8(scale_input=torch.tensor(0.5)), calibration=known)
    sentences(str(dict(done.changes)))
    assert float(made["blocks.0.mlp.input_scale"]) > 4


LABELS = [
    (FP8, (64, 1), "float8_e4m3fn", {"format": "float8_e4m3fn_rowwise"}),
    (FP8, (64,), "float8_e4m3fn", {"format": "float8_e4m3fn_rowwise"}),
    (FP8, (2, 3), "float8_e4m3fn", {"format": "float8_e4m3fn_blockwise", "group_size": 32}),
    (INT8, (4, 6), "int8_tensorwise", {"format": "int8_blockwise", "group_size": 16}),
    (INT8, (64, 1), "int8_blockwise", {"format": "int8_tensorwise", "per_row": True}),
    (INT8, (1,), "int8_tensorwise", {"format": "int8_tensorwise"}),
    (FP8, (), None, {"format": "float8_e4m3fn"}),
    (torch.float8_e5m2, (), None, {"format": "float8_e5m2", "full_precision_matrix_mult": True}),
    (torch.float8_e5m2, (), "float8_e5m2", {"format": "float8_e5m2", "full_precision_matrix_mult": True}),
]


def test_labels_follow_the_scales(subtests, migrate):
    for dtype, shape, label, expected in LABELS:
        with subtests.test(str(expected), shape=shape, label=label):
            old = {"a.weight": qdata(dtype), "a.weight_scale": random(*shape).abs() + 0.1}
            if label:
                old["a.comfy_quant"] = config_tensor({"format": label})
            _, made, jsons = migrate(old, overwrite=True)
            assert jsons == {"a": expected}
            assert torch.equal(made["a.weight_scale"].flatten(), old["a.weight_scale"].flatten())


def test_a_rotation_under_params_stays(migrate):
    old = {"a.weight": qdata(INT8), "a.weight_scale": torch.ones(64, 1)}
    config = {"format": "int8_tensorwise", "per_row": True, "params": {"convrot": True, "convrot_groupsize": 16}}
    _, _, jsons = migrate(old | {"a.comfy_quant": config_tensor(config)})
    assert jsons == {"a": {"format": "int8_tensorwise", "per_row": True, "convrot": True, "convrot_groupsize": 16}}


def header(**layers):
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


ROTATED = {"format": "int8_tensorwise", "per_row": True, "convrot": True, "convrot_groupsize": 16}
UNROTATED = {"format": "int8_tensorwise", "per_row": True}


@pytest.mark.parametrize(
    "by_header, by_tensor", [(ROTATED, UNROTATED), (UNROTATED, ROTATED)], ids=["rotated", "not rotated"]
)
def test_the_header_is_read_where_the_tensor_disagrees(migrate, by_header, by_tensor, sentences):
    """ComfyUI writes the header's JSON over the tensor."""
    old = {"a.weight": qdata(INT8), "a.weight_scale": torch.ones(64, 1), "a.comfy_quant": config_tensor(by_tensor)}
    done, _, jsons = migrate(old, header(a=by_header))
    assert jsons == {"a": by_header}
    sentences(str(dict(done.changes)))


def test_the_header_is_read_for_formats_of_others_too(tmp_path):
    other = {"format": "convrot_w4a4", "convrot_groupsize": 64}
    old = {
        "a.weight": qdata(),
        "a.weight_scale": torch.ones(()),
        "b.weight": torch.zeros(4, 4, dtype=INT8),
        "b.weight_scale": torch.ones(4),
    }
    save_file(
        old | {"b.comfy_quant": config_tensor(other | {"convrot_groupsize": 16})},
        tmp_path / "old.safetensors",
        header(b=other),
    )
    migrate_file(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    with SafetensorsFile(tmp_path / "new.safetensors") as opened:
        tensors, listed = layer_configs(opened)
    assert tensors["b"] == listed["b"] == other


def test_orphans_go_and_formats_of_others_stay(migrate, sentences):
    rotated = {"format": "int8_tensorwise", "per_row": True, "convrot": True, "convrot_groupsize": 16}
    old = {
        "a.weight": qdata(INT8),
        "a.weight_scale": torch.ones(64, 1),
        "a.comfy_quant": config_tensor(rotated),
        "gone.weight": random(8, 8),
        "gone.weight_scale": torch.ones(()),
        "gone.comfy_quant": config_tensor({"format": "float8_e4m3fn"}),
        "nothing.scale_input": torch.ones(()),
    }
    done, made, jsons = migrate(old)
    assert jsons["a"]["convrot_groupsize"] == 16
    sentences(str(dict(done.changes)))
    assert set(done.removed) == {"gone.weight_scale", "gone.comfy_quant", "nothing.scale_input"}
    assert {name for name in made if name.startswith(("gone", "nothing"))} == {"gone.weight"}


def test_each_part_of_a_checkpoint_has_its_own_mark(migrate):
    """ComfyUI takes two elements for full precision of the part that the mark stands in."""
    old = old_fp8(0, "model.diffusion_model.") | old_fp8(2, "text_encoders.t5xxl.transformer.")
    _, _, jsons = migrate(old)
    full = {layer: "full_precision_matrix_mult" in config for layer, config in jsons.items()}
    assert full == {"model.diffusion_model.blocks.0.mlp": False, "text_encoders.t5xxl.transformer.blocks.0.mlp": True}


AMBIGUOUS = [
    (
        {"a.weight": qdata(INT8, 64, 64), "a.weight_scale": torch.ones(64, 1)},
        {"format": "int8_tensorwise", "convrot": True},
    ),
    ({"a.weight": qdata(INT8), "a.weight_scale": torch.ones(())}, {"format": "int8_tensorwise", "convrot": True}),
    (
        {"a.weight": qdata(INT8, 200, 200), "a.weight_scale": torch.ones(2, 2)},
        {"format": "int8_blockwise", "group_size": 100},
    ),
    ({"a.weight": random(64, 64), "a.scale_weight": torch.tensor(0.5)} | old_fp8(), None),
    ({"a.weight": qdata(INT8)} | old_fp8(), None),
]


def test_what_would_not_be_what_was_meant_is_not_written(subtests, tmp_path, migrate, sentences):
    for number, (tensors, config) in enumerate(AMBIGUOUS):
        with subtests.test(str(config), number=number):
            with sentences.raises(SourceError):
                migrate({**tensors, **({"a.comfy_quant": config_tensor(config)} if config else {})})
            assert not (tmp_path / "new.safetensors").exists()


TWICE = [("weight_scale", "scale_weight"), ("input_scale", "scale_input")]


def test_a_scale_by_two_names_is_refused(subtests, tmp_path, migrate, sentences):
    """One of them would be chosen, and the other stay under a name that is written again."""
    for names in [*TWICE, *(pair[::-1] for pair in TWICE)]:
        with subtests.test(names=names):
            scales = {
                f"blocks.0.mlp.{name}": torch.tensor(value) for name, value in zip(names, (0.02, 3.0), strict=True)
            }
            layer = {"blocks.0.mlp.weight": qdata(), "blocks.0.mlp.weight_scale": torch.tensor(0.02)}
            with sentences.raises(SourceError):
                migrate(layer | scales)
            assert not (tmp_path / "new.safetensors").exists()


def test_fp8_without_a_scale_becomes_the_weights_it_stands_for(migrate, sentences):
    """ComfyUI uses such a layer as it is."""
    old = old_fp8() | {"plain.weight": qdata(), "plain.bias": random(64).to(FP8)}
    done, made, jsons = migrate(old)
    assert set(jsons) == {"blocks.0.mlp"}
    assert all(
        torch.equal(made[name], old[name].bfloat16()) and made[name].dtype is torch.bfloat16
        for name in ("plain.weight", "plain.bias")
    )
    sentences(str(dict(done.changes)))


def test_formats_of_others_stay_as_they_are(tmp_path):
    other = {"format": "nvfp4", "group_size": 16}
    old = {"a.weight": qdata(), "a.weight_scale": torch.ones(()), "b.weight": torch.zeros(4, 4, dtype=torch.uint8)}
    old |= {"b.comfy_quant": config_tensor(other), "b.weight_scale": torch.ones(4, 1).to(FP8)}
    save_file(old, tmp_path / "old.safetensors")
    migrate_file(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    made = load_file(tmp_path / "new.safetensors")
    assert all(
        torch.equal(made[name].view(torch.uint8), old[name].view(torch.uint8)) for name in old if name.startswith("b.")
    )
    assert (
        json.loads(SafetensorsFile(tmp_path / "new.safetensors").metadata["_quantization_metadata"])["layers"]["b"]
        == other
    )


def test_a_sound_file_stays_as_it_is(tmp_path, migrate):
    save_file(
        {"a.weight": random(64, 64).bfloat16(), "b.weight": random(64, 64, seed=1).bfloat16()},
        tmp_path / "model.safetensors",
    )
    quantize_file(
        tmp_path / "model.safetensors", tmp_path / "q.safetensors", Recipe(format="int8_tensorwise", convrot=16)
    )
    before = load_file(tmp_path / "q.safetensors")
    done, made, _ = migrate(before)
    assert not done.changes
    assert made.keys() == before.keys()
    assert all(torch.equal(made[name], before[name]) for name in before)


def test_an_unquantized_file_is_refused(migrate, sentences):
    with sentences.raises(NothingToQuantizeError):
        migrate({"a.weight": random(8, 8)})


def test_a_scale_that_does_not_fit_is_refused(tmp_path, migrate, sentences):
    with sentences.raises(SourceError):
        migrate({"a.weight": qdata(), "a.weight_scale": torch.ones(3, 5)})
    assert not (tmp_path / "new.safetensors").exists()


def test_an_output_that_exists_is_kept(migrate, sentences):
    migrate(old_fp8())
    with sentences.raises(OutputExistsError):
        migrate(old_fp8())


def test_an_output_that_exists_is_overwritten_where_that_is_asked_for(migrate):
    migrate(old_fp8())
    migrate(old_fp8(), overwrite=True)


def test_the_source_is_not_overwritten(tmp_path, migrate, sentences):
    migrate(old_fp8())
    with sentences.raises(OutputError):
        migrate_file(tmp_path / "old.safetensors", tmp_path / "old.safetensors", overwrite=True)


def test_the_calibration_is_not_overwritten(tmp_path, migrate, sentences):
    migrate(old_fp8())
    save_file({"blocks.0.mlp.gram": torch.eye(8)}, tmp_path / "x.calib.safetensors")
    before = (tmp_path / "x.calib.safetensors").read_bytes()
    with CalibrationFile(tmp_path / "x.calib.safetensors") as known, sentences.raises(OutputError):
        migrate_file(tmp_path / "old.safetensors", tmp_path / "x.calib.safetensors", calibration=known, overwrite=True)
    assert (tmp_path / "x.calib.safetensors").read_bytes() == before


@pytest.mark.parametrize("scale", [float("nan"), 2.0 + 0j], ids=["NaN", "complex"])
def test_a_refused_migration_leaves_what_was_there(tmp_path, migrate, sentences, scale):
    migrate(old_fp8())
    with sentences.raises(SourceError):
        migrate(old_fp8() | {"blocks.0.mlp.scale_weight": torch.tensor(scale)}, overwrite=True)
    assert verify_file(tmp_path / "new.safetensors").problems == []
    assert not list(tmp_path.glob(".*partial"))


def test_what_a_dead_run_left_behind_is_removed(tmp_path, migrate):
    leftover = tmp_path / ".new.safetensors.00ab12cd.partial"
    leftover.write_bytes(b"half a file")
    migrate(old_fp8())
    assert not leftover.exists()


@pytest.mark.parametrize("shared", [False, True])
def test_banks_of_experts_get_the_json_of_today(migrate, shared):
    """As ComfyUI writes them: without ``per_row``, and maybe with one scale for all experts."""
    weight = torch.stack([qdata(INT8), qdata(INT8)])
    scale = torch.tensor(0.5) if shared else random(2, 64, 1).abs()
    stock = {"format": "int8_tensorwise", "num_experts": 2}
    _, made, jsons = migrate({"a.weight": weight, "a.weight_scale": scale, "a.comfy_quant": config_tensor(stock)})
    assert torch.equal(made["a.weight"], weight)
    assert torch.equal(made["a.weight_scale"], torch.full((2,), 0.5) if shared else scale)
    assert jsons["a"] == {"format": "int8_tensorwise", **({} if shared else {"per_row": True}), "num_experts": 2}


def test_banks_of_declared_formats_are_copied(migrate, gpt_oss):
    before = quantize_tensors(gpt_oss(), Recipe(format="mxfp8", rounding="nearest", preset="none"))
    _, made, _ = migrate(before.tensors, before.metadata)
    assert made.keys() == before.tensors.keys()
    assert all(
        torch.equal(made[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in before.tensors.items()
        if tensor.dim()
    )
