"""Final names where Windows decides which there are."""

import errno
import os

import pytest

from learned_rounding.quant_core.errors import OutputError, OutputExistsError
from learned_rounding.quant_core.output import final_path
from learned_rounding.quant_core.output.publish import flush_folder, output_error, publish_file


@pytest.fixture
def hidden(tmp_path):
    """A complete file that is not yet published."""
    path = tmp_path / ".hidden"
    path.write_bytes(b"content")
    return path


@pytest.mark.parametrize("name", ["nul.safetensors", "a:b.safetensors", "CON/a.safetensors"])
def test_name_that_windows_cannot_store_is_refused(windows, tmp_path, sentences, name):
    with sentences.raises(OutputError):
        final_path(tmp_path / name)


def test_file_of_other_content_is_not_replaced(windows, tmp_path, hidden):
    (tmp_path / "a").write_bytes(b"another")
    with pytest.raises(OutputExistsError):
        publish_file(hidden, tmp_path / "a", overwrite=False)
    assert (tmp_path / "a").read_bytes() == b"another"


def test_file_is_renamed_without_hard_links(windows, tmp_path, hidden):
    publish_file(hidden, tmp_path / "a", overwrite=False)
    assert not hidden.exists()


def test_folder_that_cannot_be_opened_is_not_flushed(windows, tmp_path):
    flush_folder(tmp_path)


def test_folder_without_rights_is_not_reported_as_an_open_file(windows, tmp_path, sentences):
    sentences(str(output_error(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), tmp_path / "new")))
