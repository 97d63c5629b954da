"""Lines and the bar of a batch."""

import io
import os
import re
import sys
from pathlib import Path

import pytest

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.batch import Group, Outcome, Output
from learned_rounding.quant_core.batch.run import GroupStarted, OutputAdvanced, OutputFinished
from learned_rounding.quant_core.cli import progress
from learned_rounding.quant_core.cli.batch_progress import BatchProgress, describe_finished
from learned_rounding.quant_core.events import DeviceFailed, RunResumed

from .test_progress import ClosedTerminal, Terminal, finished, started

SUMMARY = {"bytes_in": 4_000_000, "bytes_out": 1_000_000, "median_error": 0.0123, "seconds": 12.0, "warnings": []}
GROUP = Group(
    Path("a.safetensors"),
    "a",
    tuple(Output(name, Recipe(), Path(f"a_{name}.safetensors")) for name in ("r", "s")),
)


def outcome(name: str = "r", status: str = "done", **values) -> Outcome:
    summary = {**SUMMARY, "median_output_error": None} | values.pop("summary", {})
    return Outcome("a.safetensors", "a", name, f"a_{name}.safetensors", status, 1.0, summary=summary, **values)


def advanced(name: str, event) -> OutputAdvanced:
    return OutputAdvanced(Path(f"a_{name}.safetensors"), event)


RUN = [
    GroupStarted(GROUP, "cpu"),
    advanced("r", started()),
    advanced("s", started()),
    advanced("r", finished(0, 1.0, 1000.0)),
    advanced("s", finished(0, 1.0, 1000.0)),
    OutputFinished(outcome("r")),
    OutputFinished(outcome("s", "failed", error={"message": "The disk is full."})),
]


@pytest.fixture
def draw(monkeypatch):
    """draw(events, stream) → the states of the bar that these events draw."""

    def run(events, stream) -> list[str]:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
        shown = BatchProgress(False, 2)
        for event in events:
            shown(event)
            if shown._bar is not None:
                shown._draw(shown._bar.refresh)
        shown.close()
        return [line for line in re.split(r"[\r\n]+", stream.getvalue()) if line.strip()]

    return run


def test_the_bar_is_over_the_layers_of_all_outputs_of_a_group(draw):
    assert any("2/8" in line and "17 min left, a" in line for line in draw(RUN, Terminal()))


def test_the_bar_fits_80_columns(draw):
    assert all(len(line) < 80 for line in draw(RUN, Terminal()))


def test_no_bar_is_drawn_into_a_pipe_or_file(draw):
    assert draw(RUN[:-1], io.StringIO()) == []


def test_a_terminal_that_is_closed_does_not_end_the_batch(draw):
    assert draw(RUN, ClosedTerminal())


def test_lines_of_started_and_finished_outputs(draw, capsys, sentences):
    stream = io.StringIO()
    draw([GroupStarted(GROUP, "cuda:1", "Dequantized first."), *RUN[1:]], stream)
    sentences(capsys.readouterr().out, stream.getvalue())


def test_resumed_layers_are_shown(draw, capsys):
    draw([RUN[0], advanced("r", RunResumed(layers=2, total=4, elapsed=0.0))], io.StringIO())
    assert "a_r.safetensors: resuming, 2 of 4 layers already done." in capsys.readouterr().out


def test_a_lost_device_is_a_warning(draw):
    lines = draw([DeviceFailed(device="cuda:1", lost=True, text="cuda:1 was lost.")], io.StringIO())
    assert lines == ["lrq: warning: cuda:1 was lost."]


def test_warnings_are_printed(draw):
    lines = draw([OutputFinished(outcome(summary={"warnings": ["No layer matches."]}))], io.StringIO())
    assert lines == ["lrq: warning: No layer matches."]


def test_outcomes_are_described_in_one_line(subtests, sentences):
    for each in (
        outcome(),
        outcome(summary={"median_output_error": 0.5}),
        outcome(status="already done"),
        outcome(status="failed", error={"message": "a\nb"}),
    ):
        with subtests.test(each.status):
            sentences(describe_finished(each))
