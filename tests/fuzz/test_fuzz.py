"""Nearly right files, journals and texts through every door: taken, or refused by one of our errors."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.events import LayerStarted
from learned_rounding.quant_core.run.resume import JournalFile
from learned_rounding.tests.fuzz.doors import FILES as DOORS_OF_FILES
from learned_rounding.tests.fuzz.doors import TEXTS as DOORS
from learned_rounding.tests.fuzz.doors import bounded, refused, tried_all
from learned_rounding.tests.fuzz.strategies import FILES, JOURNALS, TEXTS

PLAIN = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
# What takes files of a kind: each must take some, or the generator tries nothing behind the door.
TAKE = {".safetensors": set(DOORS_OF_FILES)} | dict.fromkeys(
    [".safetensors.index.json", ".gguf", ".pt"], {"plan", "quantize", "requantize"}
)


@pytest.mark.parametrize("suffix", FILES)
def test_files(suffix, often, tried):
    count = often(250, 5000)
    taken = dict.fromkeys(DOORS_OF_FILES, 0)

    @settings(PLAIN, max_examples=count)
    @given(FILES[suffix])
    def every(files):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            with bounded():
                said = tried_all(Path(folder) / next(iter(files)))
            assert all((Path(folder) / name).read_bytes() == content for name, content in files.items())
            for name, error in said.items():
                taken[name] += error is None

    every()
    assert {name for name, times in taken.items() if times} >= TAKE[suffix], taken
    assert taken["plan"] > count / 50
    tried(f"a nearly right {suffix} file, through every door", count, "taken, or refused by a sentence")


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """A source, the target and its bytes, what a run that died at its fourth layer left behind, and the records of its journal."""
    folder = tmp_path_factory.mktemp("dead")
    source, target, left = folder / "model.safetensors", folder / "out" / "out.safetensors", {}
    save_file(
        {
            f"{index}.weight": torch.randn(17 - index % 2, 16, generator=torch.Generator().manual_seed(index))
            for index in range(6)
        },
        source,
    )

    def listener(event):
        if isinstance(event, LayerStarted) and event.index == 4:
            left.update({path.suffix: path.read_bytes() for path in target.parent.glob(".*")})

    quantize_file(source, target, NEAREST, device="cpu", on_event=listener)
    (folder / "journal").write_bytes(left[".journal"])
    with open(folder / "journal", "rb") as file:
        journal = JournalFile(file)
        records = [(record, journal.payload(begin, size)) for record, begin, size in journal.records()]
    assert sum("layer" in record for record, _ in records) >= 3
    return source, target, target.read_bytes(), left[".partial"], records


NEAREST = Recipe(format="int8_tensorwise", rounding="nearest", preset="none")


def test_journals(dead, often, tried):
    source, target, expected, partial, records = dead
    count, taken = often(200, 5000), []

    @settings(PLAIN, max_examples=count)
    @given(JOURNALS(records))
    def every(made):
        journal, forged = made
        shutil.rmtree(target.parent)
        target.parent.mkdir()
        for suffix, content in ((".partial", partial), (".journal", journal)):
            target.with_name(f".{target.name}.00ab12cd{suffix}").write_bytes(content)
        with bounded():
            taken.append(quantize_file(source, target, NEAREST, device="cpu").taken_up)
        assert forged or target.read_bytes() == expected
        assert [path.name for path in target.parent.iterdir()] == [target.name]

    every()
    assert sum(map(bool, taken)) > count / 4 and 0 in taken
    tried("a nearly right journal", count, "what is whole is taken up, same bytes")


@pytest.mark.parametrize("door", DOORS)
def test_texts(door, often, tried):
    count, taken = often(400, 10_000), []

    @settings(PLAIN, max_examples=count)
    @given(TEXTS[door])
    def every(text):
        with bounded():
            taken.append(refused(DOORS[door], text) is None)

    every()
    assert count / 20 < sum(taken) < count
    tried(f"a nearly right {door}", count, "taken, or refused by a sentence")
