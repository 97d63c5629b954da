"""Checks of in_process.py: messages to pages, and the identity of sources."""

import itertools
import json
from pathlib import Path

import folder_paths
import torch
from pack.nodes import host
from pack.nodes.host.quantizing import _merge_reports
from pack.nodes.ui import progress
from pack.quant_core import QuantizationError, Recipe
from pack.quant_core.events import (
    BlockAdvanced,
    BlockFinished,
    BlockStarted,
    CalibrationAdvanced,
    CalibrationFinished,
    RunFinished,
)
from pack.quant_core.run.blocks import WalkSummary
from pack.quant_core.run.report import Report
from safetensors.torch import save_file

MODELS = Path(folder_paths.models_dir) / "diffusion_models"
# Error message with {} for a folder → message to pages.
ERRORS = {
    "{}/sub folder/a model.safetensors cannot be read: no such file.": "sub folder/a model.safetensors cannot be read: no such file.",
    "'x' is no file name inside {}; give a name.": "'x' is no file name inside diffusion_models; give a name.",
    "'/srv/other disk/b.pt' or C:\\Users\\me\\c.gguf or \\\\server\\share\\d.pt was changed.": "'b.pt' or c.gguf or d.pt was changed.",
    "/home/John Smith/secret project/a model.pt, C:\\Users\\John Smith\\My Files\\b.pt or /home/John's//c.pt exists.": "a model.pt, b.pt or c.pt exists.",
    "/srv/disk 1/a.pt: blocks/0 is no layer; see b/c.": "a.pt: blocks/0 is no layer; see b/c.",
    "See https://example.org/a/b and 1/2 and a/b.": "See https://example.org/a/b and 1/2 and a/b.",
}


def stopped() -> dict:
    """Messages of runs that end by an error."""
    sent = []
    numbers = itertools.count()
    host.running_prompt, host.latest_outputs = (
        lambda: {"prompt": str(next(numbers)), "workflow": "2"},
        lambda *_: {},
    )  # there is no server here
    host.send_message = lambda event, message, everyone: sent.append(message["reason"])
    for error in (
        *(QuantizationError(text.format(MODELS)) for text in ERRORS),
        OSError(2, "no such file", str(MODELS / "x")),
    ):
        try:
            with progress.NodeProgress("3"):
                raise error
        except (QuantizationError, OSError):
            continue
    kept = [message["reason"] for node in progress._answer_query({"workflow": "2"}) for message in node["run"]]
    return {"sent": sent, "wanted": [*ERRORS.values(), "FileNotFoundError: see ComfyUI's log."], "kept": kept}


def twice() -> dict:
    """Sequence numbers of the messages of four runs: two of one prompt, one without messages, one of the next prompt."""
    sent, prompt = [], "first"
    host.running_prompt, host.latest_outputs = lambda: {"prompt": prompt, "workflow": "3"}, lambda *_: {}
    host.send_message = lambda event, message, everyone: sent.append(message["seq"])
    host.progress_bar = lambda total, node: None

    def run(node: str) -> None:
        with progress.NodeProgress(node) as listener:
            listener(CalibrationAdvanced(1, "steps", 1, 2, 0.5))
            listener(CalibrationFinished(1, 2, 3, 4.0))

    def kept() -> list:
        return [message for node in progress._answer_query({"workflow": "3"}) for message in node["run"]]

    with progress.NodeProgress("3"):
        pass
    empty = kept()
    run("3")
    run("3")
    prompt = "second"
    with progress.NodeProgress("3"):
        pass
    prompt = "third"
    run("3")
    return {"sent": sent, "kept": [[message["prompt"], message["seq"]] for message in kept()], "empty": empty}


def blocks() -> list:
    """Messages of one block of a rounding that runs the model, as pages get them."""
    sent = []
    host.running_prompt, host.latest_outputs = lambda: {"prompt": "1", "workflow": "4"}, lambda *_: {}
    host.send_message = lambda event, message, everyone: sent.append(message)
    with progress.NodeProgress("3") as listener:
        listener(BlockStarted(2, 57, "double_blocks.2"))
        listener(BlockAdvanced(2, 57, "double_blocks.2", "rounding", 1, 5))
        listener(BlockFinished(2, 57, "double_blocks.2", "sequential", 0.25, 0.5, None))
    return json.loads(json.dumps(sent))


def parts() -> dict:
    """The merged report of two text encoders, in messages and text: nothing of the second one is lost."""
    reports = {
        part: Report(
            part, "int8_tensorwise", "row", "sequential", "clip", seconds=1.0, bytes_in=4, bytes_out=2, taken_up=taken_up,
            sequential=WalkSummary("9.0", 4, error),
        )
        for part, error, taken_up in (("clip_l", 0.01, 3), ("t5xxl", 0.02, 4))
    }  # fmt: skip
    merged = _merge_reports(reports)
    message = progress._end_message(RunFinished(merged))
    lines = [line for line in merged.table().splitlines() if line.startswith("model output")]
    return {"errors": message["model_errors"], "resumed": message["resumed"], "lines": lines}


def reused() -> dict:
    """Messages of a node that uses the result of another node's run, in another workflow too."""
    ids = {"prompt": "1", "workflow": "first"}
    host.running_prompt, host.latest_outputs = lambda: dict(ids), lambda *_: {}
    host.send_message = lambda *_, **__: None
    report = Report("a", "int8_tensorwise", "row", "nearest", "none")

    def run(node: str, made: bool) -> str:
        with progress.NodeProgress(node) as listener:
            if made:
                listener(RunFinished(report))
            return listener.summarize(RunFinished(report))["learned_rounding"][0]["id"]

    first = run("3", True)
    ids.update(prompt="2", workflow="second")
    second = run("7", False)
    answers = {name: progress._answer_query({"workflow": name}) for name in ("first", "second")}
    cached = {"learned_rounding": [{"state": "done", "id": first}]}
    host.latest_outputs = lambda workflow, *_: {"9": cached} if workflow == "third" else {}
    (third,) = progress._answer_query({"workflow": "third"})
    return {
        "nodes": [[entry["node"] for entry in answer] for answer in answers.values()],
        "same": answers["first"][0]["run"] == answers["second"][0]["run"] == third["run"] != [],
        "ids": [first, second],
    }


def shards() -> dict:
    """A changed shard changes the source for Load Model and for Quantize."""
    MODELS.mkdir(parents=True, exist_ok=True)
    index, names = (
        MODELS / "two.safetensors.index.json",
        ("two-00001-of-00002.safetensors", "two-00002-of-00002.safetensors"),
    )

    def write(name: str, seed: int) -> None:
        save_file(
            {f"blocks.{name[4:9]}.weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))},
            MODELS / name,
        )

    for name in names:
        write(name, 0)
    index.write_text(json.dumps({"weight_map": {f"blocks.{name[4:9]}.weight": name for name in names}}))

    def made() -> tuple:
        source = host.FileSource.choose("diffusion_models/two.safetensors.index.json", "sd3")
        recipe = Recipe(rounding="nearest", preset="none")
        return host.choice_stamp("diffusion_models/two.safetensors.index.json"), host.quantize(
            source, recipe, lambda event: None
        ).files[""].read_bytes()

    first, again = made(), made()
    write(names[1], 1)
    changed = made()
    (MODELS / names[0]).unlink()
    return {
        "same": first == again,
        "state changed": changed[0] != first[0],
        "result changed": changed[1] != first[1],
        "without a shard": len(host.choice_stamp("diffusion_models/two.safetensors.index.json")),
    }


CHECKS = {f"progress_{check.__name__}": check for check in (stopped, twice, blocks, parts, reused, shards)}
