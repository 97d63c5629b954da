"""Memory that runs out at a layer: the layer is made with less, or the run ends with one sentence and the whole file or none."""

import errno
import gc
import math
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.errors import OutOfMemoryError, OutputError
from learned_rounding.quant_core.events import LayerFinished
from learned_rounding.quant_core.output import verify_file, writer
from learned_rounding.quant_core.run import layer_task
from learned_rounding.quant_core.sources import safetensors as reader
from learned_rounding.tests.faults.disk import Disk, failing

pytestmark = pytest.mark.soak

LAYERS = 8
NEAREST = Recipe(rounding="nearest", preset="none")


def _more_than_there_is():
    torch.empty(2**50)  # what torch itself says on a CPU


def _raising(error: Exception) -> Callable:
    def fail(*_, **__):
        raise error

    return fail


FAILURES = {
    "the GPU's": _raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "Python's": _raising(MemoryError()),
    "the driver's": _raising(getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory")),
    "torch's on a CPU": _more_than_there_is,
}
PLACES = {
    "a layer": (layer_task, "quantize_layer"),
    "a read": (reader.SafetensorsFile, "read"),
    "a write": (writer, "byte_views"),
}


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("place", PLACES)
def test_memory_runs_out_anywhere(one_case, monkeypatch, place, fail, often, tried, sentences):
    """At a layer, and in the threads that read ahead and write behind; nothing of a failed run stays in this process."""
    where, name = PLACES[place]
    real = getattr(where, name)
    points = random.Random(40).sample(range(LAYERS), often(2, LAYERS))
    for at in points:
        calls = []

        def failing(*args, at=at, calls=calls, **options):
            calls.append(1)
            if len(calls) > at:
                fail()
            return real(*args, **options)

        monkeypatch.setattr(where, name, failing)
        with sentences.raises(OutOfMemoryError, repeated=True):
            quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu")
        monkeypatch.undo()
        one_case.check(complete=False)
        one_case.again()
        one_case.clear()
    tried(f"out of memory at {place} (simulated)", len(points), "none, one sentence, next run works")


class Stop(Exception):
    """What a host raises to cancel."""


def _cancel(event):
    if isinstance(event, LayerFinished) and event.index == 4:
        raise Stop


def held() -> tuple[int, int, int]:
    """Threads of ours, open files, bytes of memory of this process, without what only Python's collector has still to find."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("learned-rounding")]
    for thread in threads:
        thread.join(timeout=60)
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return sum(thread.is_alive() for thread in threads), len(os.listdir("/proc/self/fd")), resident


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_runs_that_fail_give_back_what_they_took(tmp_path, monkeypatch, often, tried):
    """A model of 24 MB, cancelled, out of memory and on a full disk, again and again."""
    source, target, runs = tmp_path / "model.safetensors", tmp_path / "out.safetensors", often(6, 60)
    save_file({f"blocks.{index}.weight": torch.randn(1024, 1024) for index in range(6)}, source)

    def fail():
        with pytest.raises(Stop):
            quantize_file(source, target, NEAREST, device="cpu", on_event=_cancel)
        with Disk(6, failing(errno.ENOSPC)).under(), pytest.raises(OutputError):
            quantize_file(source, target, NEAREST, device="cpu")
        with monkeypatch.context() as patch, pytest.raises(OutOfMemoryError):
            patch.setattr(layer_task, "quantize_layer", _raising(MemoryError()))
            quantize_file(source, target, NEAREST, device="cpu")

    for _ in range(3):
        fail()
    threads, files, memory = held()
    for _ in range(runs):
        fail()
    threads_after, files_after, memory_after = held()
    assert threads == 0
    assert threads_after == 0
    assert files_after == files
    # the allocator's ups and downs; a tensor that stayed of each run would be 72 MB, or 720
    assert memory_after - memory < 48e6
    tried(
        "cancelled, out of memory and on a full disk, in one process", 3 * runs, "threads, files and memory given back"
    )


def test_it_is_one_line_for_people(one_case, monkeypatch, capsys, tried, sentences):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(layer_task, "quantize_layer", full)
    assert (
        main(["quantize", "-i", str(one_case.source), "-o", str(one_case.target), "--device", "cpu", "--general"]) == 1
    )
    sentences(capsys.readouterr().err.splitlines()[-1])
    one_case.check(complete=False)
    tried("out of memory on the command line", 1, "none, one sentence, next run works")


@pytest.mark.gpu
def test_a_capped_gpu_ends_whole_or_not_at_all(tmp_path, often, tried):
    """Layers of 32 MB under an allocator that is given less and less: fewer rows at a time, then the CPU, or our sentence.

    A cap of 4 MB is room for the driver's own first segment, so that the device counts as usable and what fails is a read or a layer.
    """
    source, target = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"blocks.{index}.weight": torch.randn(4096, 4096, generator=generator).bfloat16() for index in range(4)},
        source,
    )
    recipe, total = (
        Recipe(format="int8_tensorwise", convrot=False, preset="none"),
        torch.cuda.get_device_properties(0).total_memory,
    )
    quantize_file(source, target, recipe, device="cuda")
    expected, outcomes = load_file(target), Counter()
    target.unlink()
    for cap in torch.logspace(math.log10(600e6), math.log10(4e6), often(8, 40)).tolist():
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + cap) / total)
        try:
            quantize_file(source, target, recipe, device="cuda")
            outcomes["whole"] += 1
        except OutOfMemoryError:
            outcomes["none"] += 1
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        for thread in threading.enumerate():  # a read ahead that nobody takes any more ends by itself
            if thread.name.startswith("learned-rounding"):
                thread.join()
        gc.collect()  # an error holds on to the frames that it came through
        assert torch.cuda.memory_allocated() == held
        assert {path.name for path in tmp_path.iterdir()} <= {source.name, target.name}
        if target.exists():
            assert not verify_file(target).problems
            for name, tensor in load_file(target).items():
                if name.endswith(".weight"):  # on the CPU ties may fall otherwise
                    assert (tensor.int() - expected[name].int()).abs().max() <= 1
            target.unlink()
    assert set(outcomes) == {"whole", "none"}, outcomes
    quantize_file(source, target, recipe, device="cuda")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(target).items())
    tried(
        "a GPU whose allocator is capped, 600 MB down to 4 MB",
        sum(outcomes.values()),
        "whole, or none and one sentence; memory returned",
    )
