"""Streams that are closed, full or without a reader do not end the work; control characters are escaped."""

import contextlib
import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import learned_rounding
from learned_rounding.quant_core.cli import streams
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.output import verify_file
from learned_rounding.tests.system import needs_full_device, needs_shell

ROOT = Path(learned_rounding.__file__).parent


@pytest.fixture
def redirect(monkeypatch):
    """redirect(name, stream) sets a stream of this process."""
    opened = []

    def set_stream(name, stream):
        opened.append(stream)
        monkeypatch.setattr(sys, name, stream)

    yield set_stream
    for stream in opened:
        with contextlib.suppress(OSError):
            stream.close()


def test_a_reader_that_goes_away_ends_the_command(redirect):
    """As `lrq presets | head -1` does, whoever is faster."""
    read, write = os.pipe()
    os.close(read)
    redirect("stdout", os.fdopen(write, "w"))
    assert main(["presets"]) == 141


def test_closed_streams_do_not_end_the_command(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["formats"]) == 0
    assert main(["verify", "none"]) == 1


@needs_full_device
def test_lost_output_is_an_error_after_the_work(redirect, capfd, sentences):
    redirect("stdout", open("/dev/full", "w"))
    assert main(["formats"]) == 1
    sentences(capfd.readouterr().err)


@needs_full_device
def test_full_standard_error_is_not_an_error(redirect):
    redirect("stderr", open("/dev/full", "w"))
    assert main(["formats"]) == 0
    assert main(["verify", "none"]) == 1


@pytest.mark.posix(reason="a terminal is made with pty")
def test_a_terminal_that_was_closed_is_not_an_error(redirect):
    """Writing to it is an input/output error from then on."""
    ours, theirs = os.openpty()
    os.close(ours)
    redirect("stdout", os.fdopen(theirs, "w"))
    assert main(["formats"]) == 0


def test_a_file_that_cannot_be_written_is_an_error_whatever_its_reason(redirect, tmp_path, monkeypatch):
    with open(tmp_path / "out", "w") as file:
        redirect("stdout", file)
        streams.prepare_streams()
        monkeypatch.setattr(streams, "_failures", [OSError(errno.EIO, "Input/output error")])
        assert streams.flush_output().errno == errno.EIO


def test_characters_that_the_encoding_lacks_are_escaped(redirect, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        redirect("stdout", file)
        streams.prepare_streams()
        streams.print_line("48×64")
    assert (tmp_path / "out").read_text() == "48\\xd764\n"


def test_control_characters_are_escaped_and_lines_stay_apart(capsys):
    streams.prepare_streams()
    streams.print_line("a\x1b[2J\nb")
    streams.print_error("c\rd")
    captured = capsys.readouterr()
    assert captured.out == "a\\x1b[2J\nb\n"
    assert captured.err == "c\\rd\n"


@pytest.fixture
def document_on_stdout():
    """Lines go to standard error, as where a document is printed."""
    streams.send_lines("stderr")
    yield
    streams.send_lines("stdout")


@pytest.mark.usefixtures("document_on_stdout")
def test_lines_go_to_standard_error_beside_a_document(capsys):
    streams.prepare_streams()
    streams.print_line("progress")
    streams.print_json({"size": "×"})
    captured = capsys.readouterr()
    assert captured.err == "progress\n"
    assert captured.out == '{"size": "\\u00d7"}\n'


def test_output_of_a_command_is_bounded(capsys, monkeypatch):
    monkeypatch.setattr(streams, "_MOST", 20)
    streams.prepare_streams()
    for text in ("0123456789", "0123456789", "more"):
        streams.print_line(text)
    assert capsys.readouterr().out == "0123456789\n… the rest of more than 20 characters is left out.\n"


# As users start it


@pytest.mark.soak
@pytest.mark.parametrize("words", [["plan", "-i", "model.safetensors", "--general"], ["presets"]], ids=" ".join)
def test_a_process_without_a_reader_ends_quietly(model_file, tmp_path, words):
    model_file()
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, ROOT, *words], stdout=write, stderr=subprocess.PIPE, cwd=tmp_path, timeout=120
    )
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == b""


@pytest.mark.soak
@needs_shell
@needs_full_device
@pytest.mark.parametrize(
    "redirection, code",
    [(">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0), ("2>/dev/full", 0), (">/dev/full 2>&-", 1), (">/dev/full", 1)],
)
def test_process_with_streams_that_are_closed_or_full_does_its_work(model_file, tmp_path, redirection, code, sentences):
    words = [sys.executable, ROOT, "quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors", "--general"]
    done = subprocess.run(
        ["sh", "-c", f"{shlex.join(map(str, words))} --verbose {redirection}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr
    assert verify_file(tmp_path / "q.safetensors").problems == []
    if redirection == ">/dev/full":
        sentences(re.sub(r".*\r", "", done.stderr))


@pytest.mark.soak
@needs_shell
@pytest.mark.parametrize("redirection", ["2>&-", pytest.param(">/dev/full", marks=needs_full_device)])
def test_process_with_such_streams_fails_where_the_command_does(tmp_path, redirection):
    words = shlex.join([sys.executable, str(ROOT), "verify", "none"])
    done = subprocess.run(
        ["sh", "-c", f"{words} {redirection}"], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.soak
@pytest.mark.posix(reason="a terminal is made with pty")
def test_a_terminal_that_is_closed_during_the_work_does_not_end_it(model_file, tmp_path):
    """Writing to it is an input/output error from then on."""
    ours, theirs = os.openpty()
    words = ["-i", model_file(), "-o", tmp_path / "q.safetensors", "--general", "--verbose"]
    command = [sys.executable, ROOT, "quantize", *words]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        os.close(ours)
        assert process.wait(timeout=120) == 0
    assert verify_file(tmp_path / "q.safetensors").problems == []


# Names


def test_control_characters_of_names_are_escaped_by_every_command(lrq, tmp_path):
    """A name that clears the screen, begins another line and ends one, or turns the direction of reading."""
    source, out, name = tmp_path / "model.safetensors", tmp_path / "out.safetensors", "a\x1b[2J\r\n\0\u202eb"
    save_file(
        {f"{name}.weight": torch.randn(32, 32), f"{name}.proj.weight": torch.full((32, 32), float("nan"))}, source
    )
    damaged = tmp_path / "damaged.safetensors"
    save_file({f"{name}.weight": torch.randn(8, 8), f"{name}.weight_scale": torch.ones(3)}, damaged)
    made = [
        lrq("plan", "-i", source, "--preset", "none"),
        lrq("quantize", "-i", source, "-o", out, "--preset", "none", "--verbose", "--simple"),
        lrq("inspect", out),
        lrq("verify", damaged),
        lrq("migrate", "-i", damaged, "-o", tmp_path / "new.safetensors"),
    ]
    assert [code for code, *_ in made] == [0, 0, 0, 1, 1]
    for code, text, errors in made:
        assert all(line.isprintable() for line in [*text.split("\n"), *errors]), (code, text, errors)
    assert "a\\x1b[2J\\r\\n\\x00\\u202eb.weight" in made[0][1]
