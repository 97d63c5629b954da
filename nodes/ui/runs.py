"""Messages of the latest runs, for pages that missed them and for nodes that use the result of an earlier run."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Run", "find_latest_runs", "find_run", "open_run", "reuse_run"]

_RUNS = 16  # stored runs; 1 MB each for a model of 2,000 layers


@dataclass
class Run:
    """The runs of one node in one prompt: ComfyUI executes a node once for each item of a list.

    Attributes:
        id: of prompt and node; in the output of the node, also where ComfyUI's cache provides it.
        workflow, node: where its panel is.
        prompt: id of the prompt.
        messages: all messages, in order.
        results: reports of its finished runs.
    """

    id: str
    workflow: str
    node: str
    prompt: str | None
    messages: list[dict] = field(default_factory=list)
    results: list[object] = field(default_factory=list)


_runs: OrderedDict[str, Run] = OrderedDict()  # by id; the latest is last


def open_run(workflow: str | None, node: str, prompt: str | None) -> Run:
    """The run of a node in a prompt, new for its first execution; not stored without a workflow, which no page can ask for."""
    run = Run(f"{prompt}/{node}", workflow or "", node, prompt)
    return _store(_runs.get(run.id, run)) if workflow else run


def reuse_run(run: Run, result: object) -> None:
    """Give an empty run the messages of the stored run with this result, if there is one."""
    made = next((other for other in _runs.values() if any(result is each for each in other.results)), None)
    if made and run.workflow and not run.messages:
        run.messages, run.results = made.messages, made.results
        _store(run)


def find_latest_runs(workflow: str) -> dict[str, Run]:
    """Node → its latest run with messages in this workflow."""
    return {run.node: run for run in _stored() if run.workflow == workflow}


def find_run(id: object) -> Run | None:
    """The stored run with this id and messages."""
    return next((run for run in _stored() if run.id == id), None)


def _stored() -> Iterator[Run]:
    return (run for run in tuple(_runs.values()) if run.messages)


def _store(run: Run) -> Run:
    _runs[run.id] = run
    _runs.move_to_end(run.id)
    while len(_runs) > _RUNS:
        _runs.popitem(last=False)
    return run
