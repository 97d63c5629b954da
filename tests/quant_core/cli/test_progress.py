"""The bar fits a terminal of 80 columns, is not drawn elsewhere, and its pace excludes resumed layers."""

import errno
import io
import os
import re
import sys

from learned_rounding.quant_core.cli import progress
from learned_rounding.quant_core.cli.progress import Progress, describe_time, show_bytes
from learned_rounding.quant_core.events import LayerFinished, LayerStarted, OutputChecked, RunResumed, RunStarted

NAME = "model.diffusion_model.double_blocks.12.img_attn.proj.weight"
GB = 10**9


class Terminal(io.StringIO):
    def isatty(self):
        return True


def started(layers=4):
    return RunStarted(source="a", format="f", granularity="g", preset="p", layers=layers, kept=0, bytes_in=4 * GB)


def finished(index, elapsed, eta=0.0):
    return LayerFinished(
        index=index,
        total=4,
        name=NAME,
        shape=(8, 8),
        format="f",
        granularity="g",
        weight_error=0.0,
        seconds=1.0,
        bytes_in=GB,
        bytes_out=1,
        elapsed=elapsed,
        eta=eta,
    )


def layer(index):
    return LayerStarted(index=index, total=4, name=NAME, shape=(8, 8))


def draw(monkeypatch, events, stream=None) -> list[str]:
    """The states of the bar that these events draw."""
    stream = stream or Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    bar = Progress(verbose=False)
    for event in events:
        bar(event)
        if bar._bar is not None:
            bar._bar.refresh()
    bar.close()
    return [line for line in re.split(r"[\r\n]+", stream.getvalue()) if line.strip()]


RUN = [started(), layer(0), finished(0, 0.5, 1000.0), layer(1), OutputChecked(done=1, total=2)]


def test_the_bar_fits_80_columns_and_names_pace_and_layer(monkeypatch):
    lines = draw(monkeypatch, RUN)
    assert lines
    assert all(len(line) < 80 for line in lines)
    assert any("2 GB/s, 17 min left, …" in line and "img_attn.proj" in line for line in lines)
    assert any("checking the file: 50 %" in line for line in lines)


def test_nothing_is_drawn_into_a_pipe_or_file(monkeypatch):
    assert draw(monkeypatch, RUN, io.StringIO()) == []
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with show_bytes("verifying") as advance:
        advance(1, 2)
    assert stream.getvalue() == ""


def test_the_pace_excludes_resumed_layers(monkeypatch, capsys):
    events = [
        started(),
        layer(0),
        finished(0, 90.0),
        layer(1),
        finished(1, 95.0),
        RunResumed(layers=2, total=4, elapsed=1.0),
    ]
    *_, last = draw(monkeypatch, [*events, layer(2), finished(2, 3.0, 2.0), layer(3)])
    assert "3/4" in last
    assert "500 MB/s, 2 s left" in last
    assert capsys.readouterr().out == "Resuming: 2 of 4 layers already done.\n"


def test_times_have_one_unit(subtests):
    for seconds, text in [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (3000, "50 min"), (9000, "2.5 h")]:
        with subtests.test(seconds=seconds, text=text):
            assert describe_time(seconds) == text


class ClosedTerminal(Terminal):
    """A terminal that was closed after the first state of the bar."""

    def write(self, text):
        if self.getvalue():
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))  # tqdm itself bears EIO alone
        return super().write(text)


def test_a_terminal_that_is_closed_does_not_end_the_run(monkeypatch):
    monkeypatch.setattr(sys, "stderr", ClosedTerminal())
    bar = Progress(verbose=False)
    bar(started())
    bar._bar.mininterval = bar._bar.miniters = 0  # drawn at every event
    for event in (layer(0), finished(0, 20.0), layer(1), finished(1, 40.0)):
        bar(event)
    bar.close()
    assert bar._broken
