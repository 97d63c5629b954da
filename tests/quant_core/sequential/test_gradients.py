"""Backward passes that give the same bits again, and tensors that autograd can save."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

from learned_rounding.quant_core.sequential.gradients import (
    UndifferentiableError,
    deterministic_kernels,
    find_backends,
    without_inference_tensors,
)


def test_kernels_that_are_not_deterministic_are_replaced():
    def gradients():
        return [torch.zeros(2) if not torch.backends.cuda.flash_sdp_enabled() else torch.rand(2)]

    enabled = torch.backends.cuda.flash_sdp_enabled()
    assert list(find_backends(gradients)) == [torch.nn.attention.SDPBackend.MATH]
    assert torch.backends.cuda.flash_sdp_enabled() == enabled


def test_fast_kernels_are_kept_where_they_are_deterministic():
    assert SDPBackend.FLASH_ATTENTION in find_backends(lambda: [torch.ones(2)])


def test_backward_passes_that_differ_are_refused():
    with pytest.raises(UndifferentiableError, match="different gradients"):
        find_backends(lambda: [torch.rand(2)])


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nof this kind"), TypeError()], ids=["text", "no text"])
def test_backward_pass_that_fails_is_refused_by_its_first_line(error):
    def fail():
        raise error

    with pytest.raises(UndifferentiableError) as raised:
        find_backends(fail)
    assert str(raised.value) == f"its backward pass fails: {'no kernel' if str(error) else 'TypeError'}"


def test_lack_of_memory_is_not_a_missing_kernel():
    def fail():
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        find_backends(fail)


def test_settings_of_the_process_are_restored():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(ZeroDivisionError), deterministic_kernels([SDPBackend.MATH]):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fill


@pytest.fixture
def inference_block():
    """Two linear layers and a buffer that were made in inference mode."""
    with torch.inference_mode():
        block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        block.register_buffer("table", torch.ones(4))
    return block


def test_inference_tensors_are_replaced_by_copies_that_autograd_saves(inference_block):
    x = torch.ones(2, 4, requires_grad=True)
    with torch.enable_grad(), without_inference_tensors(inference_block):
        assert not any(tensor.is_inference() for tensor in inference_block.state_dict().values())
        (inference_block(x) * inference_block.table).sum().backward()
    assert x.grad is not None


def test_replaced_tensors_have_the_same_values_and_are_restored_after_an_error(inference_block):
    before = dict(inference_block.named_parameters()) | dict(inference_block.named_buffers())
    with pytest.raises(ZeroDivisionError), without_inference_tensors(inference_block):
        for name, tensor in inference_block.state_dict().items():
            assert torch.equal(tensor, before[name])
        raise ZeroDivisionError
    after = dict(inference_block.named_parameters()) | dict(inference_block.named_buffers())
    assert all(after[name] is tensor for name, tensor in before.items())


def test_skipped_modules_keep_their_tensors(inference_block):
    with without_inference_tensors(inference_block, [inference_block[0]]):
        assert inference_block[0].weight.is_inference()
        assert not inference_block[1].weight.is_inference()
