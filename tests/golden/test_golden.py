"""Hashes of the files that round to nearest and ``lrq migrate`` write, and the comparison of two commits.

The hashed cases contain exact arithmetic only, so their files are the same on every machine. When a change of a file is
intended, rewrite its entry with ``python tests/golden/compare.py --update-hashes`` in the same commit, and give the reason
in the commit message.
"""

import json

import pytest
import torch

from learned_rounding.quant_core.cli import main
from learned_rounding.tests.golden.cases import CASES, OUTPUT
from learned_rounding.tests.golden.compare import HASHES, ROOT, compare_case
from learned_rounding.tests.golden.outputs import file_differences, file_hashes
from learned_rounding.tests.golden.sources import write_safetensors, write_sources

EXACT = [case for case in CASES if case.exact]
KNOWN = json.loads(HASHES.read_text(encoding="utf-8"))
HINT = (
    "if the change is intended, run `python tests/golden/compare.py --update-hashes` and give the reason in the commit"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the sources of all hashed cases."""
    folder = tmp_path_factory.mktemp("golden")
    write_sources(folder / "sources", {name for case in EXACT if not case.missing_package for name in case.sources})
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """One thread of torch: tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.soak
@pytest.mark.usefixtures("one_thread")
def test_file_has_known_hashes(work, monkeypatch, capsys, subtests):
    for case in EXACT:
        with subtests.test(case.name), monkeypatch.context() as patch:
            if case.missing_package:
                pytest.skip(f"package {case.missing_package} is not installed")
            folder = work / "new" / case.name
            folder.mkdir(parents=True)
            patch.chdir(folder)
            assert main(case.argv(ROOT)) == 0, capsys.readouterr().err
            made = file_hashes(folder / OUTPUT)
            parts = [part for part, value in made.items() if value != KNOWN[case.name][part]]
            assert not parts, f"{case.name}: another {' and '.join(parts)}; {HINT}"


def test_every_hashed_case_has_an_entry():
    assert sorted(KNOWN) == sorted(case.name for case in EXACT)


def test_case_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.fixture
def pair(tmp_path):
    """pair(metadata, **tensors) → path of a new file beside ``old.safetensors``, which holds two tensors."""
    tensors = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(4, dtype=torch.int8)}
    old = tmp_path / "old.safetensors"
    write_safetensors(old, tensors, {"learned_rounding": json.dumps({"version": "1", "fingerprint": "x", "seed": 0})})

    def make(provenance: dict, changes: dict):
        new = tmp_path / "new.safetensors"
        write_safetensors(new, tensors | changes, {"learned_rounding": json.dumps(provenance)})
        return old, new

    return make


def test_version_and_fingerprint_are_masked(pair):
    old, new = pair({"version": "1.2.3.4.5", "fingerprint": "yy", "seed": 0}, {})
    assert old.read_bytes() != new.read_bytes()
    assert file_differences(old, new) == []
    assert file_hashes(old) == file_hashes(new)


def test_changed_recipe_is_reported(pair):
    old, new = pair({"version": "1", "fingerprint": "x", "seed": 1}, {})
    assert file_differences(old, new) == ["header: /__metadata__/learned_rounding/seed: 0 → 1"]


def test_first_changed_element_is_reported(pair):
    changed = torch.tensor([[0.0, 1, 2], [3, 5, 6]])
    old, new = pair({"version": "1", "fingerprint": "x", "seed": 0}, {"a": changed})
    assert file_differences(old, new) == ["data: a[1, 1]: 4 (0x40800000) → 5 (0x40a00000); 2 of 6 elements differ"]


def test_changed_dtype_is_reported(pair):
    old, new = pair({"version": "1", "fingerprint": "x", "seed": 0}, {"b": torch.ones(4, dtype=torch.uint8)})
    assert file_differences(old, new) == ["header: /b/dtype: 'I8' → 'U8'"]


def test_leftover_file_is_reported(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "new" / ".out.journal").touch()
    assert compare_case(tmp_path / "old", tmp_path / "new") == [".out.journal is only in the new folder"]
