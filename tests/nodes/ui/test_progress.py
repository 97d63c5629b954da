"""Messages to pages about a run, and the replay of stored ones."""

import itertools
import json
from pathlib import Path

import pytest

from learned_rounding.quant_core import QuantizationError
from learned_rounding.quant_core.events import (
    BlockAdvanced,
    BlockFinished,
    BlockStarted,
    CalibrationAdvanced,
    CalibrationFinished,
    RunFinished,
)
from learned_rounding.quant_core.run.report import Report
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    import folder_paths

    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.ui import progress

pytestmark = pytest.mark.usefixtures("in_comfyui")


class Page:
    """Stand-in of a server with one page.

    Attributes:
        ids: ids of the running prompt and workflow.
        outputs: workflow → outputs that ComfyUI has cached, by node.
        messages: what was sent.
    """

    def __init__(self, monkeypatch):
        self.ids, self.outputs, self.messages = {"prompt": "1", "workflow": "2"}, {}, []
        monkeypatch.setattr(pack, "running_prompt", lambda: dict(self.ids))
        monkeypatch.setattr(pack, "latest_outputs", lambda workflow, *_: self.outputs.get(workflow, {}))
        monkeypatch.setattr(pack, "send_message", lambda event, message, everyone: self.messages.append(message))
        monkeypatch.setattr(pack, "progress_bar", lambda total, node: None)

    def request(self, workflow: str) -> list[dict]:
        """The stored messages of a workflow, by node."""
        return progress._answer_query({"workflow": workflow})


@pytest.fixture
def page(monkeypatch):
    return Page(monkeypatch)


# Error message with {} for a folder → message to pages.
ERRORS = {
    "{}/sub folder/a model.safetensors cannot be read: no such file.": "sub folder/a model.safetensors cannot be read: no such file.",
    "'x' is no file name inside {}; give a name.": "'x' is no file name inside diffusion_models; give a name.",
    "'/srv/other disk/b.pt' or C:\\Users\\me\\c.gguf or \\\\server\\share\\d.pt was changed.": "'b.pt' or c.gguf or d.pt was changed.",
    "/home/John Smith/secret project/a model.pt, C:\\Users\\John Smith\\My Files\\b.pt or /home/John's//c.pt exists.": "a model.pt, b.pt or c.pt exists.",
    "/srv/disk 1/a.pt: blocks/0 is no layer; see b/c.": "a.pt: blocks/0 is no layer; see b/c.",
    "See https://example.org/a/b and 1/2 and a/b.": "See https://example.org/a/b and 1/2 and a/b.",
}


def test_error_messages_to_pages_contain_no_folders(page, subtests):
    numbers, folder = itertools.count(), Path(folder_paths.models_dir) / "diffusion_models"
    errors = [(QuantizationError(text.format(folder)), shown) for text, shown in ERRORS.items()]
    errors.append((OSError(2, "no such file", str(folder / "x")), "FileNotFoundError: see ComfyUI's log."))
    for error, shown in errors:
        page.ids["prompt"] = str(next(numbers))
        with subtests.test(shown):
            with pytest.raises(type(error)), progress.NodeProgress("3"):
                raise error
            assert page.messages[-1]["reason"] == shown
            ((stored,),) = (node["run"] for node in page.request("2"))  # the latest run of the node
            assert stored["reason"] == shown


def calibrate(node: str) -> None:
    """Two messages of a run."""
    with progress.NodeProgress(node) as listener:
        listener(CalibrationAdvanced(1, "steps", 1, 2, 0.5))
        listener(CalibrationFinished(1, 2, 3, 4.0))


def run_without_messages(node: str) -> None:
    with progress.NodeProgress(node):
        pass


def test_two_executions_in_one_prompt_are_one_run(page):
    calibrate("3")
    calibrate("3")
    assert [message["seq"] for message in page.messages] == [0, 1, 2, 3]


def test_latest_run_with_messages_is_stored(page):
    run_without_messages("3")
    assert page.request("2") == []
    calibrate("3")
    page.ids["prompt"] = "second"
    run_without_messages("3")
    page.ids["prompt"] = "third"
    calibrate("3")
    ((first, second),) = (node["run"] for node in page.request("2"))
    assert {first["prompt"], second["prompt"]} == {"third"}
    assert [first["seq"], second["seq"]] == [0, 1]


def test_blocks_and_their_steps_are_sent_to_pages(page):
    with progress.NodeProgress("3") as listener:
        listener(BlockStarted(2, 57, "double_blocks.2"))
        listener(BlockAdvanced(2, 57, "double_blocks.2", "rounding", 1, 5))
        listener(BlockFinished(2, 57, "double_blocks.2", "sequential", 0.25, 0.5, None))
    _, advanced, finished = sent = json.loads(json.dumps(page.messages))
    block = {"state": "block", "index": 2, "total": 57, "name": "double_blocks.2"}
    for message in sent:
        assert {key: message[key] for key in block} == block
    assert advanced["step"] == "rounding"
    assert advanced["done"] == 1
    assert advanced["total_steps"] == 5
    assert finished["kept"] == "sequential"
    assert finished["error"] == 0.25
    assert finished["calibrated_error"] == 0.5


def test_a_node_that_uses_an_earlier_result_has_the_messages_of_its_run(page):
    """In another workflow too, and in a third one whose node ComfyUI has cached."""
    report = Report("a", "int8_tensorwise", "row", "nearest", "none")

    def run(node: str, quantizes: bool) -> str:
        with progress.NodeProgress(node) as listener:
            if quantizes:
                listener(RunFinished(report))
            return listener.summarize(RunFinished(report))["learned_rounding"][0]["id"]

    page.ids.update(prompt="1", workflow="first")
    assert run("3", True) == "1/3"
    page.ids.update(prompt="2", workflow="second")
    assert run("7", False) == "2/7"
    page.outputs["third"] = {"9": {"learned_rounding": [{"state": "done", "id": "1/3"}]}}
    (first,), (second,), (third,) = (page.request(workflow) for workflow in ("first", "second", "third"))
    assert first["node"] == "3"
    assert second["node"] == "7"
    assert first["run"] != []
    assert second["run"] == first["run"]
    assert third["run"] == first["run"]
