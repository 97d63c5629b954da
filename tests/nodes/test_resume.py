"""A server that stops during Learned Round Quantize: the next one resumes the run."""

import os
import random
import signal

import pytest

from learned_rounding.hosts import HostError
from learned_rounding.quant_core.output import verify_file
from learned_rounding.tests.conftest import LINKS
from learned_rounding.tests.nodes.probing import ProbedGraph

SEED = 40
LAYERS = 37  # quantized layers of the tiny model


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
        assert every == LAYERS
        assert some <= every - layers + 2  # layers that were being written may be lost
        assert resumed == undisturbed
    for how in dict.fromkeys(signals):
        tried(f"a running server gets {how.name} at a random layer, and is started again", times, "goes on, same bytes")
