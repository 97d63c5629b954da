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
    assert len(kernel.analyzed) == 2
    assert not kernel.launched


class Matrix(torch.Tensor):
    """A matrix that reports to be on a GPU."""

    is_cuda = True


def matrices(count: int) -> list[torch.Tensor]:
    return [torch.zeros(4, 4).as_subclass(Matrix) for _ in range(count)]


class Descriptor:
    def __init__(self, base):
        self.base, self.shape = base, [4, 4]


def test_descriptors_are_made_once_per_address_and_keep_no_tensor(launcher, monkeypatch):
    tensors = matrices(3)
    descriptors = launcher.Descriptors(Descriptor(tensors[0]))
    first, second = descriptors.bind(tensors[0]), descriptors.bind(tensors[1])
    assert first is descriptors.bind(tensors[0]) is not second
    for bound, tensor in ((first, tensors[0]), (second, tensors[1])):
        assert bound.base.data_ptr() == tensor.data_ptr()
        assert bound.base.dtype is tensor.dtype
        assert bound.shape == [4, 4]
        assert not isinstance(bound.base, torch.Tensor)
    monkeypatch.setattr(launcher, "_MOST_ADDRESSES", 2)
    descriptors.bind(tensors[2])  # the table is full
    assert descriptors.bind(tensors[0]) is not first


def test_descriptors_contain_the_tensor_in_the_interpreter(launcher):
    tensor = torch.zeros(4, 4)
    descriptors = launcher.Descriptors(Descriptor(tensor))
    assert descriptors.bind(tensor).base is tensor
    assert descriptors._descriptor.base is None


def make_tensordesc_arg(descriptor, metadata):
    """Stub of Triton's function, which the kept launches of the tests below find in this module."""
    CREATED.append((descriptor.base.data_ptr(), metadata))
    return [f"map of {descriptor.base.data_ptr()} {metadata}"]


CREATED = []


def stub_launch(metadata):
    """As Triton wraps the launch of a kernel whose first argument is a descriptor."""

    def inner(launched, descriptor, *arguments):
        launched.append((*make_tensordesc_arg(descriptor, metadata), *arguments))

    return SimpleNamespace(launch=inner)


def test_tensor_maps_are_made_once_per_address_and_kernel(launcher):
    CREATED.clear()
    original, other = stub_launch("A"), stub_launch("B")
    runs = [launcher._reuse_tensor_maps(run) for run in (original, other)]
    tensors = matrices(2)
    x, y = (tensor.data_ptr() for tensor in tensors)
    descriptors, launched = launcher.Descriptors(Descriptor(tensors[0])), []
    for number in range(2):
        for run in runs:
            for tensor in tensors:
                run.launch(launched, descriptors.bind(tensor), number)
    assert [(x, "A"), (y, "A"), (x, "B"), (y, "B")] == CREATED
    once = [f"map of {x} A", f"map of {y} A", f"map of {x} B", f"map of {y} B"]
    assert launched == [(text, number) for number in range(2) for text in once]
    original.launch([], descriptors.bind(tensors[0]), 0)  # Triton's own launch is as before
    assert len(CREATED) == 5


def test_launches_without_descriptors_are_kept_as_they_are(launcher):
    for run in (print, SimpleNamespace(launch=print), SimpleNamespace(launch=pytest.raises)):
        assert launcher._reuse_tensor_maps(run) is run
