"""Progress of a run in a terminal: a bar over the layers, or a line per tensor. Nothing is drawn where no terminal reads it."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ..display import escape_control, human_bytes
from ..events import (
    DeviceFailed,
    Event,
    LayerFinished,
    LayerKept,
    LayerMeasured,
    LayerStarted,
    OutputChecked,
    RunResumed,
    RunStarted,
)
from .streams import print_error, print_line

__all__ = ["Progress", "describe_time", "open_bar", "print_event", "show_bytes"]

_WIDTH = 79  # columns of the bar at most
_NAME_WIDTH = 24  # characters of a layer name in the bar
_FORMAT = "{desc}{percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt}{postfix}"


class Progress:
    """Listener of the events of a run.

    Args:
        verbose: print a line per tensor instead of the bar.
    """

    def __init__(self, verbose: bool):
        self._verbose = verbose
        self._bar = None
        self._broken = False
        self._bytes, self._began = 0, 0.0  # of the source since the run started or was resumed, and when that was
        self._pace = ""

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunResumed):
            print_line(f"Resuming: {event.layers} of {event.total} layers already done.")
        if isinstance(event, DeviceFailed):
            print_error(f"lrq: warning: {escape_control(event.text)}")
        if self._verbose:
            print_event(event)
        elif not self._broken:
            try:
                self._draw_event(event)
            except OSError:  # standard error is full or closed
                self._broken = True

    def _draw_event(self, event: Event) -> None:
        if isinstance(event, LayerMeasured) and event.index == 0:
            self._start(event.total, "measuring ")
        elif isinstance(event, RunStarted):
            self.close()
            self._start(event.layers)
        elif isinstance(event, RunResumed):
            self._bytes, self._began, self._pace = 0, event.elapsed, ""
        elif isinstance(event, LayerStarted) and self._bar is not None:
            name = escape_control(event.name.removesuffix(".weight"))
            self._describe(name if len(name) <= _NAME_WIDTH else f"…{name[1 - _NAME_WIDTH :]}")
        elif isinstance(event, (LayerMeasured, LayerFinished)) and self._bar is not None:
            if isinstance(event, LayerFinished):
                self._measure_pace(event)
            self._bar.update()
        elif isinstance(event, OutputChecked) and self._bar is not None:
            self._pace = ""
            self._describe(f"checking the file: {100 * event.done / (event.total or 1):.0f} %")

    def _measure_pace(self, event: LayerFinished) -> None:
        self._bytes += event.bytes_in
        seconds = event.elapsed - self._began
        rate = self._bytes / seconds if seconds else 0.0
        self._pace = f"{human_bytes(rate)}/s, {describe_time(event.eta)} left, "

    def _describe(self, text: str) -> None:
        assert self._bar is not None
        self._bar.set_postfix_str(self._pace + text, refresh=False)

    def _start(self, layers: int, label: str = "") -> None:
        self._bytes, self._began, self._pace = 0, 0.0, ""
        self._bar = open_bar(layers, label)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None and not self._broken:
            with contextlib.suppress(OSError):
                self._bar.close()


def open_bar(layers: int, label: str = "") -> Any:
    """A bar of tqdm over layers."""
    from tqdm import tqdm

    return tqdm(total=layers, desc=label, bar_format=_FORMAT, **_bar_settings())


def print_event(event: Event) -> None:
    """Print the line of a tensor for --verbose."""
    if isinstance(event, LayerFinished):
        output = "" if event.output_error is None else f"  output error {event.output_error:.3g}"
        print_line(
            f"{escape_control(event.name)}  {event.shape[0]}×{event.shape[1]}  {event.format}  {event.solver}"
            f"  error {event.weight_error:.3g}{output}  {event.seconds:.3g} s"
        )
    elif isinstance(event, LayerKept):
        action = "removed" if event.removed else "kept"
        print_line(f"{escape_control(event.name)}  {action}: {escape_control(event.reason)}")


def describe_time(seconds: float) -> str:
    """A duration in one unit: 42 s, 5 min, 1.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def _bar_settings() -> dict:
    """Stream and width of a bar; it is disabled where standard error is not a terminal."""
    columns = shutil.get_terminal_size().columns
    return {"file": sys.stderr, "ncols": min(_WIDTH, columns - 1), "disable": None}


@contextlib.contextmanager
def show_bytes(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes in a terminal; yields the function that is called with the bytes that are done, and all of them."""
    from tqdm import tqdm

    bar = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        with contextlib.suppress(OSError):  # standard error is full or closed
            if bar is None:
                bar = tqdm(total=total, unit="B", unit_scale=True, desc=label, **_bar_settings())
            bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            with contextlib.suppress(OSError):
                bar.close()
