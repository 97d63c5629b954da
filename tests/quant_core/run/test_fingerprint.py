"""When a run is already done, and when its inputs have changed."""

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding import kernels
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.calibration import InMemoryCalibration
from learned_rounding.quant_core.errors import OutputExistsError, SourceError
from learned_rounding.quant_core.events import LayerFinished, RunStarted
from learned_rounding.quant_core.run import layer_task
from learned_rounding.quant_core.run.fingerprint import FileStates, has_fingerprint, run_fingerprint, run_key
from learned_rounding.quant_core.sources import SafetensorsFile, TensorSource


def made_layers(monkeypatch) -> list:
    """The weights that are quantized from here on."""
    made, real = [], layer_task.quantize_layer
    monkeypatch.setattr(
        layer_task,
        "quantize_layer",
        lambda layer, *args, **options: made.append(layer.weight) or real(layer, *args, **options),
    )
    return made


def test_the_same_run_again_does_nothing(model_file, tmp_path, listing, monkeypatch, sentences):
    source, out = model_file(), tmp_path / "out.safetensors"
    quantize_file(source, out)
    stamp, data = out.stat().st_mtime_ns, out.read_bytes()
    (tmp_path / ".out.safetensors.00ab12cd.partial").write_bytes(b"of a run that died")
    monkeypatch.setattr(layer_task, "quantize_layer", None)  # must not be asked for
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


@pytest.mark.posix(reason="an open file is renamed")
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


def test_a_finished_file_is_not_made_again_though_it_may_be_overwritten(model_file, tmp_path, monkeypatch):
    source, out = model_file(), tmp_path / "out.safetensors"
    quantize_file(source, out)
    made = made_layers(monkeypatch)
    assert quantize_file(source, out, overwrite=True).already_done
    assert not made


def test_file_of_another_kind_has_no_fingerprint(tmp_path):
    (tmp_path / "text").write_text("not a model")
    assert not has_fingerprint(tmp_path / "text", "a")
    assert not has_fingerprint(tmp_path / "text", None)


def test_output_of_a_run_has_its_fingerprint(model_file, tmp_path):
    source, out = model_file(), tmp_path / "out"
    quantize_file(source, out)
    with SafetensorsFile(source) as opened:
        expected = run_fingerprint(opened, Recipe(), None)
    assert has_fingerprint(out, expected)
    assert not has_fingerprint(out, f"{expected}0")


def test_calibration_and_model_are_part_of_the_fingerprint(model):
    source, known = TensorSource(model()), InMemoryCalibration({})
    assert run_fingerprint(source, Recipe(), known) is None  # statistics without a fingerprint
    known.fingerprint = "statistics"
    found = {
        run_fingerprint(source, Recipe(), None),
        run_fingerprint(source, Recipe(), known),
        run_fingerprint(source, Recipe(), known, "calls"),
    }
    assert len(found) == 3


def test_run_key_depends_on_fingerprint_layers_calibration_and_backend(tmp_path):
    (tmp_path / "statistics").write_text("of a layer")
    none, one = FileStates([]), FileStates([tmp_path / "statistics"])
    cpu, layers = torch.device("cpu"), {"a": {"format": "mxfp8"}}
    keys = [run_key("f", layers, one, cpu), run_key("g", layers, one, cpu), run_key("f", {}, one, cpu)]
    keys.append(run_key("f", layers, none, cpu))
    with kernels.using("reference"):
        keys.append(run_key("f", layers, one, cpu))
    assert len(set(keys)) == 5
    assert run_key(None, layers, one, cpu) is None


def test_replaced_input_is_not_a_written_one(tmp_path):
    """It is still read as it was when it was opened."""
    path, source = tmp_path / "input", TensorSource({})
    path.write_text("before")
    states = FileStates([path])
    assert states.check_unwritten(source)
    (tmp_path / "other").write_text("after, longer")
    os.replace(tmp_path / "other", path)
    assert not states.check_unwritten(source)


def test_written_input_is_an_error(tmp_path, sentences):
    path = tmp_path / "input"
    path.write_text("before")
    states = FileStates([path])
    path.write_text("after, longer")
    with sentences.raises(SourceError):
        states.check_unwritten(TensorSource({}, name="model"))
