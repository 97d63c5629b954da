"""File to file and state dict to state dict: what comes out, what is said on the way, what a stopped run leaves."""

import errno
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file, quantize_tensors
from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics
from learned_rounding.quant_core.calibration.histogram import histogram
from learned_rounding.quant_core.errors import (
    AlreadyQuantizedError,
    CalibrationError,
    NothingToQuantizeError,
    OutputError,
    OutputExistsError,
    QuantizationError,
    RecipeError,
    SourceError,
)
from learned_rounding.quant_core.events import (
    LayerFinished,
    LayerKept,
    LayerStarted,
    OutputChecked,
    RunFinished,
    RunStarted,
)
from learned_rounding.quant_core.formats import find_format
from learned_rounding.quant_core.layer import Layer
from learned_rounding.quant_core.output import SafetensorsWriter, partial, verify_file
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.rounding import slabs
from learned_rounding.quant_core.run import io_threads, loop
from learned_rounding.quant_core.run.quantize import output_name
from learned_rounding.quant_core.run.recorded import RecordedSource
from learned_rounding.quant_core.sources import TensorSource

LINEARS = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("attn.qkv", "mlp.0", "mlp.2")]
RECIPES = {
    "fp8": Recipe(),
    "fp8 nearest": Recipe(rounding="nearest", full_precision_matmul=True),
    "int8 row": Recipe(format="int8_tensorwise", convrot=False),
    "int8 tensor": Recipe(format="int8_tensorwise", granularity="tensor"),
    "int8 convrot": Recipe(format="int8_tensorwise", convrot="auto"),
    "int8 block": Recipe(format="int8_blockwise", block_size=16),
    "fp8 row, principal": Recipe(format="float8_e4m3fn_rowwise", rounding="principal"),
    "fp8 block, steps": Recipe(format="float8_e4m3fn_blockwise", optimizer="adamw", num_iter=5),
    "e5m2 stochastic, synthetic bias": Recipe(
        format="float8_e5m2", rounding="stochastic", bias_correction="synthetic", calib_samples=4
    ),
}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        (left[name].dtype, left[name].shape, raw(left[name]))
        == (right[name].dtype, right[name].shape, raw(right[name]))
        for name in left
    )


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


class Stop(Exception):
    """What a host raises to cancel."""


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_file_is_quantized_layer_by_layer(model, model_file, tmp_path, listing, recipe):
    tensors, source, out = model(), model_file(), tmp_path / "out.safetensors"
    before = source.read_bytes()
    report = quantize_file(source, out, recipe)
    expected = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in LINEARS}
    for layer in LINEARS:
        weight = tensors[f"{layer}.weight"]
        bias = tensors.get(f"{layer}.bias") if recipe.rounding.bias_correction else None
        codecs = recipe.format.codecs(weight.shape[1])
        made = quantize_layer(Layer(weight, bias), codecs, recipe.rounding, seed=recipe.seed)
        expected |= made.tensors(layer)
    assert same(load_file(out), expected)
    assert verify_file(out).problems == []
    assert verify_file(out).layers == len(LINEARS)
    assert listing() == ["model.safetensors", "out.safetensors"]
    assert source.read_bytes() == before
    assert report.output == str(out)
    assert report.bytes_out == out.stat().st_size
    assert not report.already_done
    assert report.bytes_in == sum(tensor.nbytes for tensor in tensors.values())
    assert {layer.name for layer in report.layers} == {f"{layer}.weight" for layer in LINEARS}
    assert {kept.name for kept in report.kept} == expected.keys() & tensors.keys() - {
        f"{layer}.weight" for layer in LINEARS
    }


def _note(recipe: Recipe) -> set[str]:
    return {"note"} if find_format(recipe.format.name).stock_since is None else set()


def test_a_file_that_stock_comfyui_does_not_load_says_what_does(model_file, tmp_path):
    quantize_file(model_file(), tmp_path / "out.safetensors", Recipe(format="int8_blockwise"))
    assert "int8_blockwise" in metadata_of(tmp_path / "out.safetensors")["note"]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_state_dict_gives_what_its_file_gives(model, model_file, tmp_path, recipe):
    tensors = model()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    made = quantize_tensors(tensors, recipe, metadata={"author": "me"})
    quantize_file(model_file(author="me"), tmp_path / "out.safetensors", recipe)
    assert same(made.tensors, load_file(tmp_path / "out.safetensors"))
    of_file = metadata_of(tmp_path / "out.safetensors")
    assert made.metadata.keys() == {"author", "_quantization_metadata", "learned_rounding"} | _note(recipe)
    assert of_file.keys() == {"author", "_quantization_metadata", "learned_rounding"} | _note(recipe)
    assert json.loads(made.metadata["_quantization_metadata"]) == json.loads(of_file["_quantization_metadata"])
    assert same(tensors, before)
    save_file(made.tensors, tmp_path / "again.safetensors", made.metadata)
    assert verify_file(tmp_path / "again.safetensors").problems == []


def test_header_and_tensors_say_the_same(model, tmp_path):
    for prefix in ("", "model.diffusion_model."):
        save_file({prefix + name: tensor for name, tensor in model().items()}, tmp_path / "in.safetensors")
        quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", RECIPES["int8 row"], overwrite=True)
        header = json.loads(metadata_of(tmp_path / "out.safetensors")["_quantization_metadata"])
        tensors = load_file(tmp_path / "out.safetensors")
        beside = {
            name.removesuffix(".comfy_quant"): json.loads(raw(tensor))
            for name, tensor in tensors.items()
            if name.endswith(".comfy_quant")
        }
        assert beside == {prefix + layer: {"format": "int8_tensorwise", "per_row": True} for layer in LINEARS}
        assert header == {
            "format_version": "1.0",
            "layers": {**beside, **{layer: beside[prefix + layer] for layer in LINEARS}},
        }


def test_metadata_of_the_source_is_kept(model_file, tmp_path):
    own = {"format": "pt", "modelspec.title": "Ein Modell ß\U0001f600", "workflow": json.dumps({"a": [1, "\n"]})}
    quantize_file(model_file(**own), tmp_path / "out.safetensors")
    found = metadata_of(tmp_path / "out.safetensors")
    assert {key: found[key] for key in own} == own
    assert set(found) - set(own) == {"_quantization_metadata", "learned_rounding"}
    assert json.loads(found["learned_rounding"])["recipe"] == Recipe().to_dict()


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
    assert report.preset == "t5xxl"
    assert events[0].preset == "t5xxl"
    removed = {kept.name for kept in report.kept if kept.removed}
    assert removed == {"lm_head.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"}
    assert not removed & load_file(tmp_path / "out.safetensors").keys()
    assert removed == {event.name for event in events if isinstance(event, LayerKept) and event.removed}


# Events


def test_events_come_in_order(model, model_file, tmp_path):
    events = []
    report = quantize_file(model_file(), tmp_path / "out.safetensors", RECIPES["int8 row"], on_event=events.append)
    first, *middle, last = events
    tensors = model()
    assert isinstance(first, RunStarted)
    assert isinstance(last, RunFinished)
    assert last.report is report
    assert first.source == "model.safetensors"
    assert first.format == "int8_tensorwise"
    assert first.granularity == "row"
    assert first.preset == "none"
    assert first.layers == 6
    assert first.kept == len(tensors) - 6
    assert first.bytes_in == sum(tensor.nbytes for tensor in tensors.values())
    assert first.rounding == "auto"
    assert report.rounding == "auto"
    matrices = {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith(".weight") and tensor.ndim > 1
    }
    assert {layer.name: layer.shape for layer in first.plan} == matrices
    reasons = {event.name: event.reason for event in middle if isinstance(event, LayerKept)}
    assert all(layer.kept == reasons.get(layer.name, "") for layer in first.plan)
    assert len(matrices) > 6
    layers = [event for event in middle if isinstance(event, (LayerStarted, LayerFinished))]
    assert [type(event) for event in layers] == [LayerStarted, LayerFinished] * 6
    for index in range(6):
        started, finished = layers[2 * index : 2 * index + 2]
        assert started.index == index
        assert started.total == 6
        assert started.name == started.name
        assert started.shape == tuple(tensors[started.name].shape)
        assert finished.index == index
        assert finished.total == 6
        assert finished.name == started.name
        assert finished.shape == tuple(tensors[started.name].shape)
        assert middle.index(finished) == middle.index(started) + 1
        assert finished.format == "int8_tensorwise"
        assert finished.granularity == "row"
        assert 0 < finished.weight_error < 0.02
        scale = load_file(tmp_path / "out.safetensors")[f"{finished.name.removesuffix('.weight')}.weight_scale"]
        assert finished.scale == (scale.min().item(), scale.max().item())
        rows, columns = finished.shape
        assert finished.bytes_in == tensors[finished.name].nbytes
        assert finished.bytes_out == rows * columns + 4 * rows + len('{"format":"int8_tensorwise","per_row":true}')
    kept = [event for event in middle if isinstance(event, LayerKept)]
    assert len(kept) == len(tensors) - 6
    assert all(event.reason and event.planned and not event.removed for event in kept)
    assert {event.name for event in kept} | {event.name for event in layers} == set(tensors)
    assert report.layers == [event for event in middle if isinstance(event, LayerFinished)]
    assert report.kept == kept


def test_times_are_finite_and_end_at_zero(model_file, tmp_path):
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
    def kinds(events):
        return sorted((type(event).__name__, getattr(event, "name", "")) for event in events)

    one, two = [], []
    quantize_file(model_file(), tmp_path / "out.safetensors", on_event=one.append)
    quantize_tensors(model(), on_event=two.append)
    assert kinds(one) == kinds(two)


# Stopping


def working_threads() -> list[str]:
    """Our threads that do not end by themselves; one that was told to stop may need a moment."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("learned-rounding")]
    for thread in threads:
        thread.join(timeout=20)
    return [thread.name for thread in threads if thread.is_alive()]


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over an old file"])
def test_cancelling_at_any_check_leaves_nothing_behind(model_file, tmp_path, listing, monkeypatch, existing):
    """Slabs of one row: most checks lie inside a layer."""
    monkeypatch.setitem(slabs._SLAB, "cpu", 32)
    source, out = model_file(), tmp_path / "new" / "out.safetensors"
    total = 0

    def count():
        nonlocal total
        total += 1

    quantize_file(source, out, check=count)
    finished = out.read_bytes()
    assert total > 500
    for last in (1, 2, 5, total // 3, total // 2, total - 1, total):
        if not existing:
            out.unlink(missing_ok=True)
        calls = 0

        def stop(last=last):
            nonlocal calls
            calls += 1
            if calls >= last:
                raise Stop

        with pytest.raises(Stop):
            quantize_file(source, out, Recipe(seed=last), overwrite=existing, check=stop)
        assert listing() == (["model.safetensors", "new/out.safetensors"] if existing else ["model.safetensors"])
        assert not existing or out.read_bytes() == finished
        assert working_threads() == []


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, ArithmeticError])
def test_an_error_inside_a_layer_leaves_nothing_behind(model_file, tmp_path, listing, monkeypatch, error):
    done = []

    def fail(*args, **options):
        if len(done) == 2:
            raise error
        done.append(1)
        return quantize_layer(*args, **options)

    monkeypatch.setattr(loop, "quantize_layer", fail)
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


def test_a_source_that_breaks_off_leaves_nothing_behind(model_file, tmp_path, listing, monkeypatch, sentences):
    monkeypatch.setattr(io_threads, "_QUEUE", 0)  # else all of it is read before the first layer
    source = model_file()

    def cut(event):
        if isinstance(event, LayerStarted) and event.index == 0:
            os.truncate(source, 4000)

    with sentences.raises(SourceError):
        quantize_file(source, tmp_path / "out.safetensors", on_event=cut)
    assert listing() == ["model.safetensors"]
    assert working_threads() == []


def test_a_full_disk_leaves_nothing_behind(model_file, tmp_path, listing, monkeypatch, sentences):
    class Full:
        room = 9000

        def __init__(self, file):
            self._file = file

        def write(self, data):
            Full.room -= memoryview(data).nbytes
            if Full.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(data)

        def __getattr__(self, name):
            return getattr(self._file, name)

    source, real = model_file(), open
    monkeypatch.setattr(partial, "open", lambda *args, **options: Full(real(*args, **options)), raising=False)
    with sentences.raises(OutputError):
        quantize_file(source, tmp_path / "out.safetensors")
    assert listing() == ["model.safetensors"]
    assert working_threads() == []


# Weights that cannot be quantized


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_layer_with_nan_stays_in_full_precision(model, tmp_path, recipe, bad, sentences):
    tensors = model()
    tensors["blocks.0.mlp.0.weight"][3, 5] = bad
    save_file(tensors, tmp_path / "in.safetensors")
    events = []
    report = quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", recipe, on_event=events.append)
    loaded = load_file(tmp_path / "out.safetensors")
    assert raw(loaded["blocks.0.mlp.0.weight"]) == raw(tensors["blocks.0.mlp.0.weight"])
    assert "blocks.0.mlp.0.comfy_quant" not in loaded
    assert "blocks.0.mlp.0.weight_scale" not in loaded
    assert verify_file(tmp_path / "out.safetensors").problems == []
    assert verify_file(tmp_path / "out.safetensors").layers == 5
    assert len(report.layers) == 5
    (kept,) = report.unplanned
    assert kept.name == "blocks.0.mlp.0.weight"
    assert not kept.planned
    assert kept in events
    assert f"{kept.name}: {kept.reason}" in report.table()
    sentences(kept.reason)
    assert (
        "blocks.0.mlp.0"
        not in json.loads(metadata_of(tmp_path / "out.safetensors")["_quantization_metadata"])["layers"]
    )


def test_a_nan_in_a_tensor_that_is_kept_anyway_is_nobodys_concern(model, tmp_path):
    tensors = model()
    tensors["blocks.0.norm.weight"][0] = float("nan")
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


# Refusals


def test_nothing_to_quantize(tmp_path, listing, sentences):
    save_file({"norm.weight": torch.zeros(8), "a.bias": torch.zeros(8)}, tmp_path / "in.safetensors")
    with sentences.raises(NothingToQuantizeError):
        quantize_file(tmp_path / "in.safetensors", tmp_path / "new" / "out.safetensors")
    assert listing() == ["in.safetensors"]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_quantized_source_is_refused_by_the_name_of_its_format(model_file, tmp_path, listing, recipe, sentences):
    quantize_file(model_file(), tmp_path / "once.safetensors", recipe)
    with sentences.raises(AlreadyQuantizedError):
        quantize_file(tmp_path / "once.safetensors", tmp_path / "twice.safetensors")
    with sentences.raises(AlreadyQuantizedError):
        quantize_tensors(load_file(tmp_path / "once.safetensors"))
    assert listing() == ["model.safetensors", "once.safetensors"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("alias", ["itself", "relative", "symlink", "hard link"])
def test_the_source_itself_is_no_output(model_file, tmp_path, listing, monkeypatch, alias, overwrite, sentences):
    source = model_file()
    before = source.read_bytes()
    out = {"itself": source, "relative": Path("model.safetensors")}.get(alias, tmp_path / "alias.safetensors")
    if alias == "symlink":
        out.symlink_to(source)
    elif alias == "hard link":
        os.link(source, out)
    monkeypatch.chdir(tmp_path)
    with sentences.raises(OutputError):
        quantize_file(source, out, overwrite=overwrite)
    assert source.read_bytes() == before
    assert len(listing()) == (1 if alias in ("itself", "relative") else 2)


def test_a_folder_is_no_output(model_file, tmp_path, sentences):
    with sentences.raises(OutputError):
        quantize_file(model_file(), tmp_path)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_a_device_that_is_not_there(model_file, tmp_path, listing, device, sentences):
    with sentences.raises(QuantizationError):
        quantize_file(model_file(), tmp_path / "out.safetensors", device=device)
    assert listing() == ["model.safetensors"]


def test_a_missing_source(tmp_path, listing, sentences):
    with sentences.raises(SourceError):
        quantize_file(tmp_path / "none.safetensors", tmp_path / "new" / "out.safetensors")
    assert listing() == []


# Running again


def test_the_same_run_again_does_nothing(model_file, tmp_path, listing, monkeypatch, sentences):
    source, out = model_file(), tmp_path / "out.safetensors"
    quantize_file(source, out)
    stamp, data = out.stat().st_mtime_ns, out.read_bytes()
    (tmp_path / ".out.safetensors.00ab12cd.partial").write_bytes(b"of a run that died")
    monkeypatch.setattr(loop, "quantize_layer", None)  # must not be asked for
    report = quantize_file(source, out)
    assert report.already_done
    assert report.output == str(out)
    sentences(report.table())
    assert out.stat().st_mtime_ns == stamp
    assert out.read_bytes() == data
    assert listing() == ["model.safetensors", "out.safetensors"]


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(seed=1),
        Recipe(rounding="nearest"),
        Recipe(format="int8_tensorwise", convrot=False),
        Recipe(keep=("mlp",)),
    ],
    ids=["seed", "rounding", "format", "keep"],
)
def test_another_recipe_is_not_taken_for_the_same(model_file, tmp_path, recipe, sentences):
    source, out = model_file(), tmp_path / "out.safetensors"
    quantize_file(source, out)
    before = out.read_bytes()
    with sentences.raises(OutputExistsError):
        quantize_file(source, out, recipe)
    assert out.read_bytes() == before
    assert not quantize_file(source, out, recipe, overwrite=True).already_done
    assert quantize_file(source, out, recipe).already_done


def test_another_source_is_not_taken_for_the_same(model, model_file, tmp_path):
    out = tmp_path / "out.safetensors"
    quantize_file(model_file(), out)
    with pytest.raises(OutputExistsError):
        quantize_file(model_file("other.safetensors", model(seed=1)), out)
    renamed = (tmp_path / "model.safetensors").rename(tmp_path / "renamed.safetensors")
    assert quantize_file(renamed, out).already_done


def made_layers(monkeypatch) -> list:
    """The weights that are quantized from here on."""
    made, real = [], loop.quantize_layer
    monkeypatch.setattr(
        loop,
        "quantize_layer",
        lambda layer, *args, **options: made.append(layer.weight) or real(layer, *args, **options),
    )
    return made


TOUCHES = {
    "written": lambda path: os.utime(path, ns=(1, path.stat().st_mtime_ns + 1)),
    "copied": lambda path: (shutil.copy2(path, path.with_name("copy")), os.replace(path.with_name("copy"), path)),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_a_source_that_may_be_newer_is_quantized_again_and_compared(model_file, tmp_path, listing, monkeypatch, touch):
    source, out = model_file(), tmp_path / "out.safetensors"
    quantize_file(source, out)
    data, made = out.read_bytes(), made_layers(monkeypatch)
    touch(source)
    assert quantize_file(source, out).already_done
    assert made
    assert out.read_bytes() == data
    assert listing() == ["model.safetensors", "out.safetensors"]
    made.clear()
    assert quantize_file(source, out).already_done
    assert not made


def test_a_source_that_differs_where_no_sample_is_taken_is_another(tmp_path, monkeypatch, sentences):
    """In one value of a million, with the time of the file that was there before."""
    source, out, weight = tmp_path / "model.safetensors", tmp_path / "out.safetensors", torch.randn(1024, 1024)
    save_file({"a.weight": weight}, source)
    quantize_file(source, out, Recipe(rounding="nearest"))
    data, before = out.read_bytes(), source.stat()
    weight[5, 5] = 50.0
    save_file({"a.weight": weight}, tmp_path / "other")
    os.utime(tmp_path / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(tmp_path / "other", source)
    with sentences.raises(OutputExistsError):
        quantize_file(source, out, Recipe(rounding="nearest"))
    assert out.read_bytes() == data
    assert not quantize_file(source, out, Recipe(rounding="nearest"), overwrite=True).already_done
    assert out.read_bytes() != data


ASIDE = {
    "permissions": lambda path: path.chmod(0o600),
    "another name": lambda path: path.rename(path.with_name("renamed")).rename(path),
    "a second name": lambda path: path.with_name("second").hardlink_to(path),
}


@pytest.mark.parametrize("act", ASIDE.values(), ids=ASIDE)
def test_a_source_whose_change_time_alone_changes_is_read_again_and_compared(model_file, tmp_path, act):
    """Its content is the same: the run goes on."""
    source = model_file()
    quantize_file(source, tmp_path / "fresh")

    def listener(event):
        if isinstance(event, LayerFinished) and event.index == 1:
            act(source)

    report = quantize_file(source, tmp_path / "out", on_event=listener)
    assert report.layers
    assert (tmp_path / "out").read_bytes() == (tmp_path / "fresh").read_bytes()


@pytest.mark.parametrize(
    "kind, back", [(LayerFinished, 512 * 512 * 4 * 2 + 50_000), (RunStarted, 1)], ids=["read before", "not read yet"]
)
def test_a_source_that_is_changed_in_place_with_its_old_time_is_noticed(tmp_path, listing, sentences, kind, back):
    """``back``: bytes from the end, in the first tensor where no sample is taken, or in the last one's last sample."""
    source, weights = tmp_path / "model.safetensors", {f"{index}.weight": torch.ones(512, 512) for index in range(3)}
    save_file(weights, source)
    changes = []

    def listener(event):
        if isinstance(event, kind) and not changes:
            before = source.stat()
            with open(source, "r+b") as file:
                file.seek(-back, os.SEEK_END)
                changes.append(file.write(b"\x7b"))
            os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))

    with sentences.raises(SourceError):
        quantize_file(source, tmp_path / "out", Recipe(preset="none"), on_event=listener)
    assert changes
    assert listing() == ["model.safetensors"]


def test_a_source_that_gives_other_bytes_when_it_is_read_again_is_refused(sentences):
    tensors = {"a": torch.zeros(10), "b": torch.zeros(10)}
    source = RecordedSource(TensorSource(tensors))
    source.read("a"), source.read("b")
    source.check_unchanged(lambda: None)
    tensors["b"] += 1
    assert source.read("a").sum() == 0
    with sentences.raises(SourceError, repeated=True):
        source.read("b")
    with sentences.raises(SourceError, repeated=True):
        source.check_unchanged(lambda: None)


def test_the_check_of_the_file_is_an_event(tmp_path, model_file, monkeypatch):
    real, events = SafetensorsWriter.finish, []

    def finish(self, metadata, on_check) -> int:
        on_check(1, 2)
        return real(self, metadata)

    monkeypatch.setattr(SafetensorsWriter, "finish", finish)
    quantize_file(model_file(), tmp_path / "out", on_event=events.append)
    assert [type(event) for event in events[-2:]] == [OutputChecked, RunFinished]
    assert events[-2].total == 2


def test_a_finished_file_is_not_made_again_though_it_may_be_overwritten(model_file, tmp_path, monkeypatch):
    source, out = model_file(), tmp_path / "out.safetensors"
    quantize_file(source, out)
    made = made_layers(monkeypatch)
    assert quantize_file(source, out, overwrite=True).already_done
    assert not made


@pytest.mark.parametrize("content", [b"", b"some text that was here before", None], ids=["empty", "text", "a model"])
def test_files_of_others_are_not_overwritten_unasked(model, model_file, tmp_path, content):
    source, out = model_file(), tmp_path / "out.safetensors"
    save_file(model(), out) if content is None else out.write_bytes(content)
    before = out.read_bytes()
    with pytest.raises(OutputExistsError):
        quantize_file(source, out)
    assert out.read_bytes() == before
    quantize_file(source, out, overwrite=True)
    assert verify_file(out).problems == []


def test_leftovers_of_dead_runs_go_with_a_finished_one(model_file, tmp_path, listing):
    (tmp_path / ".out.safetensors.00ab12cd.partial").write_bytes(b"of a run that died")
    quantize_file(model_file(), tmp_path / "out.safetensors")
    assert listing() == ["model.safetensors", "out.safetensors"]


def test_outputs_are_named_after_the_recipe():
    assert output_name("a/b.v1.safetensors", Recipe().format.label) == Path("a/b.v1_float8_e4m3fn.safetensors")
    assert output_name("b.safetensors", Recipe(format="int8_tensorwise", convrot=False).format.label) == Path(
        "b_int8.safetensors"
    )


# The same bytes, and little memory


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_same_bytes_in_every_run_on_any_number_of_threads(tmp_path, recipe):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(300, 400, generator=generator).to(torch.bfloat16) for name in "abc"}
    save_file(tensors | {"odd": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "in.safetensors")
    before, results = torch.get_num_threads(), []
    try:
        for run, threads in enumerate((1, 2, 2)):
            torch.set_num_threads(threads)
            quantize_file(tmp_path / "in.safetensors", tmp_path / f"{run}.safetensors", recipe)
            results.append((tmp_path / f"{run}.safetensors").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[2]
    assert results[1] == results[2]


def child(code: str, *arguments, **environment) -> str:
    """Run a few lines of Python in a process of their own; returns what they print."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        cwd=os.path.expanduser("~"),
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_another_process_gives_the_same_bytes(model_file, tmp_path):
    source = model_file(author="me")
    quantize_file(source, tmp_path / "here.safetensors")
    code = "import sys; from learned_rounding.quant_core import quantize_file; quantize_file(*sys.argv[1:3])"
    child(code, source, tmp_path / "there.safetensors", OMP_NUM_THREADS="1", PYTHONHASHSEED="1")
    assert (tmp_path / "there.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()


MEGABYTE = 10**6
PEAK = """
import os, sys
os.fsync = lambda descriptor: None  # a slow disk makes a slow test
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.benchmarks.memory import peak_memory
quantize_file(sys.argv[1], sys.argv[2], Recipe(rounding="nearest"))
print(peak_memory())
"""


@pytest.fixture
def raw_model(tmp_path):
    """raw_model({name: (dtype, shape)}) → a file of zeros that takes no room on disk, and its size."""

    def make(specs):
        header, end = {}, 0
        for name, (dtype, shape) in specs.items():
            size = math.prod(shape) * 2
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        path = tmp_path / "large.safetensors"
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        return path, end

    return make


def test_a_file_far_larger_than_its_largest_tensor_needs_little_memory(tmp_path, raw_model):
    """Most are convolutions, which are only copied: that takes the same way and far less time."""
    rows, columns, count = 6000, 8000, 13
    largest = rows * columns * 2
    source, total = raw_model(
        {f"{index}.weight": ("BF16", (rows, columns, 1, 1) if index % 6 else (rows, columns)) for index in range(count)}
    )
    assert largest == 96 * MEGABYTE
    assert total > 1200 * MEGABYTE
    out = tmp_path / "out.safetensors"
    peak = int(child(PEAK, source, out))
    assert verify_file(out).layers == 3
    assert verify_file(out).problems == []
    out.unlink()
    assert peak <= 3 * largest + 400 * MEGABYTE, f"{peak / MEGABYTE:.0f} MB"


def test_banks_of_experts_need_no_more_memory_than_other_tensors(tmp_path, raw_model):
    """The source's bank, the next one, and the quantized tensors of two."""
    experts, rows, columns, count = 16, 1500, 2000, 8
    source, total = raw_model(
        {
            "layers.0.self_attn.sinks": ("BF16", (64,)),
            **{
                f"layers.{index}.mlp.experts.down_proj.weight": ("BF16", (experts, rows, columns))
                for index in range(count)
            },
        }
    )
    largest = experts * rows * columns * 2
    assert largest == 96 * MEGABYTE
    assert total > 760 * MEGABYTE
    out = tmp_path / "out.safetensors"
    peak = int(child(PEAK, source, out))
    assert verify_file(out).layers == count
    out.unlink()
    assert peak <= 3 * largest + 400 * MEGABYTE, f"{peak / MEGABYTE:.0f} MB"


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


def test_a_calibration_that_does_not_fit_is_named(model_file, tmp_path, listing, sentences):
    known = InMemoryCalibration({LINEARS[0]: LayerStatistics(torch.eye(31))})
    with sentences.raises(CalibrationError):
        quantize_file(model_file(), tmp_path / "q", Recipe(), calibration=known)
    with sentences.raises(RecipeError):
        quantize_file(model_file(), tmp_path / "q", Recipe(rounding="calibrated"))
    assert listing() == ["model.safetensors"]


@pytest.mark.parametrize(
    "recipe, scaled",
    [
        (Recipe(), True),
        (Recipe(full_precision_matmul=True), False),
        (Recipe(format="float8_e4m3fn_rowwise"), False),
        (Recipe(format="int8_tensorwise", convrot=False), False),
    ],
    ids=["fp8", "decoded", "fp8 per row", "int8"],
)
def test_inputs_that_fp8_would_flush_get_a_scale(model_file, tmp_path, recipe, scaled):
    inputs = torch.randn(300, 32, generator=torch.Generator().manual_seed(0)) * 1e-3
    gram = inputs.t() @ inputs / 300
    small = LayerStatistics(gram, amax=inputs.abs().amax(0), histogram=histogram(inputs))
    usual = LayerStatistics(gram * 1e6, amax=inputs.abs().amax(0) * 1e3, histogram=histogram(inputs * 1e3))
    known = InMemoryCalibration({LINEARS[0]: small, LINEARS[3]: usual})
    quantize_file(model_file(), tmp_path / "q", recipe, calibration=known)
    written = load_file(tmp_path / "q")
    found = {name for name in written if name.endswith("input_scale")}
    assert found == ({f"{LINEARS[0]}.input_scale"} if scaled else set())
    if scaled:
        scale = written[f"{LINEARS[0]}.input_scale"]
        assert scale.shape == ()
        assert scale.dtype is torch.float32
        codes = (inputs / scale).to(torch.float8_e4m3fn).float()
        assert (codes * scale - inputs).norm() < 0.03 * inputs.norm()
    assert verify_file(tmp_path / "q").problems == []


@pytest.mark.parametrize("suffix", ["weight_scale", "comfy_quant", "input_scale"])
def test_a_source_that_has_what_quantizing_makes_is_refused(tmp_path, listing, suffix, sentences):
    """The output would hold the name twice, or a scale that belongs to other codes."""
    save_file({"a.weight": torch.randn(16, 16), f"a.{suffix}": torch.ones(1)}, tmp_path / "model.safetensors")
    with sentences.raises(SourceError):
        quantize_file(
            tmp_path / "model.safetensors", tmp_path / "out.safetensors", Recipe(preset="none", rounding="nearest")
        )
    assert listing() == ["model.safetensors"]


@pytest.mark.parametrize(
    "suffix", ["scale_weight", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight._scale", "wscales"]
)
def test_a_weight_that_was_cast_without_its_scale_is_refused(suffix, sentences):
    """Quantized values in bfloat16 beside their scale, as of a tool that casts all tensors of an FP8 file."""
    tensors = {"a.weight": torch.randn(16, 16).bfloat16(), f"a.{suffix}": torch.full((1,), 0.5)}
    with sentences.raises(SourceError):
        quantize_tensors(tensors, Recipe(preset="none", rounding="nearest"))
