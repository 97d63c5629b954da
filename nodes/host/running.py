"""The running prompt: outputs in use, progress, messages to pages, interrupts."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import comfy.model_management
import comfy.utils
from aiohttp import web
from comfyui_version import __version__
from server import PromptServer

__all__ = [
    "add_route",
    "add_value_route",
    "is_interrupt",
    "latest_outputs",
    "outputs_in_use",
    "outputs_in_use_of_running_prompt",
    "progress_bar",
    "renders_markdown",
    "running_prompt",
    "send_message",
    "show_text",
]

log = logging.getLogger(__name__)

_BODY = 1000  # bytes of the body of a POST request


def outputs_in_use(prompt, node_id: str) -> set[int]:
    """Indices of the connected outputs of a node. ``prompt``: ComfyUI's DynamicPrompt."""
    nodes = {key: prompt.get_node(key) for key in prompt.all_node_ids()}
    return {slot for source, slot in _links(nodes) if source == node_id}


def _links(nodes: Mapping[str, dict]) -> Iterator[tuple[str, int]]:
    """(node id, output index) of every connection in a prompt."""
    for node in nodes.values():
        for value in node.get("inputs", {}).values():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
                yield str(value[0]), value[1]


def outputs_in_use_of_running_prompt(node_class: str) -> str:
    """Connected outputs of all nodes of that class in the running prompt, as JSON."""
    running = _running()
    nodes = running[2] if running else {}
    ours = {key for key, node in nodes.items() if node.get("class_type") == node_class}
    return json.dumps(sorted({link for link in _links(nodes) if link[0] in ours}))


def _running() -> tuple | None:
    """ComfyUI's queue item of the running prompt: (number, id, nodes, extra data, …)."""
    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    return running[0] if running else None


def running_prompt() -> dict[str, str | None]:
    """Ids of the running prompt and of its workflow; None for a prompt that was not queued by a page."""
    running = _running()
    if running is None:
        return {"prompt": None, "workflow": None}
    return {"prompt": running[1], "workflow": _workflow(running)}


def _workflow(item: tuple) -> str | None:
    """The workflow id of a queue item; None where it has none."""
    info = item[3].get("extra_pnginfo")
    workflow = info.get("workflow") if isinstance(info, dict) else None
    return (workflow.get("id") or None) if isinstance(workflow, dict) else None


def latest_outputs(workflow: str, classes: str, keys: Collection[str]) -> dict[str, dict[str, list]]:
    """Latest outputs for the page, in prompts of a workflow: {node id: {key: values}}.

    A cached node has no output for the page in its prompt. Its output is then that of the prompt that computed the result,
    which may belong to another workflow.

    Args:
        classes: prefix of the class names of the nodes.
        keys: keys of the outputs.
    """
    queue, running, found = PromptServer.instance.prompt_queue, _running(), {}
    with queue.mutex:
        entries = list(queue.history.values())
    prompts = [entry["prompt"] for entry in entries] + [running] * (running is not None)
    latest = next((prompt[2] for prompt in reversed(prompts) if _workflow(prompt) == workflow), {})
    for entry in entries:
        nodes, same_workflow = entry["prompt"][2], _workflow(entry["prompt"]) == workflow
        for node_id, output in entry["outputs"].items():
            wanted = {key: list(output[key]) for key in keys if key in output}
            if (
                wanted
                and nodes.get(node_id, {}).get("class_type", "").startswith(classes)
                and (same_workflow or _has_same_inputs(node_id, nodes, latest))
            ):
                found[node_id] = wanted
    return found


def _has_same_inputs(node_id: str, one: Mapping[str, dict], other: Mapping[str, dict]) -> bool:
    """Whether a node and all nodes that it depends on are equal in two prompts."""
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


def send_message(event: str, payload: dict, *, everyone: bool = False) -> None:
    """Send a message to the client that queued the running prompt, or to all clients."""
    server = PromptServer.instance
    server.send_sync(event, payload, None if everyone else server.client_id)


def add_route(path: str, answer: Callable[[Mapping[str, str]], object]) -> None:
    """Add a GET route. ``answer`` returns JSON values for the query, or raises ValueError with the text of a 400 response.

    A query with the same name twice is refused.
    """

    async def answer_query(request) -> object:
        if len(set(request.query)) < len(request.query):
            raise ValueError(f"{path} takes each parameter once.")
        return answer(request.query)

    _add_route("get", path, answer_query)


def add_value_route(
    path: str, change: Callable[[object], object], *, limit: int = _BODY, in_thread: bool = False
) -> None:
    """Add a POST route for a JSON value. ``change`` returns the JSON value of the answer, or raises ValueError with the text of
    a 400 response.

    Only the content type of JSON is accepted, which a page of another site cannot send without being asked.

    Args:
        limit: most bytes of the body.
        in_thread: call ``change`` in a thread of this route, one call after the other, because it reads files.
    """
    thread = ThreadPoolExecutor(1, f"learned_rounding {path}") if in_thread else None

    async def change_value(request) -> object:
        if request.content_type != "application/json":
            raise ValueError(f"{path} requires the content type application/json.")
        body = b""
        while len(body) <= limit and (part := await request.content.read(limit + 1 - len(body))):
            body += part
        if len(body) > limit:
            raise ValueError(f"{path} takes at most {limit:,} bytes.")
        value = _parse_json(body)
        return (
            change(value) if thread is None else await asyncio.get_running_loop().run_in_executor(thread, change, value)
        )

    _add_route("post", path, change_value)


def _add_route(method: str, path: str, answer: Callable[[Any], Awaitable[object]]) -> None:
    """Add a route to ComfyUI's server, if there is one: ``answer`` of the request as JSON, or its ValueError as a 400 response."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    async def respond(request):
        try:
            return web.json_response(await answer(request))
        except ValueError as error:
            return web.Response(status=400, text=str(error))

    getattr(server.routes, method)(path)(respond)


def _parse_json(body: bytes) -> object:
    """The value of a JSON text. Raises ValueError."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("The body is not valid JSON.") from None


def show_text(text: str, level: int = logging.INFO) -> None:
    """Show a text on the running node, and log it on that level of ``logging``."""
    log.log(level, "%s", text)
    server = getattr(PromptServer, "instance", None)
    if server is not None and server.last_node_id is not None:
        server.send_progress_text(text, server.last_node_id, server.client_id)


def renders_markdown() -> bool:
    """Whether pages of this ComfyUI render Markdown in Preview as Text, as those of 0.4 and newer do."""
    return tuple(map(int, __version__.split(".")[:2])) >= (0, 4)


def progress_bar(total: int, node_id: str):
    """ComfyUI's progress bar of a node."""
    return comfy.utils.ProgressBar(total, node_id=node_id)


def is_interrupt(error: BaseException) -> bool:
    """Whether the error is ComfyUI's interrupt by the user."""
    return isinstance(error, comfy.model_management.InterruptProcessingException)
