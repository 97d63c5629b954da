"""File to file and state dict to state dict: content of the output, what a stopped run leaves, refusals, memory."""

import dataclasses
import errno
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file, quantize_tensors
from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics
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
    LayerStarted,
    OutputChecked,
    RunFinished,
)
from learned_rounding.quant_core.layer import Layer
from learned_rounding.quant_core.output import SafetensorsWriter, partial, verify_file
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.rounding import slabs
from learned_rounding.quant_core.run import io_threads
from learned_rounding.quant_core.run.quantize import output_name
from learned_rounding.tests.system import needs_symlinks

from .made_files import LINEARS, RECIPES, Stop, metadata_of, same, working_threads


def test_file_has_the_tensors_of_its_layers_and_the_others_unchanged(model, model_file, tmp_path, subtests):
    for label, recipe in RECIPES.items():
        with subtests.test(label):
            tensors, out = model(), tmp_path / "out.safetensors"
            quantize_file(model_file(), out, recipe, overwrite=True)
            expected = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in LINEARS}
            for layer in LINEARS:
                weight = tensors[f"{layer}.weight"]
                bias = tensors.get(f"{layer}.bias") if recipe.rounding.bias_correction else None
                codecs = recipe.format.codecs(weight.shape[1])
                expected |= quantize_layer(Layer(weight, bias), codecs, recipe.rounding, seed=recipe.seed).tensors(
                    layer
                )
            assert same(load_file(out), expected)
            assert verify_file(out).problems == []
            assert verify_file(out).layers == len(LINEARS)


def test_run_adds_the_output_and_leaves_the_source(model_file, tmp_path, listing):
    source = model_file()
    before = source.read_bytes()
    quantize_file(source, tmp_path / "out.safetensors", RECIPES["fp8 nearest"])
    assert listing() == ["model.safetensors", "out.safetensors"]
    assert source.read_bytes() == before


def test_report_has_sizes_layers_and_unquantized_tensors(model, model_file, tmp_path):
    tensors, out = model(), tmp_path / "out.safetensors"
    report = quantize_file(model_file(), out, RECIPES["fp8 nearest"])
    assert report.output == str(out)
    assert report.bytes_out == out.stat().st_size
    assert report.bytes_in == sum(tensor.nbytes for tensor in tensors.values())
    assert not report.already_done
    assert {layer.name for layer in report.layers} == {f"{layer}.weight" for layer in LINEARS}
    assert {kept.name for kept in report.kept} == tensors.keys() - {f"{layer}.weight" for layer in LINEARS}


@pytest.mark.parametrize("kind", ["int8 convrot", "int8 block", "e5m2 stochastic, synthetic bias"])
def test_state_dict_gives_what_its_file_gives(model, model_file, tmp_path, kind):
    made = quantize_tensors(model(), RECIPES[kind], metadata={"author": "me"})
    quantize_file(model_file(author="me"), tmp_path / "out.safetensors", RECIPES[kind])
    assert same(made.tensors, load_file(tmp_path / "out.safetensors"))
    of_file = metadata_of(tmp_path / "out.safetensors")
    assert made.metadata.keys() == of_file.keys()
    assert json.loads(made.metadata["_quantization_metadata"]) == json.loads(of_file["_quantization_metadata"])


def test_state_dict_is_not_changed(model):
    tensors = model()
    quantize_tensors(tensors, RECIPES["int8 convrot"])
    assert same(tensors, model())


def test_quantized_state_dict_is_a_valid_file(model, tmp_path):
    made = quantize_tensors(model(), RECIPES["int8 block"])
    save_file(made.tensors, tmp_path / "made.safetensors", made.metadata)
    assert verify_file(tmp_path / "made.safetensors").problems == []


# Stopping


@pytest.mark.soak
def test_cancelling_at_any_check_leaves_nothing_behind(model, model_file, tmp_path, listing, monkeypatch, subtests):
    """Slabs of one row: most checks are inside a layer."""
    monkeypatch.setitem(slabs._SLAB, "cpu", 32)
    tensors = {name: tensor for name, tensor in model().items() if not name.startswith("blocks.1.")}
    source, out = model_file(tensors=tensors), tmp_path / "new" / "out.safetensors"
    checks = []
    quantize_file(source, out, check=lambda: checks.append(None))
    total, finished = len(checks), out.read_bytes()
    assert total > 500
    places = [(1, True), (1, False), (2, False), (5, True), (total // 3, False), (total // 2, True), (total - 1, False)]
    for last, existing in [*places, (total, True), (total, False)]:
        with subtests.test(check=last, existing=existing):
            if existing:
                out.parent.mkdir(exist_ok=True)
                out.write_bytes(finished)
            else:
                out.unlink(missing_ok=True)
            left = iter([None] * (last - 1))

            def stop(left=left):
                if next(left, Stop) is Stop:
                    raise Stop

            with pytest.raises(Stop):
                quantize_file(source, out, Recipe(seed=last), overwrite=existing, check=stop)
            assert listing() == ["model.safetensors", *(["new/out.safetensors"] if existing else [])]
            assert not existing or out.read_bytes() == finished
            assert working_threads() == []


def test_a_source_that_breaks_off_leaves_nothing_behind(model_file, tmp_path, listing, monkeypatch):
    monkeypatch.setattr(io_threads, "_QUEUE", 0)  # else all of it is read before the first layer
    source = model_file()

    def cut(event):
        if isinstance(event, LayerStarted) and event.index == 0:
            os.truncate(source, 4000)

    with pytest.raises(SourceError, match=r"model\.safetensors ended early at tensor blocks\."):  # a thread reads ahead
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


# Refusals


def test_nothing_to_quantize(tmp_path, listing, sentences):
    save_file({"norm.weight": torch.zeros(8), "a.bias": torch.zeros(8)}, tmp_path / "in.safetensors")
    with sentences.raises(NothingToQuantizeError):
        quantize_file(tmp_path / "in.safetensors", tmp_path / "new" / "out.safetensors")
    assert listing() == ["in.safetensors"]


def test_a_quantized_source_is_refused_by_the_name_of_its_format(model_file, tmp_path, listing, sentences, subtests):
    source, once = model_file(), tmp_path / "once.safetensors"
    for kind, recipe in RECIPES.items():
        with subtests.test(kind):
            quantize_file(source, once, dataclasses.replace(recipe, rounding="nearest"), overwrite=True)
            with sentences.raises(AlreadyQuantizedError):
                quantize_file(once, tmp_path / "twice.safetensors")
            with sentences.raises(AlreadyQuantizedError):
                quantize_tensors(load(once.read_bytes()))  # not mapped: Windows replaces no mapped file
            assert listing() == ["model.safetensors", "once.safetensors"]


@needs_symlinks
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_itself_is_no_output(model_file, tmp_path, listing, monkeypatch, overwrite, sentences, subtests):
    source, alias = model_file(), tmp_path / "alias.safetensors"
    before = source.read_bytes()
    monkeypatch.chdir(tmp_path)
    for kind, out in {
        "itself": source,
        "relative": Path("model.safetensors"),
        "symlink": alias,
        "hard link": alias,
    }.items():
        with subtests.test(kind):
            if kind == "symlink":
                alias.symlink_to(source)
            elif kind == "hard link":
                os.link(source, alias)
            files = listing()
            with sentences.raises(OutputError):
                quantize_file(source, out, overwrite=overwrite)
            assert source.read_bytes() == before
            assert listing() == files
            alias.unlink(missing_ok=True)


def test_a_folder_is_no_output(model_file, tmp_path, sentences):
    with sentences.raises(OutputError):
        quantize_file(model_file(), tmp_path)


def test_a_device_that_is_not_there(model_file, tmp_path, listing, sentences, subtests):
    for device in ["cuda:99", "nonsense", "meta"]:
        with subtests.test(device):
            with sentences.raises(QuantizationError):
                quantize_file(model_file(), tmp_path / "out.safetensors", device=device)
            assert listing() == ["model.safetensors"]


def test_a_missing_source(tmp_path, listing, sentences):
    with sentences.raises(SourceError):
        quantize_file(tmp_path / "none.safetensors", tmp_path / "new" / "out.safetensors")
    assert listing() == []


# Running again


def test_the_check_of_the_file_is_an_event(tmp_path, model_file, monkeypatch):
    real, events = SafetensorsWriter.finish, []

    def finish(self, metadata=None, on_check=lambda done, total: None) -> int:
        on_check(1, 2)
        return real(self, metadata)

    monkeypatch.setattr(SafetensorsWriter, "finish", finish)
    quantize_file(model_file(), tmp_path / "out", on_event=events.append)
    assert [type(event) for event in events[-2:]] == [OutputChecked, RunFinished]
    assert events[-2].total == 2


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


@pytest.fixture
def wide_model(tmp_path):
    """A file with layers that are large enough for several threads."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(300, 400, generator=generator).to(torch.bfloat16) for name in "abc"}
    save_file(tensors | {"odd": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def assert_same_bytes(source: Path, recipe: Recipe, numbers_of_threads) -> None:
    before, results = torch.get_num_threads(), set()
    try:
        for threads in numbers_of_threads:
            torch.set_num_threads(threads)
            quantize_file(source, source.with_name("out"), recipe)
            results.add(source.with_name("out").read_bytes())
            source.with_name("out").unlink()
    finally:
        torch.set_num_threads(before)
    assert len(results) == 1


@pytest.mark.parametrize("kind", ["fp8", "int8 block"])
def test_same_bytes_on_one_thread_and_on_two(wide_model, kind):
    assert_same_bytes(wide_model, RECIPES[kind], (1, 2))


@pytest.mark.soak
def test_same_bytes_of_every_recipe_in_every_run_on_any_number_of_threads(wide_model, subtests):
    for kind, recipe in RECIPES.items():
        with subtests.test(kind):
            assert_same_bytes(wide_model, recipe, (1, 2, 2))


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


@pytest.mark.soak
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


@pytest.mark.soak
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


@pytest.mark.soak
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


def test_a_calibration_that_does_not_fit_is_named(model_file, tmp_path, listing, sentences):
    known = InMemoryCalibration({LINEARS[0]: LayerStatistics(torch.eye(31))})
    with sentences.raises(CalibrationError):
        quantize_file(model_file(), tmp_path / "q", Recipe(), calibration=known)
    with sentences.raises(RecipeError):
        quantize_file(model_file(), tmp_path / "q", Recipe(rounding="calibrated"))
    assert listing() == ["model.safetensors"]
