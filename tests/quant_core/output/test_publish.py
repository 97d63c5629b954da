"""Rules for the final name of an output."""

import errno
import os

import pytest

from learned_rounding.quant_core.errors import OutputError, OutputExistsError
from learned_rounding.quant_core.output import final_path, keep_apart
from learned_rounding.quant_core.output.publish import publish_file
from learned_rounding.tests.system import needs_symlinks


@pytest.fixture
def hidden(tmp_path):
    """A complete file that is not yet published."""
    path = tmp_path / ".hidden"
    path.write_bytes(b"content")
    return path


@pytest.fixture(params=[True, False], ids=["hard links", "no hard links"])
def links(request, monkeypatch):
    """Whether the disk has hard links."""

    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not request.param:
        monkeypatch.setattr(os, "link", refuse)


def test_free_name_is_taken(tmp_path, hidden, links):
    assert publish_file(hidden, tmp_path / "a", overwrite=False)
    assert (tmp_path / "a").read_bytes() == b"content"


def test_file_of_the_same_content_is_left_in_place(tmp_path, hidden, links):
    (tmp_path / "a").write_bytes(b"content")
    inode = (tmp_path / "a").stat().st_ino
    assert not publish_file(hidden, tmp_path / "a", overwrite=False)
    assert (tmp_path / "a").stat().st_ino == inode


def test_file_of_other_content_is_replaced_only_on_request(tmp_path, hidden, links, sentences):
    (tmp_path / "a").write_bytes(b"another")
    with sentences.raises(OutputExistsError):
        publish_file(hidden, tmp_path / "a", overwrite=False)
    assert (tmp_path / "a").read_bytes() == b"another"
    assert publish_file(hidden, tmp_path / "a", overwrite=True)
    assert (tmp_path / "a").read_bytes() == b"content"


@needs_symlinks
def test_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert final_path(tmp_path / "link") == (tmp_path / "target").resolve()


def test_unusable_path_is_refused(tmp_path, sentences, subtests):
    for label, name in {"folder": ".", "null": "a\0b"}.items():
        with subtests.test(label), sentences.raises(OutputError):
            final_path(tmp_path / name)


def test_output_that_is_an_input_under_another_name_is_refused(tmp_path, hidden, sentences):
    os.link(hidden, tmp_path / "alias")
    keep_apart(tmp_path / "other", {"source": [hidden, None]})
    with sentences.raises(OutputError):
        keep_apart(tmp_path / "alias", {"source": [hidden, None]})
