"""Progress of a batch in a terminal: a line per started and finished output, and a bar over the layers of what is running."""

from collections.abc import Callable
from typing import Any

from ..batch.plan import ALREADY_DONE, DONE, Outcome
from ..batch.run import GroupStarted, OutputAdvanced, OutputFinished
from ..display import escape_control, human_bytes, size_change, three_digits
from ..events import DeviceFailed, Event, LayerFinished, LayerMeasured, RunResumed, RunStarted
from .progress import describe_time, open_bar, print_event
from .streams import print_error, print_line

__all__ = ["BatchProgress", "describe_finished"]


class BatchProgress:
    """Listener of the events of a batch.

    Args:
        verbose: print a line per tensor instead of the bar.
        outputs: number of outputs of the batch.
    """

    def __init__(self, verbose: bool, outputs: int):
        self._verbose, self._outputs = verbose, outputs
        self._finished = 0
        self._running: dict[str, str] = {}  # output → its source
        self._bar: Any = None
        self._broken = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, GroupStarted):
            self._start_group(event)
        elif isinstance(event, OutputFinished):
            self._finish_output(event.outcome)
        elif isinstance(event, OutputAdvanced):
            self._advance(event)
        elif isinstance(event, DeviceFailed):
            self._clear()
            print_error(f"lrq: warning: {escape_control(event.text)}")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._draw(self._bar.close)
            self._bar = None

    def _start_group(self, event: GroupStarted) -> None:
        group = event.group
        self._clear()
        if event.note:
            print_line(f"{group.source}: {escape_control(event.note)}")
        for output in group.outputs:
            self._running[str(output.path)] = group.name
            print_line(f"{group.source} → {output.path}, {output.name}: {output.recipe.format}, on {event.device}")

    def _finish_output(self, outcome: Outcome) -> None:
        self._finished += 1
        self._running.pop(outcome.output, None)
        if self._running:
            self._clear()
        else:
            self.close()
        text = f"{self._finished}/{self._outputs}  {outcome.output}: {describe_finished(outcome)}"
        if outcome.error:
            print_error(f"lrq: {text}")
        else:
            print_line(text)
            for warning in (outcome.summary or {}).get("warnings", ()):
                print_error(f"lrq: warning: {escape_control(warning)}")

    def _advance(self, advanced: OutputAdvanced) -> None:
        event = advanced.event
        if isinstance(event, RunResumed):
            self._clear()
            print_line(f"{advanced.output}: resuming, {event.layers} of {event.total} layers already done.")
        if self._verbose:
            print_event(event)
        elif isinstance(event, LayerMeasured) and event.index == 0:
            self._extend(event.total)
        elif isinstance(event, RunStarted):
            self._extend(event.layers)
        elif isinstance(event, (LayerMeasured, LayerFinished)) and self._bar is not None:
            if isinstance(event, LayerFinished):
                sources = ", ".join(dict.fromkeys(self._running.values()))
                self._bar.set_postfix_str(escape_control(f"{describe_time(event.eta)} left, {sources}"), refresh=False)
            self._draw(self._bar.update)

    def _extend(self, layers: int) -> None:
        """Add the layers of an output to the bar, which begins with the first."""

        def extend() -> None:
            if self._bar is None:
                self._bar = open_bar(0)
            self._bar.total += layers
            self._bar.refresh()

        self._draw(extend)

    def _clear(self) -> None:
        """Remove the bar from the line that is printed next; its next update draws it again."""
        if self._bar is not None:
            self._draw(self._bar.clear)

    def _draw(self, change: Callable[[], object]) -> None:
        if not self._broken:
            try:
                change()
            except OSError:  # standard error is full or closed
                self._broken = True
                if self._bar is not None:
                    self._bar.disable = True  # it would write at its end


def describe_finished(outcome: Outcome) -> str:
    """What became of an output, in one line."""
    if outcome.error:
        return escape_control(str(outcome.error["message"]))
    summary = outcome.summary or {}
    if outcome.status == ALREADY_DONE:
        return f"{ALREADY_DONE}, {human_bytes(summary['bytes_out'])}"
    change = size_change(summary["bytes_in"], summary["bytes_out"])
    parts = [DONE, f"{human_bytes(summary['bytes_out'])} ({change})" if change else human_bytes(summary["bytes_out"])]
    for name, label in (("median_error", "weight error"), ("median_output_error", "output error")):
        if summary[name] is not None:
            parts.append(f"median {label} {three_digits(summary[name])}")
    return ", ".join([*parts, f"{three_digits(summary['seconds'])} s"])
