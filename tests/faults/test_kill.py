"""Killed runs: their finished layers are resumed by the next run with the same key, and by no other."""

import contextlib
import errno
import json
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.errors import OutputExistsError
from learned_rounding.quant_core.events import LayerFinished, LayerKept, LayerStarted, RunResumed
from learned_rounding.quant_core.run import layer_task
from learned_rounding.quant_core.run.resume import JournalFile
from learned_rounding.quant_core.sources import TensorSource
from learned_rounding.tests.faults.conftest import make_case
from learned_rounding.tests.faults.disk import Disk, failing, in_memory, killed, processes, run

pytestmark = pytest.mark.soak

SEED = 20


def points(case) -> dict[str, int]:
    """How many operations of the disk, and looks at the check, a run has."""
    checks = []
    with Disk().under() as disk:
        quantize_file(case.source, case.target, case.recipe, device="cpu", check=lambda: checks.append(1))
    case.clear()
    return {"disk": len(disk.operations), "check": len(checks)}


def noted(folder: Path) -> list[str]:
    """Finished layers of killed runs, by their journals."""
    found = []
    for path in folder.glob(".*.journal"):
        with open(path, "rb") as file:
            found += [
                record["layer"]["events"][0][1]["name"]
                for record, _, _ in JournalFile(file).records()
                if "layer" in record
            ]
    return found


@pytest.fixture
def made(monkeypatch):
    """made → shapes of the weights that were quantized from here on."""
    shapes, real = [], layer_task.quantize_layer

    def quantize(layer, *args, **options):
        shapes.append(tuple(layer.weight.shape))
        return real(layer, *args, **options)

    monkeypatch.setattr(layer_task, "quantize_layer", quantize)
    return shapes


def test_killed_anywhere_the_next_run_ends_the_same(case, often, tried):
    draw, counts = random.Random(SEED), points(case)
    every = [("disk", at) for at in range(counts["disk"])]  # between any two writes, and in each
    others = [("check", draw.randrange(counts["check"])) for _ in range(often(10, 200))]
    tries = draw.sample(every, often(36, len(every))) + others
    for kind, at in tries:
        assert killed(case.source, case.target, case.recipe, kind, at)
        case.check()
        case.again()
        case.clear()
    tried("kill -9 at a random point, or in the middle of a write", len(tries), "whole or none")


def test_banks_of_experts_are_resumed_as_one_layer(tmp_path, often, tried):
    """Killed between two experts, the run quantizes the bank again, and not those before it."""
    generator, banks = torch.Generator().manual_seed(0), 4
    model = {"layers.0.self_attn.sinks": torch.ones(4)}
    for block in range(banks):
        model[f"layers.{block}.mlp.experts.down_proj.weight"] = torch.randn(30, 33, 17, generator=generator).bfloat16()
    case = make_case(tmp_path, Recipe(format="mxfp8", rounding="nearest"), model=model)
    checks, draw = points(case)["check"], random.Random(SEED)
    resumed = []
    tries = [checks - 2, *(draw.randrange(checks) for _ in range(often(6, 60)))]
    for at in tries:
        assert killed(case.source, case.target, case.recipe, "check", at)
        case.check()
        resumed.append(quantize_file(case.source, case.target, case.recipe, device="cpu").taken_up)
        case.again()
        case.clear()
    assert 0 < max(resumed) <= banks
    tried("kill -9 between two experts of a bank", len(tries), "whole or none; finished banks are resumed")


def test_killed_from_outside_at_a_random_time(one_case, often, tried):
    """SIGKILL by another process, at no point of the run's own choosing."""
    command = [
        sys.executable,
        "-m",
        "learned_rounding",
        "quantize",
        "--general",
        "-i",
        one_case.source,
        "-o",
        one_case.target,
        "--format",
        "int8_tensorwise",
        "--no-convrot",
        "--device",
        "cpu",
    ]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    whole, draw, killed_runs = time.perf_counter() - began, random.Random(SEED), 0
    expected = one_case.target.read_bytes()
    one_case.clear()
    count, folder = often(3, 60), one_case.target.parent
    for number in range(count):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started, until = time.perf_counter(), whole * draw.uniform(0.5, 1.0)  # the first half only imports torch
        while process.poll() is None:
            writes = any(path.suffix == ".partial" for path in folder.iterdir())
            # The first one as soon as it writes, however fast the machine is at the moment.
            if writes if number == 0 else time.perf_counter() - started > until:
                process.kill()
                killed_runs += 1
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.001)
        process.wait()
        assert not one_case.target.exists() or one_case.target.read_bytes() == expected
        subprocess.run(command, check=True, capture_output=True)
        assert one_case.target.read_bytes() == expected
        assert {path.name for path in one_case.target.parent.iterdir()} == {one_case.source.name, one_case.target.name}
        one_case.clear()
    assert killed_runs
    tried("kill -9 by another process at a random time", count, "whole or none")


_ENDING = """
import concurrent.futures.thread, sys, threading, time
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.events import LayerFinished

reached, over = threading.Event(), threading.Event()
concurrent.futures.ThreadPoolExecutor(1).submit(over.wait)  # Python ends when its threads have, and the run goes on till then

def on_event(event):
    if isinstance(event, LayerFinished) and event.index == 4:
        reached.set()
        while not concurrent.futures.thread._shutdown:
            time.sleep(0.01)

def work():
    try:
        quantize_file(sys.argv[1], sys.argv[2], Recipe.from_json(sys.argv[3]), device="cpu", on_event=on_event)
    finally:
        over.set()

threading.Thread(target=work, daemon=True).start()
reached.wait()
"""


def test_a_process_that_ends_below_a_run_leaves_it_to_the_next(case, tried):
    """As a server that is told to end: Python refuses threads more work while the run is still at it."""
    subprocess.run(
        [sys.executable, "-c", _ENDING, case.source, case.target, case.recipe.to_json()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    case.check(complete=False)
    events = []
    report = quantize_file(case.source, case.target, case.recipe, device="cpu", on_event=events.append)
    assert report.taken_up >= 3
    (place,) = (place for place, event in enumerate(events) if isinstance(event, RunResumed))
    restored = sum(isinstance(event, LayerFinished) for event in events[:place])
    assert events[place].layers == report.taken_up
    assert restored == report.taken_up
    assert events[place].total == report.layers[0].total
    assert all(event.elapsed >= events[place].elapsed for event in events[place:] if isinstance(event, LayerFinished))
    case.again()
    tried("the process ends in order in the middle of a run", 1, "goes on, same bytes")


def test_killed_again_and_again(case, often, tried):
    """Each run gets a little further than the one before, until one ends."""
    steps, deaths = often(32, 28), 0  # the end alone takes two dozen
    while killed(case.source, case.target, case.recipe, "disk", steps):
        case.check()
        deaths += 1
        assert deaths < 200
        if case.target.exists():  # it died with what it left behind still to be removed
            break
    assert deaths > 2
    case.check(complete=True)
    case.again()
    tried("kill -9 of each run after a few writes", deaths, "ends with the same bytes")


def test_finished_layers_are_not_made_again(case, made, often, tried):
    total = points(case)["disk"]
    made.clear()
    every = range(total // 2, total, often(9, 1))
    for at in every:
        assert killed(case.source, case.target, case.recipe, "disk", at)
        done, complete = noted(case.target.parent), case.target.exists()
        events = []
        quantize_file(case.source, case.target, case.recipe, device="cpu", on_event=events.append)
        assert complete or len(made) == 8 - sum(name.endswith(("qkv.weight", "mlp.weight")) for name in done)
        assert complete or len(done) > 5
        assert (
            complete
            or [type(event) for event in events if isinstance(event, (LayerStarted, LayerFinished))].count(
                LayerFinished
            )
            == 7
        )
        case.again()
        case.clear()
        made.clear()
    tried("kill -9 in the second half of a run", len(every), "no finished layer made again")


def test_the_report_is_that_of_one_run(case):
    reference = quantize_file(case.source, case.target, case.recipe, device="cpu")
    case.clear()
    assert killed(case.source, case.target, case.recipe, "disk", 40)
    taken_up = quantize_file(case.source, case.target, case.recipe, device="cpu")

    def said(report):
        untimed = [{**vars(layer), "seconds": 0, "elapsed": 0, "eta": 0} for layer in report.layers]
        return untimed, [kept for kept in report.kept if isinstance(kept, LayerKept)], report.bytes_in, report.bytes_out

    assert said(taken_up) == said(reference)


def test_a_power_cut_loses_what_was_not_on_the_disk(case, often, tried):
    """Parts of either file that no flush had reached may be missing, or zero."""
    draw, count = random.Random(SEED), often(12, 300)
    operations = points(case)["disk"]
    for _ in range(count):
        assert killed(case.source, case.target, case.recipe, "disk", draw.randrange(10, operations - 4))
        for path in case.target.parent.glob(".*"):
            size = path.stat().st_size
            begin = draw.randrange(size)
            if draw.random() < 0.3:
                os.truncate(path, begin)
            elif draw.random() < 0.5:
                with open(path, "r+b") as file:
                    file.seek(begin)
                    file.write(bytes(min(draw.randrange(1, 4096), size - begin)))
            elif draw.random() < 0.2:
                path.unlink()
        case.check(complete=False)
        case.again()
        case.clear()
    tried("power cut: unflushed parts of both files lost or zero", count, "whole or none")


def test_layers_that_a_flush_has_reached_survive_a_power_cut(one_case, made, often, tried):
    """Everything behind what the last finished flush found is lost, and the layers before it are not."""
    survived = []
    for at in random.Random(SEED).sample(range(50, 100), often(6, 40)):
        flushes = one_case.source.with_suffix(".flushes")
        assert killed(one_case.source, one_case.target, one_case.recipe, "disk", at, False, flushes)
        sure = dict(
            json.loads(line) for line in flushes.read_text().splitlines()
        )  # file → its size when its last flush began
        flushes.unlink()
        layers = len(noted(one_case.target.parent))
        for path in one_case.target.parent.glob(".*"):
            os.truncate(path, sure.get(path.name, 0))
        kept = noted(one_case.target.parent)
        survived.append(len(kept))
        assert layers - len(kept) <= 1  # of which the flush was under way
        made.clear()
        one_case.again()
        assert len(made) == 8 - sum(name.endswith(("qkv.weight", "mlp.weight")) for name in kept)
        one_case.clear()
    assert max(survived) > 8
    tried(
        "power cut: all that no flush has reached is lost",
        len(survived),
        "no layer made again that a flush had reached",
    )


def test_everything_is_on_the_disk_before_it_has_its_name(one_case):
    with Disk().under() as disk:
        quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu")
    end = disk.operations[-7:]
    assert end == [
        "write file",
        "fsync",
        "fsync",
        "link",
        "fsync",
        "unlink",
        "unlink",
    ]  # header, a flush during the check and one after it, the name, and that it lasts; hidden names go


def test_a_run_towards_another_name_goes_on_when_it_shares_that_of_the_hidden_files(one_case, tried):
    assert killed(one_case.source, one_case.target, one_case.recipe, "disk", 60)
    other = one_case.target.with_name("other.safetensors")
    report = quantize_file(one_case.source, other, one_case.recipe, device="cpu", unfinished=one_case.target.name)
    assert report.taken_up > 3
    assert other.read_bytes() == one_case.expected
    assert {path.name for path in other.parent.iterdir()} == {one_case.source.name, other.name}
    tried("the same run towards another name after kill -9", 1, "goes on, same bytes")


OTHERS = {
    "recipe": lambda case: (case.source, Recipe(rounding="nearest", seed=5)),
    "source": lambda case: (
        save_file({n: t + 1 for n, t in load_file(case.source).items()}, case.source),
        (case.source, case.recipe),
    )[1],
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_run_takes_nothing_over(one_case, made, change, tried):
    assert killed(one_case.source, one_case.target, one_case.recipe, "disk", 60)
    assert len(noted(one_case.target.parent)) > 5
    source, recipe = OTHERS[change](one_case)
    made.clear()
    quantize_file(source, one_case.target, recipe, device="cpu")
    assert len(made) == 8
    taken = one_case.target.read_bytes()
    quantize_file(source, one_case.target.with_name("fresh.safetensors"), recipe, device="cpu")
    assert taken == one_case.target.with_name("fresh.safetensors").read_bytes()
    assert not list(one_case.target.parent.glob(".*"))
    tried(f"another {change} after kill -9", 1, "nothing stale taken over")


@pytest.mark.parametrize("changed", [False, True], ids=["the same", "changed"])
def test_weights_in_memory_are_taken_up_when_they_are_the_dead_runs(tmp_path, changed, tried):
    """No file's state tells that they changed, and the fingerprint's samples, sixteen pages of each tensor, may all be the same."""
    source, target = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = {f"blocks.{index}.proj.weight": torch.randn(512, 512, generator=generator) for index in range(6)}
    save_file(weights, source)
    assert killed(source, target, Recipe(), "disk", 40, False, None, in_memory)
    assert len(noted(tmp_path)) > 2
    if changed:
        for weight in weights.values():
            weight[5] += 1  # between the first two pages
        save_file(weights, source)
    report = quantize_file(in_memory(source), target, device="cpu")
    assert (report.taken_up > 0) is not changed
    fresh = target.with_name("fresh.safetensors")
    quantize_file(in_memory(source), fresh, device="cpu")
    assert target.read_bytes() == fresh.read_bytes()
    tried(
        "weights in memory after kill -9, changed between sampled pages or not",
        1,
        "the same are resumed, no others",
    )


def test_weights_in_memory_that_changed_since_the_output_was_made_are_noticed(tmp_path, sentences):
    weights, target = (
        {"a.weight": torch.randn(512, 512, generator=torch.Generator().manual_seed(0))},
        tmp_path / "out.safetensors",
    )
    quantize_file(TensorSource(weights), target, device="cpu")
    assert quantize_file(TensorSource(weights), target, device="cpu").already_done
    weights["a.weight"][5] += 1
    with sentences.raises(OutputExistsError):
        quantize_file(TensorSource(weights), target, device="cpu")


def test_a_finished_file_is_left_alone_and_its_leftovers_removed(one_case, tried):
    assert killed(one_case.source, one_case.target, one_case.recipe, "disk", 30)
    leftovers = {path: path.read_bytes() for path in one_case.target.parent.glob(".*")}
    assert len(leftovers) == 2
    one_case.again()
    for path, content in leftovers.items():
        path.write_bytes(content)
    assert quantize_file(one_case.source, one_case.target, one_case.recipe).already_done
    one_case.again()
    with pytest.raises(OutputExistsError):
        quantize_file(one_case.source, one_case.target, Recipe(seed=1))
    one_case.check(complete=True)
    tried("the same run after its end", 1, "already done, leftovers removed")


def test_runs_towards_one_target_at_once(case, often, tried):
    """Both after a killed one, which only one of them can take up."""
    rounds = often(4, 40)
    for _ in range(rounds):
        assert killed(case.source, case.target, case.recipe, "disk", 30)
        runs = [
            processes.Process(target=run, args=(case.source, case.target, case.recipe, "disk", None)) for _ in range(2)
        ]
        for process in runs:
            process.start()
        for process in runs:
            process.join()
        assert [process.exitcode for process in runs] == [0, 0]
        case.check(complete=True)
        case.again()
        case.clear()
    tried("two runs towards one target at once", rounds, "whole or none")


def test_two_recipes_towards_one_target_lose_neither_unsaid(one_case, often, tried):
    """Neither may overwrite: one file is made, and the other run says that there is one of something else."""
    rounds = often(2, 20)
    for _ in range(rounds):
        runs = [
            processes.Process(target=run, args=(one_case.source, one_case.target, recipe, "disk", None))
            for recipe in (one_case.recipe, Recipe(rounding="nearest"))
        ]
        for process in runs:
            process.start()
        for process in runs:
            process.join()
        assert sorted(process.exitcode for process in runs) == [0, 1]
        assert {path.name for path in one_case.target.parent.iterdir()} == {one_case.source.name, one_case.target.name}
        winner = runs[0].exitcode == 0
        assert (one_case.target.read_bytes() == one_case.expected) is winner
        one_case.clear()
    tried("two runs of different recipes towards one target at once", rounds, "one whole file, the other refused")


@pytest.mark.parametrize("links", [True, False], ids=["", "a disk without links"])
def test_a_file_that_appears_during_a_run_is_not_replaced(one_case, monkeypatch, links, tried, sentences):
    other = Recipe(rounding="nearest")

    def nested(event):
        if isinstance(event, LayerStarted) and event.index == 3:
            quantize_file(one_case.source, one_case.target, other, device="cpu")

    if not links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    with sentences.raises(OutputExistsError):
        quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu", on_event=nested)
    assert quantize_file(one_case.source, one_case.target, other, device="cpu").already_done
    quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu", overwrite=True)
    one_case.again()
    tried("another's file appears during the run", 1, "it stays, one sentence")


def test_a_run_killed_while_its_file_gets_its_name_leaves_it_alone(one_case, monkeypatch, tried):
    """The file has two names then; who would go on with the hidden one would write into the finished one."""
    with Disk().under() as disk:
        quantized = quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu")
    one_case.clear()
    assert not quantized.already_done
    at = disk.operations.index("link") + 1
    assert killed(one_case.source, one_case.target, one_case.recipe, "disk", at)
    assert one_case.target.stat().st_nlink == 2
    os.utime(one_case.source)  # so that the next run has to make it again to know
    finished = one_case.target.read_bytes()
    quantize_file(
        one_case.source,
        one_case.target,
        one_case.recipe,
        device="cpu",
        on_event=lambda _: one_case.check(complete=True),
    )
    assert one_case.target.read_bytes() == finished
    one_case.again()
    tried("kill -9 between the two names of a file", 1, "whole")


RECORDS = [
    {"layer": {"config": None, "events": [["LayerFinished", {"name": "nope"}]]}},
    {
        "layer": {
            "config": None,
            "events": [["LayerKept", {"name": "nope", "shape": [1], "reason": "", "removed": False, "planned": True}]],
        }
    },
    {"layer": {"config": 7, "events": []}},
    {"layer": 5},
    {"layer": None},
    {"dtype": "F32"},
    {"dtype": "X", "shape": [1], "name": "a", "checksum": 0},
    {"dtype": "F32", "shape": ["a"], "name": "a", "checksum": 0},
    {"dtype": "F32", "shape": [-4], "name": "a", "checksum": 0},
    {"dtype": "F32", "shape": [10**30], "name": "a", "checksum": None},
    [1],
    7,
    None,
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: json.dumps(record)[:30])
def test_a_record_that_is_none_ends_what_is_taken_up(one_case, made, record, tried):
    """Sound by its checksum, and yet not what a run writes: all before it counts."""
    assert killed(one_case.source, one_case.target, one_case.recipe, "disk", 60)
    finished = noted(one_case.target.parent)
    (path,) = one_case.target.parent.glob(".*.journal")
    with open(path, "r+b", buffering=0) as file:
        journal = JournalFile(file)
        *_, (_, begin, size) = journal.records()
        file.seek(begin + size)
        journal.append(record)
        journal.append({"layer": {"config": None, "events": []}})
    one_case.again()
    assert len(made) == 8 - sum(name.endswith(("qkv.weight", "mlp.weight")) for name in finished)
    tried("a journal with a record that no run writes", 1, "the layers before it are kept, same bytes")


@pytest.mark.parametrize(
    "text", [b"[[[[", b"\xff", b"7", b"[]", b"{}", b"[" * 100_000], ids=lambda text: repr(text[:10])
)
def test_a_journal_that_begins_with_no_record_is_not_taken_up(one_case, made, text, tried):
    assert killed(one_case.source, one_case.target, one_case.recipe, "disk", 60)
    (path,) = one_case.target.parent.glob(".*.journal")
    path.write_bytes(struct.pack("<IIQ", len(text), zlib.crc32(text), 0) + text)
    one_case.again()
    assert len(made) == 8
    tried("a journal that begins with no record", 1, "made anew, same bytes")


def test_it_is_told_that_layers_are_taken_up(one_case, caplog, sentences):
    assert killed(one_case.source, one_case.target, one_case.recipe, "disk", 60)
    done = sum(name.endswith(("qkv.weight", "mlp.weight")) for name in noted(one_case.target.parent))
    with caplog.at_level("INFO"):
        report = quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu")
    assert done - 1 <= report.taken_up <= done
    (line,) = (line for line in report.table().splitlines() if line.startswith("layers quantized"))
    sentences(caplog.messages, line, numbers=False)


def test_a_living_run_is_not_taken_over(one_case):
    """The second run begins and ends while the first is in its third layer."""

    def nested(event):
        if isinstance(event, LayerStarted) and event.index == 3:
            quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu")
            one_case.check(complete=True)

    quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu", on_event=nested)
    one_case.again()
