"""Calls of a model that are suspended at every block.

Each call runs in a thread of its own, one at a time: the frames of the model's own forward then hold exactly the tensors that
the rest of the call needs, such as skip connections and shared modulations, and nothing about the architecture has to be known.
"""

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue

import torch

__all__ = ["BlockCall", "SuspendedCall", "replaced_forward", "suspended_at"]

_current = threading.local()  # .call: the SuspendedCall whose thread this is


@dataclass(frozen=True, eq=False)
class BlockCall:
    """A call of a block that waits for its result.

    Attributes:
        block: the module.
        args, kwargs: what it is called with. Some blocks change them in place.
    """

    block: torch.nn.Module
    args: tuple
    kwargs: dict[str, object]


class _Closed(BaseException):
    """Ends the thread of a call whose result is not needed."""


class SuspendedCall:
    """One call of a model; :meth:`advance` runs it to its next block.

    Args:
        run: calls the model.

    Attributes:
        waiting: the call of a block that comes next; None before the first one and after the end.
        result: what ``run`` returned; None until the call has ended.
        ended: whether the call has ended.
    """

    def __init__(self, run: Callable[[], object]):
        self.waiting: BlockCall | None = None
        self.result: object = None
        self.ended = False
        self._error: BaseException | None = None
        self._closing = False
        self._go: SimpleQueue[None] = SimpleQueue()
        self._reached: SimpleQueue[None] = SimpleQueue()
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()  # of a thread, not inherited
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._run, run, *modes),
            name="learned-rounding-call",
            daemon=True,
        )
        self._started = False

    def advance(self) -> BlockCall | None:
        """Run the block that waits, and the model up to the next block, which is returned; None at the end of the call.

        Errors of the model are raised here.
        """
        if self.ended:
            return None
        self.waiting = None
        if self._started:
            self._go.put(None)
        else:
            self._started = True
            self._thread.start()
        self._reached.get()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self.waiting

    def close(self) -> None:
        """End the call where it is suspended."""
        if self._started and not self.ended:
            self._closing = True
            self._go.put(None)
            self._thread.join()
        self.waiting, self.ended = None, True

    def _run(self, run: Callable[[], object], inference: bool, grad: bool) -> None:
        _current.call = self
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                self.result = run()
        except _Closed:
            pass
        except BaseException as error:  # raised again in the thread that waits
            self._error = error
        finally:
            self.ended = True
            self._reached.put(None)

    def suspend(self, call: BlockCall) -> None:
        """Wait in the thread of this call until the block may run."""
        if not self._closing:  # else the model goes on after _Closed, as in an ``except`` without a class
            self.waiting = call
            self._reached.put(None)
            del call  # its tensors are held by the frames of the model alone
            self._go.get()
        if self._closing:
            raise _Closed


@contextlib.contextmanager
def suspended_at(blocks: Iterable[torch.nn.Module]) -> Iterator[dict[torch.nn.Module, Callable[..., object]]]:
    """Suspend every :class:`SuspendedCall` when it calls one of ``blocks``; yields the forward of each block.

    Calls of blocks from other threads are not affected.
    """
    with contextlib.ExitStack() as restorations:
        forwards = {}
        for block in blocks:
            forwards[block] = block.forward
            restorations.enter_context(replaced_forward(block, _suspending(block)))
        yield forwards


def _suspending(block: torch.nn.Module) -> Callable[..., object]:
    forward = block.forward

    def suspend(*args, **kwargs):
        call = getattr(_current, "call", None)
        if call is not None:
            call.suspend(BlockCall(block, args, kwargs))
        return forward(*args, **kwargs)

    return suspend


@contextlib.contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Call ``forward`` instead of the module's own, in this context."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
