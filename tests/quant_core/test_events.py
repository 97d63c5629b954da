"""Every event of a run reaches its listeners: the progress of the command line and that of the nodes."""

import ast
import inspect
from pathlib import Path

import learned_rounding
from learned_rounding.quant_core import events
from learned_rounding.quant_core.cli import progress
from learned_rounding.quant_core.events import Event

ROOT = Path(learned_rounding.__file__).parent
EVENTS = {name for name, value in inspect.getmembers(events, inspect.isclass) if issubclass(value, Event)} - {"Event"}
# Events that a listener ignores, by the reason.
IGNORED_BY_CLI = {
    "it runs no model, so it has no blocks": {"BlockStarted", "BlockAdvanced", "BlockFinished"},
    "it calibrates nothing": {"CalibrationAdvanced", "CalibrationFinished"},
    "the report follows, which it prints": {"RunFinished"},
}
IGNORED_BY_NODES = {
    "pages show the layers that are finished": {"LayerStarted"},
    "its text is a message of the node, and the report has it": {"DeviceFailed"},
}


def messages_of_nodes() -> set[str]:
    """Keys of the table of messages, read from its file: its module needs ComfyUI."""
    tree = ast.parse((ROOT / "nodes" / "ui" / "progress.py").read_text(encoding="utf-8"))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "_MESSAGES")
    return {key.id for key in table.keys}


def test_every_event_is_public():
    assert set(events.__all__) >= EVENTS


def test_the_command_line_shows_every_event_or_ignores_it_for_a_reason():
    shown = {name for name in EVENTS if hasattr(progress, name)}
    assert sorted([*shown, *set().union(*IGNORED_BY_CLI.values())]) == sorted(EVENTS)


def test_nodes_send_every_event_or_ignore_it_for_a_reason():
    assert sorted([*messages_of_nodes(), *set().union(*IGNORED_BY_NODES.values())]) == sorted(EVENTS)
