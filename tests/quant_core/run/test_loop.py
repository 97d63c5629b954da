"""The loop over the tensors of a run: events, weights that cannot be quantized, statistics, and banks of experts."""

import itertools
import json
import math
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from learned_rounding.quant_core import Recipe, Report, quantize_file, quantize_tensors
from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics
from learned_rounding.quant_core.calibration.histogram import histogram
from learned_rounding.quant_core.errors import CalibrationError, NothingToQuantizeError
from learned_rounding.quant_core.events import LayerFinished, LayerKept, LayerStarted, RunFinished, RunStarted
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.quantize_bank import quantize_bank
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.run import layer_task
from learned_rounding.quant_core.run.loop import read_device
from learned_rounding.quant_core.sources import TensorSource

from .made_files import LINEARS, RECIPES, Stop, metadata_of, raw, working_threads


def test_removed_tensors_are_left_out_and_reported(layer_names, tmp_path):
    tensors = {name: torch.ones([min(side, 32) for side in shape]) for name, shape in layer_names("t5").items()}
    mark = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"  # by whose shape T5-XXL is known
    tensors |= {
        mark: torch.ones(10240, 32),
        "lm_head.weight": torch.ones(32, 32),
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(32, 32),
    }
    save_file(tensors, tmp_path / "t5.safetensors")
    events = []
    report = quantize_file(tmp_path / "t5.safetensors", tmp_path / "out.safetensors", on_event=events.append)
    removed = {kept.name for kept in report.kept if kept.removed}
    assert report.preset == "t5xxl"
    assert removed == {"lm_head.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"}
    assert removed == {event.name for event in events if isinstance(event, LayerKept) and event.removed}
    assert not removed & load_file(tmp_path / "out.safetensors").keys()


@dataclass
class RecordedRun:
    """A run of the made-up model to INT8 per row with its events."""

    tensors: dict[str, torch.Tensor]
    out: Path
    events: list
    report: Report

    def of(self, *kinds) -> list:
        return [event for event in self.events if isinstance(event, kinds)]


@pytest.fixture
def recorded_run(model, model_file, tmp_path):
    events, out = [], tmp_path / "out.safetensors"
    return RecordedRun(
        model(), out, events, quantize_file(model_file(), out, RECIPES["int8 row"], on_event=events.append)
    )


def test_first_and_last_events_are_those_of_the_run(recorded_run):
    assert isinstance(recorded_run.events[0], RunStarted)
    assert isinstance(recorded_run.events[-1], RunFinished)
    assert recorded_run.events[-1].report is recorded_run.report


def test_start_reports_source_recipe_and_sizes(recorded_run):
    first, tensors = recorded_run.events[0], recorded_run.tensors
    assert first.source == "model.safetensors"
    assert first.format == "int8_tensorwise"
    assert first.granularity == "row"
    assert first.preset == "none"
    assert first.rounding == "auto"
    assert first.layers == 6
    assert first.kept == len(tensors) - 6
    assert first.bytes_in == sum(tensor.nbytes for tensor in tensors.values())


def test_start_lists_all_matrices_with_the_reasons_of_unquantized_ones(recorded_run):
    plan = recorded_run.events[0].plan
    matrices = {
        name: tuple(tensor.shape)
        for name, tensor in recorded_run.tensors.items()
        if name.endswith(".weight") and tensor.ndim > 1
    }
    reasons = {event.name: event.reason for event in recorded_run.of(LayerKept)}
    assert len(matrices) > 6
    assert {layer.name: layer.shape for layer in plan} == matrices
    assert {layer.name: layer.kept for layer in plan} == {name: reasons.get(name, "") for name in matrices}


def test_each_layer_is_started_and_finished_before_the_next(recorded_run):
    layers = recorded_run.of(LayerStarted, LayerFinished)
    assert [type(event) for event in layers] == [LayerStarted, LayerFinished] * 6
    for index in range(6):
        started, finished = layers[2 * index : 2 * index + 2]
        assert started.index == index
        assert finished.index == index
        assert started.total == 6
        assert finished.total == 6
        assert started.name == finished.name
        assert started.shape == tuple(recorded_run.tensors[started.name].shape)
        assert finished.shape == started.shape
        assert recorded_run.events.index(finished) == recorded_run.events.index(started) + 1


def test_finished_layers_report_format_error_scale_and_bytes(recorded_run):
    written = load_file(recorded_run.out)
    for finished in recorded_run.of(LayerFinished):
        rows, columns = finished.shape
        scale = written[f"{finished.name.removesuffix('.weight')}.weight_scale"]
        assert finished.format == "int8_tensorwise"
        assert finished.granularity == "row"
        assert 0 < finished.weight_error < 0.02
        assert finished.scale == (scale.min().item(), scale.max().item())
        assert finished.bytes_in == recorded_run.tensors[finished.name].nbytes
        assert finished.bytes_out == rows * columns + 4 * rows + len('{"format":"int8_tensorwise","per_row":true}')


def test_all_other_tensors_are_reported_as_planned_and_unquantized(recorded_run):
    kept = recorded_run.of(LayerKept)
    quantized = {event.name for event in recorded_run.of(LayerFinished)}
    assert {event.name for event in kept} == set(recorded_run.tensors) - quantized
    assert all(event.reason for event in kept)
    assert all(event.planned for event in kept)
    assert not any(event.removed for event in kept)


def test_report_has_the_events_of_its_tensors(recorded_run):
    assert recorded_run.report.layers == recorded_run.of(LayerFinished)
    assert recorded_run.report.kept == recorded_run.of(LayerKept)
    assert recorded_run.report.rounding == "auto"


def test_times_are_finite_and_ascending(model_file, tmp_path):
    events = []
    report = quantize_file(model_file(), tmp_path / "out.safetensors", on_event=events.append)
    finished = [event for event in events if isinstance(event, LayerFinished)]
    for event in finished:
        assert all(math.isfinite(value) and value >= 0 for value in (event.seconds, event.elapsed, event.eta))
        assert event.seconds <= event.elapsed
    assert [event.elapsed for event in finished] == sorted(event.elapsed for event in finished)
    assert report.seconds >= finished[-1].elapsed


def test_the_last_layer_of_all_needs_no_more_time():
    events = []
    quantize_tensors({"a.weight": torch.ones(8, 8), "b.weight": torch.ones(8, 8)}, on_event=events.append)
    assert [event.eta == 0 for event in events if isinstance(event, LayerFinished)] == [False, True]


def test_state_dicts_send_the_same_events(model, model_file, tmp_path):
    """But for the check of the file, which a run sends only if it takes long."""

    def kinds(events):
        names = ((type(event).__name__, getattr(event, "name", "")) for event in events)
        return sorted(name for name in names if name[0] != "OutputChecked")

    one, two = [], []
    quantize_file(model_file(), tmp_path / "out.safetensors", on_event=one.append)
    quantize_tensors(model(), on_event=two.append)
    assert kinds(one) == kinds(two)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, ArithmeticError])
def test_an_error_inside_a_layer_leaves_nothing_behind(model_file, tmp_path, listing, monkeypatch, error):
    done = []

    def fail(*args, **options):
        if len(done) == 2:
            raise error
        done.append(1)
        return quantize_layer(*args, **options)

    monkeypatch.setattr(layer_task, "quantize_layer", fail)
    with pytest.raises(error):
        quantize_file(model_file(), tmp_path / "out.safetensors")
    assert listing() == ["model.safetensors"]
    assert working_threads() == []


def test_a_listener_that_fails_stops_the_run(model_file, tmp_path, listing):
    def listener(event):
        if isinstance(event, LayerFinished) and event.index == 3:
            raise Stop

    with pytest.raises(Stop):
        quantize_file(model_file(), tmp_path / "out.safetensors", on_event=listener)
    assert listing() == ["model.safetensors"]
    assert working_threads() == []


BAD = "blocks.0.mlp.0"


def test_a_layer_with_nan_stays_in_full_precision(model, tmp_path, sentences, subtests):
    tensors, source, out = model(), tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    for (kind, recipe), bad in zip(RECIPES.items(), itertools.cycle([math.nan, math.inf]), strict=False):
        with subtests.test(kind, bad=bad):
            tensors[f"{BAD}.weight"][3, 5] = bad
            save_file(tensors, source)
            report = quantize_file(source, out, recipe, overwrite=True)
            loaded = load(out.read_bytes())  # not mapped: Windows replaces no mapped file
            assert raw(loaded[f"{BAD}.weight"]) == raw(tensors[f"{BAD}.weight"])
            assert f"{BAD}.comfy_quant" not in loaded
            assert f"{BAD}.weight_scale" not in loaded
            assert BAD not in json.loads(metadata_of(out)["_quantization_metadata"])["layers"]
            assert verify_file(out).problems == []
            assert verify_file(out).layers == 5
            assert len(report.layers) == 5
            sentences(report.unplanned[0].reason)


def test_a_layer_with_nan_is_reported_as_unplanned(model):
    tensors, events = model(), []
    tensors[f"{BAD}.weight"][3, 5] = math.nan
    report = quantize_tensors(tensors, RECIPES["fp8 nearest"], on_event=events.append).report
    (kept,) = report.unplanned
    assert kept.name == f"{BAD}.weight"
    assert not kept.planned
    assert kept in events
    assert f"{kept.name}: {kept.reason}" in report.table()


def test_nan_in_a_tensor_that_is_not_quantized_is_not_reported(model):
    tensors = model()
    tensors["blocks.0.norm.weight"][0] = math.nan
    report = quantize_tensors(tensors).report
    assert report.unplanned == []
    assert len(report.layers) == 6


def test_a_model_of_nan_alone_is_damaged(tmp_path, listing, sentences):
    save_file({f"{name}.weight": torch.full((8, 8), float("nan")) for name in "ab"}, tmp_path / "in.safetensors")
    with sentences.raises(NothingToQuantizeError):
        quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert listing() == ["in.safetensors"]


def test_zero_weights_go_through(tmp_path):
    save_file({"a.weight": torch.zeros(8, 8), "b.weight": torch.ones(8, 8)}, tmp_path / "in.safetensors")
    report = quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert report.worst[-1].weight_error == 0
    assert verify_file(tmp_path / "out.safetensors").problems == []


def test_layers_that_a_calibration_knows_are_calibrated(model, model_file, tmp_path):
    tensors, layer = model(), "blocks.0.attn.qkv"
    inputs = torch.randn(300, 32, generator=torch.Generator().manual_seed(0)) + 0.3
    inputs = inputs @ torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    known = LayerStatistics(inputs.t() @ inputs / 300, None, inputs.mean(dim=0))
    events = []
    recipe = Recipe(format="int8_tensorwise", convrot=False, damping=0.02)
    report = quantize_file(
        model_file(), tmp_path / "q", recipe, calibration=InMemoryCalibration({layer: known}), on_event=events.append
    )
    made = {finished.name.removesuffix(".weight"): finished for finished in report.layers}
    assert report.rounding == "calibrated"
    assert made[layer].solver == "gptq"
    assert made[layer].gain < 0.8
    assert made[layer].output_error is not None
    assert all(made[other].output_error is None for other in LINEARS if other != layer)
    (corrected,) = [kept for kept in report.kept if "corrected" in kept.reason]
    assert corrected.name == f"{layer}.bias"
    assert {kept.name for kept in report.kept} | {f"{name}.weight" for name in LINEARS} == set(tensors)
    written = load_file(tmp_path / "q")
    decoded = written[f"{layer}.weight"].float() * written[f"{layer}.weight_scale"]
    before = inputs @ tensors[f"{layer}.weight"].float().t() + tensors[f"{layer}.bias"].float()
    after = inputs @ decoded.t() + written[f"{layer}.bias"].float()
    uncorrected = inputs @ decoded.t() + tensors[f"{layer}.bias"].float()
    assert (after - before).mean(dim=0).norm() < 0.5 * (uncorrected - before).mean(dim=0).norm()


class RecordingCalibration(InMemoryCalibration):
    """A calibration that notes which layers are looked up; ``broken`` is one whose statistics cannot be read."""

    def __init__(self, layers, broken=None):
        super().__init__(layers)
        self.read, self.threads, self._broken = [], set(), broken

    def layer_statistics(self, layer):
        self.read.append(layer)
        self.threads.add(threading.current_thread())
        if layer == self._broken:
            raise CalibrationError(f"The statistics of {layer} are damaged; calibrate again.")
        return super().layer_statistics(layer)


def test_statistics_are_read_by_a_thread_in_the_order_of_the_layers(model_file, tmp_path):
    known = RecordingCalibration({LINEARS[1]: LayerStatistics(torch.eye(32))})
    report = quantize_file(model_file(), tmp_path / "q", Recipe(), calibration=known)
    assert known.read == [finished.name.removesuffix(".weight") for finished in report.layers]
    assert threading.current_thread() not in known.threads


def test_statistics_that_cannot_be_read_end_the_run(model_file, tmp_path, listing):
    known = RecordingCalibration({}, broken=LINEARS[2])
    with pytest.raises(CalibrationError, match=LINEARS[2]):
        quantize_file(model_file(), tmp_path / "q", Recipe(), calibration=known)
    assert listing() == ["model.safetensors"]


def small_inputs(model_file, tmp_path, recipe: Recipe) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Activations that FP8 flushes to zero, and the file of a model with a calibration on them and on larger ones."""
    inputs = torch.randn(300, 32, generator=torch.Generator().manual_seed(0)) * 1e-3
    gram = inputs.t() @ inputs / 300
    small = LayerStatistics(gram, amax=inputs.abs().amax(0), histogram=histogram(inputs))
    usual = LayerStatistics(gram * 1e6, amax=inputs.abs().amax(0) * 1e3, histogram=histogram(inputs * 1e3))
    known = InMemoryCalibration({LINEARS[0]: small, LINEARS[3]: usual})
    quantize_file(model_file(), tmp_path / "q", recipe, calibration=known)
    assert verify_file(tmp_path / "q").problems == []
    return inputs, load_file(tmp_path / "q")


def input_scales(tensors) -> set[str]:
    return {name for name in tensors if name.endswith("input_scale")}


def test_activations_that_fp8_would_flush_get_a_scale(model_file, tmp_path):
    inputs, written = small_inputs(model_file, tmp_path, Recipe())
    assert input_scales(written) == {f"{LINEARS[0]}.input_scale"}
    scale = written[f"{LINEARS[0]}.input_scale"]
    assert scale.shape == ()
    assert scale.dtype is torch.float32
    quantized = (inputs / scale).to(torch.float8_e4m3fn).float()
    assert (quantized * scale - inputs).norm() < 0.03 * inputs.norm()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(full_precision_matmul=True),
        Recipe(format="float8_e4m3fn_rowwise"),
        Recipe(format="int8_tensorwise", convrot=False),
    ],
    ids=["decoded", "fp8 per row", "int8"],
)
def test_formats_without_static_activations_get_no_scale(model_file, tmp_path, recipe):
    _, written = small_inputs(model_file, tmp_path, recipe)
    assert input_scales(written) == set()


# Banks of experts: quantized expert by expert, written and reported as one layer


CPU = torch.device("cpu")
BANKS = [f"layers.{block}.mlp.experts.{name}_proj" for block in range(6) for name in ("gate_up", "down")]
MXFP8 = Recipe(format="mxfp8")
NVFP4 = Recipe(format="nvfp4", layer_config='{"_proj": "nvfp4"}')  # the first and the last block too


def statistics(channels: int = 64) -> LayerStatistics:
    x = torch.randn(256, channels, generator=torch.Generator().manual_seed(5)) * torch.logspace(0, -1, channels)
    return LayerStatistics(x.t() @ x / len(x), mean=x.mean(dim=0) + 1)


@pytest.mark.parametrize("recipe", [MXFP8, NVFP4], ids=["mxfp8", "nvfp4"])
def test_a_bank_is_one_layer_of_the_file(gpt_oss, tmp_path, recipe):
    tensors, events = gpt_oss(6), []
    save_file(tensors, tmp_path / "model.safetensors")
    report = quantize_file(tmp_path / "model.safetensors", tmp_path / "q.safetensors", recipe, on_event=events.append)
    made, codec = load_file(tmp_path / "q.safetensors"), make_codec(recipe.format.name)
    finished = {layer.name: layer for layer in report.layers}
    for layer in BANKS:
        weight, bias = tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]
        alone = quantize_bank(weight, bias, LayerStatistics(), codec, recipe.rounding, device=CPU)
        assert all(raw(made[name]) == raw(tensor) for name, tensor in alone.tensors(layer).items())
        event = finished[f"{layer}.weight"]
        assert event.shape == weight.shape
        assert event.note == "bank of 3 experts"
        assert event.format == codec.format.name
        assert event.weight_error == alone.weight_error
        assert event.scale == alone.scale_range
    started = [event.name for event in events if isinstance(event, LayerStarted)]
    assert len(started) == 12 + 6
    assert len(set(started)) == 12 + 6
    assert len(report.layers) == 12 + 6
    assert verify_file(tmp_path / "q.safetensors").problems == []
    assert f"{BANKS[0]}.weight 3×144×64" in report.table(worst=30)


def test_one_expert_with_nan_leaves_the_bank_unquantized(gpt_oss):
    tensors = gpt_oss(6)
    tensors[f"{BANKS[2]}.weight"][1, 2, 3] = torch.nan
    made = quantize_tensors(tensors, MXFP8)
    assert made.tensors[f"{BANKS[2]}.weight"].dtype is torch.bfloat16
    (kept,) = made.report.unplanned
    assert kept.name == f"{BANKS[2]}.weight"
    assert f"{BANKS[2]}.comfy_quant" not in made.tensors


def test_a_calibration_without_the_experts_is_reported(gpt_oss, sentences):
    known = InMemoryCalibration({"layers.2.self_attn.q_proj": statistics()})
    report = quantize_tensors(gpt_oss(6), NVFP4, calibration=known).report
    notes = {layer.note for layer in report.layers if "experts" in layer.name}
    assert {layer.output_error for layer in report.layers if "experts" in layer.name} == {None}
    sentences(*notes)


def test_statistics_of_a_bank_are_those_of_all_its_experts(gpt_oss, sentences):
    tensors, layer = gpt_oss(6), BANKS[4]
    made = quantize_tensors(tensors, NVFP4, calibration=InMemoryCalibration({layer: statistics()}))
    (finished,) = [event for event in made.report.layers if event.name == f"{layer}.weight"]
    assert finished.solver != "nearest"
    assert finished.gain < 1
    assert finished.output_error is not None
    assert not torch.equal(made.tensors[f"{layer}.bias"], tensors[f"{layer}.bias"])
    assert made.tensors[f"{layer}.bias"].shape == (3, 144)
    with pytest.raises(CalibrationError) as error:
        quantize_tensors(tensors, NVFP4, calibration=InMemoryCalibration({layer: statistics(32)}))
    sentences(error.value)


def test_mixed_precision_leaves_banks_to_eight_bits(gpt_oss):
    layers = {f"layers.{block}.self_attn.q_proj": statistics() for block in range(6)}
    recipe = Recipe(format="measured", target_size=0.0004)
    made = quantize_tensors(gpt_oss(6), recipe, calibration=InMemoryCalibration(layers))
    formats = {layer.name: layer.format for layer in made.report.layers}
    assert {formats[f"{layer}.weight"] for layer in BANKS} == {"int8_tensorwise"}
    assert made.report.choice.chosen[0] == sum(tensor.nbytes for name, tensor in made.tensors.items())


def test_experts_go_to_the_device_one_by_one(gpt_oss):
    source = TensorSource(gpt_oss(6))
    plan, gpu = MXFP8.plan(source), torch.device("meta")
    assert read_device(source, [plan], f"{BANKS[4]}.weight", gpu) == CPU
    assert read_device(source, [plan], "layers.2.self_attn.q_proj.weight", gpu) == gpu
    assert read_device(source, [plan], "norm.weight", gpu) == CPU
