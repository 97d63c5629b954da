"""Suspended calls: order, results and errors, the modes of their threads, and what is left of them."""

import contextvars
import threading
import weakref

import pytest
import torch
from torch import nn

from learned_rounding.quant_core.sequential.calls import SuspendedCall, replaced_forward, suspended_at


class Add(nn.Module):
    """A block that adds a number, and notes that it ran."""

    def __init__(self, number: int, ran: list[int]):
        super().__init__()
        self.number, self.ran = number, ran

    def forward(self, x, *, times=1):
        self.ran.append(self.number)
        return x + self.number * times


class Chain(nn.Module):
    """Calls its blocks one after the other."""

    def __init__(self, count: int = 3):
        super().__init__()
        self.ran: list[int] = []
        self.blocks = nn.ModuleList(Add(index + 1, self.ran) for index in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, times=10)
        return x


@pytest.fixture
def chain():
    return Chain()


def start(chain, value: float = 0.0) -> SuspendedCall:
    return SuspendedCall(lambda: chain(torch.tensor(value)))


def test_call_stops_at_each_block_before_it_runs(chain):
    with suspended_at(chain.blocks):
        call = start(chain)
        for index, block in enumerate(chain.blocks):
            reached = call.advance()
            assert reached is call.waiting
            assert reached.block is block
            assert chain.ran == list(range(1, index + 1))
            assert reached.args == (torch.tensor(10.0 * sum(range(index + 1))),)
            assert reached.kwargs == {"times": 10}
            assert call.ended is False
            assert call.result is None
        assert call.advance() is None
    assert call.ended
    assert call.waiting is None
    assert call.result == 60


def test_ended_call_stays_ended(chain):
    call = start(chain)
    assert call.advance() is None  # no block is watched
    assert call.advance() is None
    assert call.result == 60
    assert chain.ran == [1, 2, 3]
    call.close()
    assert call.result == 60


def test_calls_are_interleaved_and_keep_their_own_state(chain):
    with suspended_at(chain.blocks):
        calls = [start(chain, value) for value in (100.0, 200.0)]
        for _ in range(4):
            for call in reversed(calls):
                call.advance()
    assert [float(call.result) for call in calls] == [160, 260]
    assert chain.ran == [1, 1, 2, 2, 3, 3]


def test_forward_that_is_replaced_while_a_call_waits_runs(chain):
    layer = nn.Linear(2, 2)
    block = nn.Sequential(layer)
    with suspended_at([block]), torch.no_grad():
        call = SuspendedCall(lambda: block(torch.ones(2)))
        call.advance()
        with replaced_forward(layer, lambda x: x * 7):
            call.advance()
    assert call.result.tolist() == [7, 7]


def failing(error: BaseException):
    """A forward that raises this error."""

    def fail(x, **options):
        raise error

    return fail


@pytest.mark.parametrize("at", [0, 1, 2])
def test_errors_of_the_model_are_raised_where_the_call_is_advanced(at, subtests):
    for kind in (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit):
        chain, raised = Chain(), kind("from the model")
        with (
            subtests.test(kind.__name__),
            replaced_forward(chain.blocks[at], failing(raised)),
            suspended_at(chain.blocks),
        ):
            call = start(chain)
            for _ in range(at + 1):
                call.advance()
            with pytest.raises(kind) as caught:
                call.advance()
            assert caught.value is raised
            assert call.ended
            assert call.waiting is None
            assert call.advance() is None


def test_closed_call_leaves_no_thread(subtests):
    """Not started, suspended at each block, ended."""
    for advanced in range(5):
        chain = Chain()
        with subtests.test(advanced=advanced), suspended_at(chain.blocks):
            call = start(chain)
            for _ in range(advanced):
                call.advance()
            call.close()
            assert call.ended
            assert call.waiting is None
            assert call.advance() is None
            assert chain.ran == list(range(1, advanced))
            call.close()


class Stubborn(nn.Module):
    """Calls its block again when the first call is ended, as a ``finally`` or a bare ``except`` of a model may."""

    def __init__(self):
        super().__init__()
        self.block = Add(1, [])

    def forward(self, x):
        for _ in range(3):
            try:
                x = self.block(x)
            except BaseException:
                x = self.block(x)
        return x


def test_model_that_goes_on_when_its_call_is_closed_is_ended_all_the_same():
    model = Stubborn()
    with suspended_at([model.block]):
        call = SuspendedCall(lambda: model(torch.zeros(())))
        call.advance()
        closing = threading.Thread(target=call.close, daemon=True)
        closing.start()
        closing.join(20)
        assert not closing.is_alive()


def test_frames_of_a_closed_call_are_unwound(chain):
    left = []

    def run():
        try:
            chain(torch.zeros(()))
        finally:
            left.append(True)

    with suspended_at(chain.blocks):
        call = SuspendedCall(run)
        call.advance()
        call.close()
    assert left == [True]


def test_modes_of_the_thread_are_those_in_which_the_call_is_made(subtests):
    for mode in [torch.inference_mode, torch.no_grad, torch.enable_grad]:
        with subtests.test(mode=mode):

            def modes():
                return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

            with mode():
                call, expected = SuspendedCall(modes), modes()
            call.advance()
            assert call.result == expected


def test_context_variables_are_those_in_which_the_call_is_made():
    variable = contextvars.ContextVar("variable", default="default")
    variable.set("of the caller")
    call = SuspendedCall(variable.get)
    variable.set("later")
    call.advance()
    assert call.result == "of the caller"


def test_forwards_are_restored(chain):
    def own(x, **options):
        return x * 2

    chain.blocks[1].forward = own  # as patches of hosts have it
    with pytest.raises(ZeroDivisionError), suspended_at(chain.blocks) as forwards:
        assert all("forward" in vars(block) for block in chain.blocks)
        assert forwards[chain.blocks[1]] is own
        assert forwards[chain.blocks[0]] == Add.forward.__get__(chain.blocks[0])
        raise ZeroDivisionError
    assert ["forward" in vars(block) for block in chain.blocks] == [False, True, False]
    assert chain.blocks[1].forward is own
    assert chain(torch.tensor(5.0)) == (5 + 10) * 2 + 30


def test_patched_forward_of_a_block_runs_in_a_suspended_call(chain):
    chain.blocks[1].forward = lambda x, **options: x * 2
    with suspended_at(chain.blocks):
        call = start(chain, 5.0)
        while call.advance():
            pass
    assert call.result == (5 + 10) * 2 + 30


def test_replaced_forwards_nest(chain):
    block = chain.blocks[0]
    with replaced_forward(block, lambda x: x * 2):
        with replaced_forward(block, lambda x: x * 3):
            assert block(1) == 3
        assert block(1) == 2
    assert "forward" not in vars(block)


def test_calls_from_other_threads_are_not_suspended(chain):
    with suspended_at(chain.blocks):
        call = start(chain)
        call.advance()
        assert chain(torch.zeros(())) == 60
        results = []
        thread = threading.Thread(target=lambda: results.append(chain(torch.zeros(()))))
        thread.start()
        thread.join(20)
        assert results == [60]
        call.close()


def test_inputs_of_a_block_are_freed_when_the_model_drops_them(chain):
    """A suspended call holds only what the frames of the model hold."""
    with suspended_at(chain.blocks):
        call = start(chain)
        call.advance()
        second = weakref.ref(call.advance().args[0])
        call.advance()
        assert second() is None
        call.close()
