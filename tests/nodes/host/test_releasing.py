"""Requests of the user to free memory."""

import functools
from types import SimpleNamespace
from unittest.mock import patch

from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.host import releasing


def test_requests_are_followed_once_beside_wrappers_of_another_pack(in_comfyui):
    """Wrappers of another pack are before and after ours."""
    queue = SimpleNamespace(get_flags=lambda: {"free_memory": True})
    server = SimpleNamespace(instance=SimpleNamespace(prompt_queue=queue))
    released = []

    def wrap() -> None:
        queue.get_flags = functools.wraps(queue.get_flags)(lambda take=queue.get_flags: take())

    with (
        patch.object(releasing, "PromptServer", server),
        patch.object(releasing, "forget_last_result", lambda: released.append(True)),
    ):
        for number, step in enumerate((wrap, pack.follow_free_requests, wrap, pack.follow_free_requests)):
            step()
            queue.get_flags()
            assert len(released) == number
