"""Files that belong together: all of them are written, or none."""

import os

import pytest

from learned_rounding.quant_core.errors import OutputError
from learned_rounding.quant_core.output.together import write_together


def test_all_files_are_written(tmp_path, listing):
    write_together({tmp_path / "a.png": b"\0image", tmp_path / "a.md": b"text"})
    assert listing() == ["a.md", "a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"\0image"


def test_same_content_is_accepted(tmp_path, listing):
    (tmp_path / "a.md").write_bytes(b"text")
    write_together({tmp_path / "a.png": b"image", tmp_path / "a.md": b"text"})
    assert listing() == ["a.md", "a.png"]


def test_another_file_of_that_name_stays_and_nothing_is_left(tmp_path, listing, sentences):
    (tmp_path / "a.md").write_bytes(b"of another model")
    with pytest.raises(OutputError) as raised:
        write_together({tmp_path / "a.png": b"image", tmp_path / "a.md": b"text"})
    sentences(str(raised.value))
    assert listing() == ["a.md"]
    assert (tmp_path / "a.md").read_bytes() == b"of another model"


@pytest.mark.posix(reason="the third flush is that of the folder")
def test_nothing_is_left_after_a_failed_disk(tmp_path, listing, monkeypatch, subtests):
    for failing in range(3):
        with subtests.test(failing=failing), monkeypatch.context() as patch:
            results = iter([True] * failing + [False])

            def fsync(descriptor, results=results):
                if not next(results, True):
                    raise OSError(28, "No space left on device")

            patch.setattr(os, "fsync", fsync)
            with pytest.raises((OutputError, OSError)):
                write_together({tmp_path / "a.png": b"image", tmp_path / "a.md": b"text"})
            assert listing() == []


def test_missing_folder_is_an_output_error(tmp_path):
    with pytest.raises(OutputError):
        write_together({tmp_path / "missing" / "a.md": b"text"})
