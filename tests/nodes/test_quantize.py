"""Learned Round Quantize: the widget that chooses the kernels of native INT8 layers."""

import pytest

from learned_rounding.hosts import HostError
from learned_rounding.tests.nodes.probing import ProbedGraph, stock_loads

MODES = ["auto", "on", "off"]


@pytest.mark.parametrize("value", [*MODES, True, False])
def test_node_runs_with_each_value_where_comfyui_has_native_int8_layers(comfy, sentences, value):
    graph = ProbedGraph()
    quantized = graph.quantize(graph.load()[0], "int8_tensorwise")
    graph[quantized.id]["inputs"]["native_int8_kernels"] = value
    graph.probe(quantized[0])
    if stock_loads(comfy.host, "int8_tensorwise") or value not in ("on", True):
        comfy.queue(graph)
    else:
        with sentences.raises(HostError):
            comfy.queue(graph)


def test_node_refuses_a_value_that_is_no_mode(comfy, sentences):
    graph = ProbedGraph()
    quantized = graph.quantize(graph.load()[0], "int8_tensorwise")
    graph[quantized.id]["inputs"]["native_int8_kernels"] = "fast"
    graph.probe(quantized[0])
    with sentences.raises(HostError):
        comfy.queue(graph)
