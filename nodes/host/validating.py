"""One error for the one wrong input of a node of this pack.

ComfyUI reports the sentence of ``validate_inputs`` once for each of its parameters, so that one wrong pattern marks every input
of a node. The page shows the text of a failed check of an input at once, that of ``validate_inputs`` only on request.
"""

import functools
import logging
from collections.abc import Callable, Mapping

import execution

__all__ = ["find_wrong_input", "report_wrong_inputs"]

log = logging.getLogger(__name__)

_FUNCTION = "validate_inputs"  # of ComfyUI's module execution, and of the nodes
_OURS = "LearnedRounding"  # prefix of the ids of our nodes
_ANY_INPUT = "custom_validation_failed"  # ComfyUI's error for each parameter of validate_inputs
_ONE_INPUT = "exception_during_inner_validation"  # an error whose text pages show at once

Check = Callable[..., bool | str]
"""``validate_inputs`` of a node: True, or a sentence. Every parameter may be left out."""


def find_wrong_input(check: Check, values: Mapping[str, object]) -> tuple[str, str]:
    """(input, sentence) of values that ``check`` refuses: the first input that is wrong by itself, else the last of a contradiction."""
    for name, value in values.items():
        if (answer := check(**{name: value})) is not True:
            return name, str(answer)
    for name in reversed([*values]):
        if check(**{other: value for other, value in values.items() if other != name}) is True:
            break
    return name, str(check(**values))


def report_wrong_inputs() -> None:
    """Wrap ComfyUI's check of a node, so that each node of this pack reports one wrong input."""
    check_node = getattr(execution, _FUNCTION, None)
    if check_node is None:
        log.warning("Learned Rounding: this ComfyUI checks inputs in another way; a wrong input marks several.")
    elif not hasattr(check_node, "__wrapped__"):
        setattr(execution, _FUNCTION, _wrap_check(check_node))


def _wrap_check(check_node):
    @functools.wraps(check_node)
    async def check_one_node(prompt_id, prompt, node_id, *others):
        result = await check_node(prompt_id, prompt, node_id, *others)
        kind, errors = prompt[node_id]["class_type"], result[1]
        names = [error["extra_info"]["input_name"] for error in errors if error["type"] == _ANY_INPUT]
        if names and kind.startswith(_OURS):
            values = {name: prompt[node_id]["inputs"][name] for name in names}
            check = getattr(execution.nodes.NODE_CLASS_MAPPINGS[kind], _FUNCTION)
            others = [error for error in errors if error["type"] != _ANY_INPUT]
            errors[:] = [*others, _error(*find_wrong_input(check, values))]  # the list is ComfyUI's record of the node
        return result

    return check_one_node


def _error(name: str, sentence: str) -> dict:
    return {
        "type": _ONE_INPUT,
        "message": f"Invalid {name}",
        "details": sentence,
        "extra_info": {"input_name": name},
    }
