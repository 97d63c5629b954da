"""Connections to Ray clusters that do not exist, do not fit, or cannot be used; choice of nodes."""

import socket
import sys

import pytest

from learned_rounding.quant_core.errors import MissingPackageError, QuantizationError
from learned_rounding.quant_core.workers.ray_cluster import RayCluster, describe_missing
from learned_rounding.tests.quant_core.ray_nodes import local_cluster


@pytest.fixture
def closed_port():
    """host:port at which nothing answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_the_missing_package_is_named(monkeypatch, sentences):
    monkeypatch.setitem(sys.modules, "ray", None)
    with sentences.raises(MissingPackageError):
        RayCluster("auto")


def test_a_package_that_a_node_lacks_is_named(sentences):
    sentences(describe_missing("box", RuntimeError("task failed\nModuleNotFoundError: No module named 'torch.nn'")))


@pytest.mark.parametrize("address", ["", "box", "box:port", "ray://box"])
def test_what_is_not_an_address_is_refused(address, sentences):
    pytest.importorskip("ray")
    with sentences.raises(QuantizationError):
        RayCluster(address)


@pytest.mark.parametrize("kind", ["", "ray://"])
def test_an_address_that_does_not_answer(kind, closed_port):
    pytest.importorskip("ray")
    with pytest.raises(QuantizationError, match="No Ray cluster answers"):
        RayCluster(kind + closed_port)


@pytest.mark.soak
def test_a_cluster_without_gpus_and_cpus():
    with local_cluster(nodes=1, cpus=0) as nodes, pytest.raises(QuantizationError, match="neither a GPU nor a CPU"):
        RayCluster(nodes.address)


@pytest.mark.soak
def test_a_path_that_a_node_does_not_see_is_named(ray_nodes, tmp_path):
    with RayCluster(ray_nodes.address) as cluster:
        cluster.check_nodes([tmp_path], [tmp_path])
        with pytest.raises(QuantizationError, match=r"does not see .*missing"):
            cluster.check_nodes([tmp_path / "missing"], [tmp_path])
    assert list(tmp_path.iterdir()) == []  # no marker is left
