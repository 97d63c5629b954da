"""The prompt that runs: outputs in use, progress, messages to its client, interrupts."""

import json
import logging
from collections.abc import Iterator, Mapping

import comfy.model_management
import comfy.utils
from server import PromptServer

__all__ = ["is_interrupt", "outputs_in_use", "outputs_in_use_of_running_prompt", "progress_bar", "send", "show"]

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
    running, _ = PromptServer.instance.prompt_queue.get_current_queue()
    nodes = running[0][2] if running else {}
    ours = {key for key, node in nodes.items() if node.get("class_type") == node_class}
    return json.dumps(sorted({link for link in _links(nodes) if link[0] in ours}))


def send(event: str, payload: dict) -> None:
    """To the client that queued the running prompt."""
    server = PromptServer.instance
    server.send_sync(event, payload, server.client_id)


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
