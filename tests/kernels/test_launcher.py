"""Kept launches: Triton analyzes the arguments once, later calls pass them to the compiled kernel."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")


class Kernel:
    """Stub of a Triton kernel with two arguments and two constants; ``launched`` are its direct launches."""

    arg_names = ("x", "count", "WIDTH", "FLAG")

    def __init__(self, compiles=True):
        self.compiles, self.analyzed, self.launched = compiles, [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.analyzed.append((grid, arguments, constants))
            run = lambda *values: self.launched.append(values)  # noqa: E731
            return SimpleNamespace(function="F", packed_metadata="M", run=run) if self.compiles else None

        return launch


@pytest.fixture
def launcher(monkeypatch):
    from learned_rounding.kernels.triton import launcher

    active = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}", get_current_device=lambda: 7)
    monkeypatch.setattr(launcher, "_CAN_KEEP", True)
    monkeypatch.setattr(
        launcher, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    )
    return launcher


def make(launcher, kernel, device="cuda:1", **options):
    constants = {"FLAG": True, "WIDTH": 64}
    return launcher.Launcher(kernel, (3, 2), constants, torch.device(device), num_warps=4, **options)


@pytest.mark.parametrize("device, stream", [("cuda:1", "stream of 1"), ("cuda", "stream of 7")])
def test_later_calls_launch_the_compiled_kernel(launcher, device, stream):
    kernel = Kernel()
    run = make(launcher, kernel, device)
    for x in "abc":
        run(x, 10)
    assert kernel.analyzed == [((3, 2), ("a", 10), {"FLAG": True, "WIDTH": 64, "num_warps": 4})]
    fixed = 3, 2, 1, stream, "F", "M", None, None, None
    assert kernel.launched == [(*fixed, "b", 10, 64, True), (*fixed, "c", 10, 64, True)]


@pytest.mark.parametrize(
    "compiles, keep, known",
    [(False, True, True), (True, False, True), (True, True, False)],
    ids=["interpreter", "not kept", "unknown Triton"],
)
def test_arguments_are_analyzed_in_every_call_otherwise(launcher, monkeypatch, compiles, keep, known):
    monkeypatch.setattr(launcher, "_CAN_KEEP", known)
    kernel = Kernel(compiles)
    run = make(launcher, kernel, keep=keep)
    run("a", 10)
    run("b", 10)
    assert len(kernel.analyzed) == 2 and not kernel.launched


def test_bound_descriptor_has_the_tensor_and_leaves_the_original(launcher):
    class Descriptor:
        def __init__(self, base, shape):
            self.base, self.shape = base, shape

    descriptor = Descriptor(None, [4, 4])
    bound = launcher.bind_descriptor(descriptor, "tensor")
    assert bound.base == "tensor" and bound.shape is descriptor.shape and descriptor.base is None
