"""Progress of a run in a terminal: a bar over the layers, or a line per tensor."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from ..display import escape_control
from ..events import Event, LayerFinished, LayerKept, LayerMeasured, LayerStarted, OutputChecked, RunStarted
from .streams import print_line

__all__ = ["Progress", "show_bytes"]

_NAME_WIDTH = 48  # characters of a layer name in the bar


class Progress:
    """Listener of the events of a run.

    Args:
        verbose: print a line per tensor instead of the bar.
    """

    def __init__(self, verbose: bool):
        self._verbose = verbose
        self._bar = None
        self._broken = False

    def __call__(self, event: Event) -> None:
        if self._verbose:
            self._print_event(event)
        elif not self._broken:
            try:
                self._draw_event(event)
            except OSError:  # standard error is full or closed
                self._broken = True

    def _draw_event(self, event: Event) -> None:
        if isinstance(event, LayerMeasured) and event.index == 0:
            self._start(event.total, "measuring")
        elif isinstance(event, RunStarted):
            self.close()
            self._start(event.layers)
        elif isinstance(event, LayerStarted) and self._bar is not None:
            self._bar.set_postfix_str(escape_control(event.name)[-_NAME_WIDTH:], refresh=False)
        elif isinstance(event, (LayerMeasured, LayerFinished)) and self._bar is not None:
            self._bar.update()
        elif isinstance(event, OutputChecked) and self._bar is not None:
            self._bar.set_postfix_str(f"checking the file: {event.done / event.total:.0%}")

    def _start(self, layers: int, label: str | None = None) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=layers, unit="layer", desc=label, dynamic_ncols=True, file=sys.stderr)

    def _print_event(self, event: Event) -> None:
        if isinstance(event, LayerFinished):
            output = "" if event.output_error is None else f"  output error {event.output_error:.5f}"
            print_line(
                f"{escape_control(event.name)}  {event.shape[0]}×{event.shape[1]}  {event.format}  {event.solver}"
                f"  error {event.weight_error:.5f}{output}  {event.seconds:.2f} s"
            )
        elif isinstance(event, LayerKept):
            action = "removed" if event.removed else "kept"
            print_line(f"{escape_control(event.name)}  {action}: {escape_control(event.reason)}")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None and not self._broken:
            with contextlib.suppress(OSError):
                self._bar.close()


@contextlib.contextmanager
def show_bytes(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes in a terminal; yields the function that is called with the bytes that are done, and all of them."""
    from tqdm import tqdm

    bar = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        with contextlib.suppress(OSError):  # standard error is full or closed
            if bar is None:
                bar = tqdm(total=total, unit="B", unit_scale=True, desc=label, dynamic_ncols=True, disable=None)
            bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            with contextlib.suppress(OSError):
                bar.close()
