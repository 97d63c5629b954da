"""Runs that die: what they finished is taken up by the next run of the same, and by no other."""

import os
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, pipeline, quantize_file
from learned_rounding.quant_core.checkpoints.journal import Journal
from learned_rounding.quant_core.errors import OutputExistsError
from learned_rounding.quant_core.events import LayerFinished, LayerKept, LayerStarted
from learned_rounding.tests.faults.disk import Disk, killed, processes, run

SEED = 20


def points(case) -> dict[str, int]:
    """How many operations of the disk, and looks at the check, a run has."""
    checks = []
    with Disk().under() as disk:
        quantize_file(case.source, case.target, case.recipe, device="cpu", check=lambda: checks.append(1))
    case.clear()
    return {"disk": len(disk.operations), "check": len(checks)}


def noted(folder: Path) -> list[str]:
    """Layers that dead runs have finished, by their journals."""
    found = []
    for path in folder.glob(".*.journal"):
        with open(path, "rb") as file:
            found += [record["note"]["events"][0][1]["name"] for record, _, _ in Journal(file).records() if "note" in record]
    return found


@pytest.fixture
def made(monkeypatch):
    """made → shapes of the weights that were quantized from here on."""
    shapes, real = [], pipeline.quantize_weight

    def quantize(weight, *args, **options):
        shapes.append(tuple(weight.shape))
        return real(weight, *args, **options)

    monkeypatch.setattr(pipeline, "quantize_weight", quantize)
    return shapes


def test_killed_anywhere_the_next_run_ends_the_same(case, often, tried):
    draw, counts = random.Random(SEED), points(case)
    every = [("disk", at) for at in range(counts["disk"])]  # between any two writes, and in each
    others = [("check", draw.randrange(counts["check"])) for _ in range(often(10, 200))]
    tries = draw.sample(every, often(60, len(every))) + others
    for kind, at in tries:
        assert killed(case.source, case.target, case.recipe, kind, at)
        case.check()
        case.again()
        case.clear()
    tried("kill -9 at a random point, or in the middle of a write", len(tries), "whole or none")


def test_killed_again_and_again(case, often, tried):
    """Each run gets a little further than the one before, until one ends."""
    steps, deaths = often(32, 28), 0  # the end alone takes two dozen
    while killed(case.source, case.target, case.recipe, "disk", steps):
        case.check(complete=False)
        deaths += 1
        assert deaths < 200
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
        assert complete or [type(event) for event in events if isinstance(event, (LayerStarted, LayerFinished))].count(LayerFinished) == 7
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
    draw, count = random.Random(SEED), often(20, 300)
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


def test_everything_is_on_the_disk_before_it_has_its_name(one_case):
    with Disk().under() as disk:
        quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu")
    end = disk.operations[-6:]
    assert end == ["write file", "fsync", "link", "fsync", "unlink", "unlink"]  # header, its flush, the name, and that it lasts; hidden names go


OTHERS = {
    "recipe": lambda case: (case.source, Recipe(rounding="nearest", seed=5)),
    "source": lambda case: (save_file({n: t + 1 for n, t in load_file(case.source).items()}, case.source), (case.source, case.recipe))[1],
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
        runs = [processes.Process(target=run, args=(case.source, case.target, case.recipe, "disk", None)) for _ in range(2)]
        for process in runs:
            process.start()
        for process in runs:
            process.join()
        assert [process.exitcode for process in runs] == [0, 0]
        case.check(complete=True)
        case.again()
        case.clear()
    tried("two runs towards one target at once", rounds, "whole or none")


def test_a_living_run_is_not_taken_over(one_case):
    """The second run begins and ends while the first is in its third layer."""
    def nested(event):
        if isinstance(event, LayerStarted) and event.index == 3:
            quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu")
            one_case.check(complete=True)

    quantize_file(one_case.source, one_case.target, one_case.recipe, device="cpu", on_event=nested)
    one_case.again()


def test_a_notes_numbers_survive_as_they_are(tmp_path):
    """NaN and tuples: a layer's event is told again as it was."""
    with open(tmp_path / "journal", "w+b", buffering=0) as file:
        journal = Journal(file)
        begin = journal.append({"a": float("inf")}, b"payload")
        journal.append({"b": "ü"})
        assert [(record, size) for record, _, size in journal.records()] == [({"a": float("inf")}, 7), ({"b": "ü"}, 0)]
        assert journal.payload(begin, 7) == b"payload"
        file.seek(begin + 7 + 17)
        file.write(b"\xff")
        assert [record for record, _, _ in journal.records()] == [{"a": float("inf")}]
