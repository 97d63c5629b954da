"""Several outputs of one source in one run: what they share, and what concerns one of them."""

import errno
from collections import Counter
from dataclasses import replace

import pytest
import torch

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics
from learned_rounding.quant_core.errors import NothingToQuantizeError, OutputError, OutputExistsError
from learned_rounding.quant_core.events import LayerFinished, RunFinished
from learned_rounding.quant_core.output import SafetensorsWriter
from learned_rounding.quant_core.run.quantize import Target, quantize_files
from learned_rounding.quant_core.run.report import Report
from learned_rounding.quant_core.sources import open_source
from learned_rounding.quant_core.sources.source import CPU

from .made_files import LINEARS, RECIPES

NAMES = ("fp8 nearest", "int8 row", "int8 convrot", "int8 block")


class CountingSource:
    """A source that counts how often each tensor is read."""

    def __init__(self, source):
        self._source, self.reads = source, Counter()

    def __getattr__(self, name):
        return getattr(self._source, name)

    def read(self, name, device=CPU):
        self.reads[name] += 1
        return self._source.read(name, device)


def targets(folder, *names, **options) -> list[Target]:
    return [Target(folder / f"{name}.safetensors", RECIPES[name], **options) for name in names]


def calibration() -> InMemoryCalibration:
    return InMemoryCalibration(
        {layer: LayerStatistics(mean=torch.ones(80 if "2" in layer[-1] else 32)) for layer in LINEARS}
    )


def test_each_has_the_bytes_of_a_run_of_its_own(model_file, tmp_path):
    source, made = model_file(), targets(tmp_path / "together", *NAMES)
    quantize_files(source, made, device="cpu", general=True)
    for target in made:
        alone = tmp_path / "alone.safetensors"
        quantize_file(source, alone, target.recipe, device="cpu", general=True, overwrite=True)
        assert target.destination.read_bytes() == alone.read_bytes()


def test_each_tensor_is_read_once(model_file, tmp_path):
    with open_source(model_file()) as opened:
        source = CountingSource(opened)
        quantize_files(source, targets(tmp_path, *NAMES), device="cpu", general=True)
    assert set(source.reads.values()) == {1}


def test_each_has_a_report_and_events_of_its_own(model_file, tmp_path):
    events: dict[str, list] = {name: [] for name in NAMES[:2]}
    made = [
        replace(target, on_event=events[name].append)
        for name, target in zip(events, targets(tmp_path, *events), strict=True)
    ]
    reports = quantize_files(model_file(), made, device="cpu", general=True)
    for (name, found), report in zip(events.items(), reports, strict=True):
        assert isinstance(found[-1], RunFinished)
        assert found[-1].report is report
        assert {event.format for event in found if isinstance(event, LayerFinished)} == {RECIPES[name].format.name}


def test_an_output_that_exists_does_not_stop_the_others(model_file, tmp_path):
    made = targets(tmp_path, *NAMES[:2])
    made[0].destination.write_bytes(b"something else")
    exists, report = quantize_files(model_file(), made, device="cpu", general=True)
    assert isinstance(exists, OutputExistsError)
    assert isinstance(report, Report)
    assert made[0].destination.read_bytes() == b"something else"


def test_a_recipe_without_layers_does_not_stop_the_others(model_file, tmp_path):
    nothing = Target(tmp_path / "nothing.safetensors", Recipe(keep=(".",)))
    error, report = quantize_files(model_file(), [nothing, *targets(tmp_path, "int8 row")], device="cpu", general=True)
    assert isinstance(error, NothingToQuantizeError)
    assert isinstance(report, Report)


def test_what_is_done_is_left_in_place(model_file, tmp_path):
    source, made = model_file(), targets(tmp_path, *NAMES[:2])
    quantize_files(source, made[:1], device="cpu", general=True)
    before = made[0].destination.stat().st_mtime_ns
    reports = quantize_files(source, made, device="cpu", general=True)
    assert [report.already_done for report in reports] == [True, False]
    assert made[0].destination.stat().st_mtime_ns == before


def test_an_error_during_the_run_concerns_all_that_are_not_complete(model, model_file, tmp_path, listing):
    tensors = model()
    for layer in LINEARS:
        tensors[f"{layer}.weight"].fill_(float("nan"))
    made = targets(tmp_path, *NAMES[:2])
    errors = quantize_files(model_file(tensors=tensors), made, device="cpu", general=True)
    assert {type(error) for error in errors} == {NothingToQuantizeError}
    assert listing() == ["model.safetensors"]


@pytest.mark.parametrize("devices", ["cpu", pytest.param("cpu:0,cpu:1", marks=pytest.mark.soak)])
@pytest.mark.parametrize("tensor", ["first", "last"])
def test_an_output_that_cannot_be_written_does_not_stop_the_others(
    model_file, tmp_path, monkeypatch, listing, devices, tensor
):
    made, real, added = targets(tmp_path, *NAMES), SafetensorsWriter.add, []

    def add(writer, name, value):
        if writer._partial.path == made[1].destination:
            added.append(name)
            if tensor == "first" or len(added) == last:
                with writer._partial.access():
                    raise OSError(errno.ENOSPC, "No space left on device")
        return real(writer, name, value)

    source = model_file()
    quantize_file(source, tmp_path / "alone.safetensors", made[1].recipe, device="cpu", general=True)
    with open_source(tmp_path / "alone.safetensors") as alone:
        last = len(alone.tensors)
    monkeypatch.setattr(SafetensorsWriter, "add", add)
    results = quantize_files(source, made, device=devices, general=True)
    assert [type(result) for result in results] == [Report, OutputError, Report, Report]
    expected = {"model.safetensors", "alone.safetensors", *(target.destination.name for target in made)}
    assert set(listing()) == expected - {made[1].destination.name}


def test_where_no_output_can_be_written_each_has_its_error(model_file, tmp_path, monkeypatch, listing):
    def add(writer, name, value):
        with writer._partial.access():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "add", add)
    made = targets(tmp_path, *NAMES[:2])
    results = quantize_files(model_file(), made, device="cpu", general=True)
    assert [str(target.destination) in str(result) for target, result in zip(made, results, strict=True)] == [True] * 2
    assert listing() == ["model.safetensors"]


def test_two_targets_of_one_name_are_refused(model_file, tmp_path, sentences):
    made = targets(tmp_path, "int8 row", "int8 row")
    with sentences.raises(OutputError):
        quantize_files(model_file(), made, device="cpu", general=True)


def test_two_calibrations_are_refused(model_file, tmp_path):
    made = [replace(target, calibration=calibration()) for target in targets(tmp_path, *NAMES[:2])]
    with pytest.raises(ValueError, match="different calibrations"):
        quantize_files(model_file(), made, device="cpu", general=True)
