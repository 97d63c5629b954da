"""A server that stops during Learned Round Quantize: the next one resumes the run."""

import os
import random
import signal

import pytest

from learned_rounding.hosts import HostError
from learned_rounding.quant_core.output import verify_file
from learned_rounding.tests.conftest import LINKS
from learned_rounding.tests.nodes.probing import ProbedGraph, in_process

SEED = 40
LAYERS = 37  # quantized layers of the tiny model


@pytest.mark.parametrize("kind", ["file", "model", "four bits"])
def test_next_server_resumes_after_a_kill(host, tmp_path, tried, kind):
    assert in_process(host, tmp_path, f"resume_die_{kind}") == [".journal", ".partial"]
    found = in_process(host, tmp_path, f"resume_run_again_{kind}")
    assert 0 < found["made"] <= found["all"] - 18  # layers that were being written may be lost
    assert found["same"] and found["told"]
    assert found["left"] == [".safetensors"]  # the last result, cached for other outputs
    tried("server killed while a node quantizes, then the same run in the next server", 1, "goes on, same bytes")


def test_two_servers_in_one_folder_write_separate_files(host, tmp_path, tried):
    found = in_process(host, tmp_path, "resume_at_once")
    assert found["found"] == dict.fromkeys(found["found"], True) and len(found["found"]) == 4
    assert found["left"] == [".safetensors"]  # the last result, cached for other outputs
    tried("another server on the same folder quantizes meanwhile", len(found["found"]), "each its own file, whole")


def test_abandoned_files_are_deleted_after_a_day(host, tmp_path):
    assert in_process(host, tmp_path, "resume_left_for_good")["left"] == ["diffusion_models_new.safetensors"]


def quantize(server, seed: int, layers: int | None = None, on_event=None) -> tuple[int, bytes]:
    """(number of layers quantized, saved file). ``layers``: number after which the run waits."""
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], rounding="nearest", seed=seed), f"seed{seed}")
    server.post("/probe/gate", {"layers": layers})
    server.queue(graph, on_event=on_event)
    made = server.post("/probe/gate", {"layers": None})["made"]
    saved = max(server.output_dir.rglob(f"seed{seed}_*.safetensors"))
    assert not verify_file(saved).problems
    return made, saved.read_bytes()


def test_restarted_server_resumes_after_signals(server_factory, tiny_base, often, tried):
    server = server_factory(base=tiny_base, links=LINKS)
    draw, times = random.Random(SEED), often(1, 5)
    signals = [how for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) for _ in range(times)]
    gone_on = {}
    for seed, how in enumerate(signals):
        layers = draw.randrange(1, LAYERS)

        def end(event, how=how, layers=layers):
            if (
                event.type == "learned_rounding.progress"
                and event.data["state"] == "layer"
                and event.data["index"] == layers - 1
            ):
                os.kill(server.pid, how)

        with pytest.raises(HostError):
            quantize(server, seed, layers, end)
        assert not list(server.output_dir.rglob(f"seed{seed}_*"))
        server.restart()
        gone_on[seed] = (layers, *quantize(server, seed))
    server.restart()
    for seed, (layers, some, resumed) in gone_on.items():
        every, undisturbed = quantize(server, seed)
        assert every == LAYERS and some <= every - layers + 2  # layers that were being written may be lost
        assert resumed == undisturbed
    for how in dict.fromkeys(signals):
        tried(f"a running server gets {how.name} at a random layer, and is started again", times, "goes on, same bytes")
