"""The prompt that runs: outputs in use, progress, messages to pages, interrupts."""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping

import comfy.model_management
import comfy.utils
from aiohttp import web
from server import PromptServer

__all__ = [
    "add_route",
    "is_interrupt",
    "latest_outputs",
    "outputs_in_use",
    "outputs_in_use_of_running_prompt",
    "progress_bar",
    "running_prompt",
    "send",
    "show",
]

log = logging.getLogger(__name__)


def outputs_in_use(prompt, node_id: str) -> set[int]:
    """Which outputs of a node something is connected to. ``prompt``: ComfyUI's DynamicPrompt."""
    nodes = {key: prompt.get_node(key) for key in prompt.all_node_ids()}
    return {slot for source, slot in _links(nodes) if source == node_id}


def _links(nodes: Mapping[str, dict]) -> Iterator[tuple[str, int]]:
    for node in nodes.values():
        for value in node.get("inputs", {}).values():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
                yield str(value[0]), value[1]


def outputs_in_use_of_running_prompt(node_class: str) -> str:
    """For all nodes of that class in the prompt now running: which of their outputs are in use."""
    running = _running()
    nodes = running[2] if running else {}
    ours = {key for key, node in nodes.items() if node.get("class_type") == node_class}
    return json.dumps(sorted({link for link in _links(nodes) if link[0] in ours}))


def _running() -> tuple | None:
    """ComfyUI's queue item of the prompt now running: (number, id, nodes, extra data, …)."""
    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    return running[0] if running else None


def running_prompt() -> dict[str, str | None]:
    """The ids of the prompt now running and of its workflow, which a prompt that came from no page has not."""
    running = _running()
    if running is None:
        return {"prompt": None, "workflow": None}
    return {"prompt": running[1], "workflow": _workflow(running)}


def _workflow(item: tuple) -> str | None:
    """The id of the workflow of a queue item."""
    info = item[3].get("extra_pnginfo")
    workflow = info.get("workflow") if isinstance(info, dict) else None
    return (workflow.get("id") or None) if isinstance(workflow, dict) else None


def latest_outputs(workflow: str, classes: str, keys: Collection[str]) -> dict[str, dict[str, list]]:
    """Node id → what it put out for the page under ``keys`` last, in prompts of a workflow.

    Of nodes whose class begins with ``classes``. Where ComfyUI had a node's result at hand the node put out nothing; then it is
    what was put out in the prompt that made the result, which may be another workflow's.
    """
    queue, running, found = PromptServer.instance.prompt_queue, _running(), {}
    with queue.mutex:
        entries = list(queue.history.values())
    prompts = [entry["prompt"] for entry in entries] + [running] * (running is not None)
    latest = next((prompt[2] for prompt in reversed(prompts) if _workflow(prompt) == workflow), {})
    for entry in entries:
        nodes, is_ours = entry["prompt"][2], _workflow(entry["prompt"]) == workflow
        for node_id, output in entry["outputs"].items():
            wanted = {key: list(output[key]) for key in keys if key in output}
            if (
                wanted
                and nodes.get(node_id, {}).get("class_type", "").startswith(classes)
                and (is_ours or _alike(node_id, nodes, latest))
            ):
                found[node_id] = wanted
    return found


def _alike(node_id: str, one: Mapping[str, dict], other: Mapping[str, dict]) -> bool:
    """Whether a node and all that lead to it are the same in two prompts."""
    todo, seen = [node_id], set()
    while todo:
        key = todo.pop()
        if key in seen:
            continue
        seen.add(key)
        if any(one.get(key, {}).get(part) != other.get(key, {}).get(part) for part in ("class_type", "inputs")):
            return False
        todo.extend(source for source, _ in _links({key: one.get(key, {})}))
    return True


def send(event: str, payload: dict, *, everyone: bool = False) -> None:
    """To the client that queued the running prompt, or to all."""
    server = PromptServer.instance
    server.send_sync(event, payload, None if everyone else server.client_id)


def add_route(path: str, answer: Callable[[Mapping[str, str]], object]) -> None:
    """Answer GET requests: ``answer`` makes JSON values of the query, or raises ValueError with what is wrong with it."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.get(path)
    async def get(request):
        try:
            return web.json_response(answer(request.query))
        except ValueError as error:
            return web.Response(status=400, text=str(error))


def show(text: str) -> None:
    """On the node that runs, and in the log."""
    log.info("%s", text)
    server = getattr(PromptServer, "instance", None)
    if server is not None and server.last_node_id is not None:
        server.send_progress_text(text, server.last_node_id, server.client_id)


def progress_bar(total: int, node_id: str):
    """ComfyUI's own progress bar on the node."""
    return comfy.utils.ProgressBar(total, node_id=node_id)


def is_interrupt(error: BaseException) -> bool:
    """Whether the user cancelled."""
    return isinstance(error, comfy.model_management.InterruptProcessingException)
