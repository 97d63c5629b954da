"""Mutated files, journals and texts through every entry point: accepted, or refused with a QuantizationError."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.events import LayerStarted
from learned_rounding.quant_core.run.resume import JournalFile
from learned_rounding.tests.fuzz.entry_points import FILES as FILE_ENTRY_POINTS
from learned_rounding.tests.fuzz.entry_points import TEXTS as TEXT_ENTRY_POINTS
from learned_rounding.tests.fuzz.entry_points import limit_resources, refusal, try_all
from learned_rounding.tests.fuzz.strategies import FILES, JOURNALS, TEXTS

pytestmark = pytest.mark.soak

NEAREST = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest", preset="none")
SETTINGS = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
# Entry points that must accept some files of a kind; otherwise the strategy tests only their header checks.
ACCEPTING = {".safetensors": set(FILE_ENTRY_POINTS)} | {
    key: {"plan", "quantize", "requantize"} for key in [".safetensors.index.json", ".gguf", ".pt"]
}


@pytest.mark.parametrize("suffix", FILES)
def test_files(suffix, often, tried):
    count = often(250, 5000)
    accepted = dict.fromkeys(FILE_ENTRY_POINTS, 0)

    @settings(SETTINGS, max_examples=count)
    @given(FILES[suffix])
    def every(files):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            with limit_resources():
                errors = try_all(Path(folder) / next(iter(files)))
            assert all((Path(folder) / name).read_bytes() == content for name, content in files.items())
            for name, error in errors.items():
                accepted[name] += error is None

    every()
    assert {name for name, times in accepted.items() if times} >= ACCEPTING[suffix], accepted
    assert accepted["plan"] > count / 50
    tried(f"a mutated {suffix} file, through every entry point", count, "accepted, or refused with an error message")


@pytest.fixture(scope="module")
def interrupted_run(tmp_path_factory):
    """Source, target, bytes of the complete target, bytes of the partial file after some layers, records of the journal."""
    folder = tmp_path_factory.mktemp("interrupted")
    source, target, files = folder / "model.safetensors", folder / "out" / "out.safetensors", {}
    save_file(
        {
            f"{index}.weight": torch.randn(17 - index % 2, 16, generator=torch.Generator().manual_seed(index))
            for index in range(12)
        },
        source,
    )

    def listener(event):
        if isinstance(event, LayerStarted) and event.index == 10:  # up to four wait to be written
            files.update({path.suffix: path.read_bytes() for path in target.parent.glob(".*")})

    quantize_file(source, target, NEAREST, device="cpu", on_event=listener)
    (folder / "journal").write_bytes(files[".journal"])
    with open(folder / "journal", "rb") as file:
        journal = JournalFile(file)
        records = [(record, journal.payload(begin, size)) for record, begin, size in journal.records()]
    assert sum("layer" in record for record, _ in records) >= 3
    return source, target, target.read_bytes(), files[".partial"], records


def test_journals(interrupted_run, often, tried):
    source, target, expected, partial, records = interrupted_run
    count, resumed = often(80, 5000), []

    @settings(SETTINGS, max_examples=count)
    @given(JOURNALS(records))
    def every(journal_and_forged):
        journal, forged = journal_and_forged
        shutil.rmtree(target.parent)
        target.parent.mkdir()
        for suffix, content in ((".partial", partial), (".journal", journal)):
            target.with_name(f".{target.name}.00ab12cd{suffix}").write_bytes(content)
        with limit_resources():
            resumed.append(quantize_file(source, target, NEAREST, device="cpu").taken_up)
        assert forged or target.read_bytes() == expected
        assert [path.name for path in target.parent.iterdir()] == [target.name]

    every()
    assert sum(map(bool, resumed)) > count / 4
    assert 0 in resumed
    tried("a mutated journal", count, "valid records are resumed, same bytes")


PLANTS = {
    "file": lambda path, other: shutil.copyfile(other, path),
    "link": lambda path, other: path.symlink_to(other),
    "dangling link": lambda path, other: path.symlink_to(path.with_name("missing")),
    "hard link": lambda path, other: path.hardlink_to(other),
    "pipe": lambda path, other: os.mkfifo(path),
    "folder": lambda path, other: path.mkdir(),
    "read-only file": lambda path, other: (shutil.copyfile(other, path), path.chmod(0o400)),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name")
def test_planted_files(interrupted_run, often, tried):
    """Files of a killed run, or anything else with their names that leads to another file of the user."""
    source, target, expected, partial, _records = interrupted_run
    journal, count, resumed = (source.parent / "journal").read_bytes(), often(30, 1000), []
    plants = st.dictionaries(
        st.sampled_from(["00ab12cd", "ffffffff"]),
        st.tuples(st.sampled_from([None, *PLANTS]), st.sampled_from([None, *PLANTS])),
        min_size=1,
    )

    @settings(SETTINGS, max_examples=count)
    @given(plants)
    def every(planted):
        shutil.rmtree(target.parent)
        target.parent.mkdir()
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            others = {}
            for mark, kinds in planted.items():
                for suffix, content, kind in zip((".partial", ".journal"), (partial, journal), kinds, strict=True):
                    other = Path(folder) / (mark + suffix)
                    others[other] = content
                    other.write_bytes(content)
                    if kind is not None:
                        PLANTS[kind](target.with_name(f".{target.name}.{mark}{suffix}"), other)
            resumed.append(quantize_file(source, target, NEAREST, device="cpu").taken_up)
            assert target.read_bytes() == expected
            assert not target.is_symlink()
            assert target.stat().st_nlink == 1
            assert all(other.read_bytes() == content for other, content in others.items())
            left = [path for path in target.parent.iterdir() if path != target and not path.is_dir()]
            assert not any(path.suffix == ".partial" for path in left), left

    every()
    assert 0 < sum(map(bool, resumed)) < count
    tried("planted hidden files", count, "not followed; those of a killed run are resumed, same bytes")


@pytest.mark.parametrize("name", TEXT_ENTRY_POINTS)
def test_texts(name, often, tried):
    count, accepted = often(150, 10_000), []

    @settings(SETTINGS, max_examples=count)
    @given(TEXTS[name])
    def every(text):
        with limit_resources():
            accepted.append(refusal(TEXT_ENTRY_POINTS[name], text) is None)

    every()
    assert count / 20 < sum(accepted) < count
    tried(f"a mutated {name}", count, "accepted, or refused with an error message")
