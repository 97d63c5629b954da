"""One server for a long day: many runs, many pages, prompts that wait, interrupts, and requests that no page sends."""

import json
import random
import threading
import urllib.error
import urllib.request
import uuid
from contextlib import ExitStack, closing

import psutil
import pytest
import torch
import websocket
from safetensors.torch import save_file

from learned_rounding.hosts import HostError, HostInterrupted
from learned_rounding.quant_core.output import verify_file
from learned_rounding.tests.nodes.probing import ProbedGraph

pytestmark = pytest.mark.soak

PROGRESS = "learned_rounding.progress"
GROWTH = 64e6  # bytes: more than what one run leaves to the allocator, a third of what twenty would if nothing was given back
ON_GPU = 1e6  # bytes: half a layer of one run
SEED = 20


@pytest.fixture
def source(comfy):
    """Twelve layers of 2 MB, as Load Model names them."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.randn(1024, 1024, generator=generator).bfloat16()
    path = comfy.models_dir / "diffusion_models" / "twelve.safetensors"
    if not path.exists():
        save_file({f"blocks.{index}.mlp.weight": layer.roll(index) for index in range(12)}, path)
    return f"diffusion_models/{path.name}"


def graph(source: str, seed: int, save: str | None = None) -> ProbedGraph:
    made = ProbedGraph()
    quantized = made.quantize(made.source(source)[0], rounding="nearest", seed=seed, general=True)
    if save:
        made.save(quantized, save)
    else:
        made.add("PreviewAny", source=quantized[3])
    return made


def on_gpu(comfy) -> dict[str, int]:
    """Bytes of the GPU in the server's tensors, and in blocks of its allocator; nothing where it runs on the CPU."""
    (device, *_) = comfy.get("/system_stats")["devices"]
    if device["type"] == "cpu":
        return {}
    return {
        "tensors": device["torch_vram_total"] - device["torch_vram_free"],
        "blocks": device["torch_vram_total"],  # of this server only: others may share the GPU
    }


def leftovers(comfy) -> list[str]:
    return [path.name for path in (comfy.base / ".learned_rounding").glob("*")]


def test_many_runs_in_one_server_leave_nothing_behind(comfy, source, often, tried):
    process = psutil.Process(comfy.pid)
    runs = often(20, 200)

    def used() -> dict[str, int]:
        comfy.queue(graph(source, seed=5000))  # what is kept of the last run is the same each time
        comfy.free(free_memory=False)  # also empties torch's pool of pinned memory
        for _ in range(2):  # the second one is executed after the flag is taken
            comfy.queue(graph(source, seed=5000))
        temporary = sum(1 for path in (comfy.base / "temp").glob("learned_rounding*"))
        taken = {
            "threads": process.num_threads(),
            "files": process.num_fds(),
            "temporary": temporary,
            "memory": process.memory_info().rss,
        }
        return taken | on_gpu(comfy)

    for seed in range(8):
        comfy.queue(graph(source, seed=6000 + seed))
    before = used()
    for seed in range(runs):
        comfy.queue(graph(source, seed=7000 + seed))
    after = used()
    assert after.pop("memory") - before.pop("memory") < GROWTH
    assert after["threads"] <= before["threads"] + 2
    assert after["files"] <= before["files"] + 2  # ComfyUI's own pools
    assert after["temporary"] <= before["temporary"]
    gpu = "tensors" in after
    if gpu:
        assert after["tensors"] - before["tensors"] < ON_GPU
        assert after["blocks"] - before["blocks"] < GROWTH
    assert not leftovers(comfy)
    tried("quantize runs in one server", runs, f"no growth of memory, {'GPU memory, ' if gpu else ''}threads, files")


def listen(socket_, prompts: int) -> list[dict]:
    """Our messages until as many prompts have ended."""
    found = []
    while prompts:
        message = socket_.recv()
        if isinstance(message, str):
            message = json.loads(message)
            found += [message["data"]] if message["type"] == PROGRESS else []
            prompts -= message["type"] == PROGRESS and message["data"]["state"] == "done"
    return found


def test_twenty_pages_see_the_same_and_one_that_never_reads_stops_nobody(comfy, source, tried):
    pages, workflow = 20, uuid.uuid4().hex
    with ExitStack() as opened:
        sockets = []
        for _ in range(pages + 1):
            url = f"ws://127.0.0.1:{comfy.port}/ws?clientId={uuid.uuid4().hex}"
            sockets.append(
                opened.enter_context(
                    closing(websocket.create_connection(url, timeout=120, http_no_proxy=["127.0.0.1"]))
                )
            )
        for socket_ in sockets[:-1]:  # the last one never reads
            socket_.recv()
        results = {}
        threads = [
            threading.Thread(target=lambda index=index, socket_=socket_: results.update({index: listen(socket_, 3)}))
            for index, socket_ in enumerate(sockets[:-1])
        ]
        for thread in threads:
            thread.start()
        for seed in range(3):  # the second and the third wait while the first one runs
            body = {
                "prompt": graph(source, seed=8000 + seed),
                "extra_data": {"extra_pnginfo": {"workflow": {"id": workflow}}},
            }
            comfy.post("/prompt", body)
        for thread in threads:
            thread.join()
    first = results[0]
    assert len(results) == pages
    assert all(found == first for found in results.values())
    assert [message["state"] for message in first].count("layer") == 3 * 12
    prompts = list(dict.fromkeys(message["prompt"] for message in first))
    assert len(prompts) == 3
    for prompt in prompts:  # 12 layers, the start and the end; reports of the final check depend on its speed
        numbers = [message["seq"] for message in first if message["prompt"] == prompt]
        assert len(numbers) >= 14
        assert numbers == list(range(len(numbers)))
    (latest,) = (node["run"] for node in comfy.get(f"/learned_rounding/progress?workflow={workflow}") if "run" in node)
    assert latest == [message for message in first if message["prompt"] == prompts[-1]]
    tried("pages that watch three runs, and one that never reads", pages, "the same messages, in order")


# When a page cancels: whether what it is told is that. ``node``: class of a node → its id.
MOMENTS = {
    "the source is read": lambda node, event: (
        event.type == "executing" and event.data.get("node") == node("LearnedRoundingLoadModel")
    ),
    "the run starts": lambda node, event: event.type == PROGRESS and event.data["state"] == "start",
    "the run is done": lambda node, event: event.type == PROGRESS and event.data["state"] == "done",
    "the model is saved": lambda node, event: (
        event.type == "executing" and event.data.get("node") == node("LearnedRoundingSave")
    ),
}


def layer(index: int):
    return lambda node, event: (
        event.type == PROGRESS and event.data["state"] == "layer" and event.data["index"] == index
    )


def test_interrupts_at_random_points_leave_nothing(comfy, source, often, tried):
    draw, count, interrupted = random.Random(SEED), often(8, 60), 0
    before = set(comfy.output_dir.rglob("*"))
    moments = [*MOMENTS.values(), *map(layer, range(12))]
    for seed in range(count):
        made, is_now = graph(source, seed=9000 + seed, save=f"interrupted{seed}"), draw.choice(moments)

        def node(kind: str, made=made) -> str:
            return next(key for key, entry in made.items() if entry["class_type"] == kind)

        def stop(event, is_now=is_now, node=node):
            if is_now(node, event):
                comfy.interrupt()

        try:
            comfy.queue(made, on_event=stop)
        except HostInterrupted:
            interrupted += 1
        assert not leftovers(comfy)
        for saved in set(comfy.output_dir.rglob("*.*")) - before:  # it was too late
            assert verify_file(saved).layers == 12
            saved.unlink()
    assert interrupted > count / 3  # of a node that only starts or ends, ComfyUI may hear too late
    comfy.queue(graph(source, seed=9999, save="afterwards"))
    (saved,) = comfy.output_dir.rglob("afterwards*")
    assert verify_file(saved).layers == 12
    saved.unlink()
    tried(
        "ComfyUI's interrupt when a node reads, at a random layer, between layers and save, when it saves",
        count,
        "whole or none",
    )


REQUESTS = (
    "/learned_rounding/progress",
    "/learned_rounding/progress?workflow=",
    "/learned_rounding/progress?workflow=../../etc/passwd",
    "/learned_rounding/progress?workflow=%00",
    f"/learned_rounding/progress?workflow={'x' * 4000}",
    "/learned_rounding/progress?workflow[]=1&workflow=2",
    "/learned_rounding/../../etc/passwd",
    "/extensions/learned_rounding/../../../nodes/__init__.py",
    "/extensions/learned_rounding/%2e%2e/%2e%2e/pyproject.toml",
    "/extensions/learned_rounding/..%2f..%2fpyproject.toml",
)


def test_requests_that_no_page_sends_get_nothing(comfy, tried):
    for path in REQUESTS:
        for method in ("GET", "POST", "PUT", "DELETE"):
            body = b"{" * 1000 if method != "GET" else None
            request = urllib.request.Request(comfy.url + path, data=body, method=method)
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = answer.read().decode(errors="replace")
                assert method == "GET", (path, text[:200])
                assert text.strip() in ("[]", ""), (path, text[:200])
            except urllib.error.HTTPError as error:
                text = error.read().decode(errors="replace")
                assert error.code < 500, (path, error.code)
                assert "Traceback" not in text, (path, error.code)
    tried("requests to the pack's routes that no page sends", 4 * len(REQUESTS), "refused, or an empty list")


PATHS = (
    "../../outside",
    "/tmp/outside",
    "..",
    "a/../../outside",
    "\\\\..\\\\outside",
    "nul\0byte",
    "\ud800",
    "",
    "x/",
    "~/../../outside",
)


def calibrated(file: str) -> ProbedGraph:
    made = ProbedGraph()
    made.add("PreviewAny", source=made.add("LearnedRoundingLoadCalibration", file=file)[0])
    return made


def test_no_path_leaves_comfyuis_folders(comfy, source, tried):
    before = set(comfy.base.parent.iterdir())
    outputs = {path for path in comfy.output_dir.rglob("*") if path.is_file()}
    saving = [graph(source, seed=9999, save=path) for path in PATHS if path]
    loading = [graph(f"{folder}/{path}", seed=1) for folder in ("diffusion_models", "..", "") for path in PATHS]
    calibrations = [calibrated(path) for path in (*PATHS, "x" * 300)]
    for each in (*saving, *loading, *calibrations):
        try:
            comfy.queue(each)
        except HostError as error:
            found = [entry for node in error.node_errors.values() for entry in node["errors"]]
            assert error.kind == "validation", error
            assert found, error  # before anything runs
            assert all(entry["message"].startswith("Invalid ") for entry in found), found  # by a sentence of this pack
            assert not any("traceback" in entry["extra_info"] for entry in found)
    assert set(comfy.base.parent.iterdir()) == before
    for path in {path for path in comfy.output_dir.rglob("*") if path.is_file()} - outputs:
        assert path.resolve().is_relative_to(comfy.output_dir.resolve())
        path.unlink()
    tried(
        "names of files with paths in them, to load and to save",
        len(saving) + len(loading) + len(calibrations),
        "refused, or inside ComfyUI's folders",
    )
