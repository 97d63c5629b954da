"""Standard output as Windows has it: pipes in the code page, whose end is reported as an invalid argument."""

import errno
import io
import os
import sys

import pytest

from learned_rounding.quant_core.cli.streams import flush_output, prepare_streams, print_line


class Pipe(io.RawIOBase):
    """A pipe without a reader, until it is given up."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.given_up = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data) -> int:
        if not self.given_up:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return len(data)


@pytest.fixture
def output(monkeypatch):
    """output(file) → standard output writes to a binary file, in the code page of Western Europe."""

    def redirect(file) -> None:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="cp1252"))
        prepare_streams()

    yield redirect
    prepare_streams()


def test_characters_outside_the_code_page_are_escaped(output):
    printed = io.BytesIO()
    output(printed)
    print_line("46 % smaller … 層 → ")
    sys.stdout.flush()
    assert printed.getvalue().decode("cp1252").rstrip() == r"46 % smaller … \u5c64 \u2192"


def test_pipe_without_a_reader_ends_the_command(output):
    reader, end = os.pipe()
    pipe = Pipe(end)
    output(io.BufferedWriter(pipe))
    print_line("text")
    with pytest.raises(BrokenPipeError):
        flush_output()
    pipe.given_up = True
    os.close(reader), os.close(end)


def test_invalid_argument_of_a_file_is_an_error(output, tmp_path):
    with open(tmp_path / "a", "wb") as file:
        pipe = Pipe(file.fileno())
        output(io.BufferedWriter(pipe))
        print_line("text")
        assert flush_output().errno == errno.EINVAL
        pipe.given_up = True
