"""Sums over the inputs of a layer as they come by: a Gram in full or in low rank, and what is kept per channel."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..errors import CalibrationError
from ..formats import make_encoding
from .gram import Gram, Inputs, LowRankGram, PackedGram, PairedGram, roots
from .histogram import BINS, histogram
from .panels import panels

__all__ = ["Accumulator", "FullGram", "PairedGrams", "SketchedGram", "Worker"]

_COUNTED = 4  # of so many rows one is counted in the histogram
_EXTREMES = 64  # smallest and largest values of calls that wait to be compared


@contextlib.contextmanager
def _exact_products(rows: torch.Tensor) -> Iterator[None]:
    """Let a GPU multiply 16-bit rows on its tensor cores: TF32 holds them without loss and sums in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or rows.dtype in _HALF
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """leftᵀ·right of rows (tokens, n) and (tokens, m), summed in float32; nothing of 16-bit rows is lost."""
    if left.is_cuda and left.dtype in _HALF and _WIDE_SUMS:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    with _exact_products(left):
        return left.float().t() @ right.float()


_HALF = (torch.bfloat16, torch.float16)
_WIDE_SUMS = hasattr(torch.ops.aten.mm, "dtype")  # torch multiplies 16-bit matrices into a float32 one


class FullGram:
    """H in full. A float32 ``line`` holds sums; a float16 one, in a mapped file mostly, the running mean of correlations.

    ``worker``: sums up beside the model's own work, where ``line`` is far from the device; None to do so at once.
    """

    def __init__(self, inner: int, line: torch.Tensor, device: torch.device, worker: "Worker | None" = None):
        self._inner, self._line, self._worker = inner, line, worker
        self._sums = line.dtype is torch.float32
        self._square = torch.zeros(inner, dtype=torch.float64, device=device)  # Σx², beside correlations
        self._tokens = 0

    @property
    def square(self) -> torch.Tensor:
        """Σx² of each channel, float64 (in,)."""
        if not self._sums:
            return self._square
        return torch.cat([panel.diagonal() for *_, panel in panels(self._line, self._inner)]).double()

    def add(self, rows: torch.Tensor) -> None:
        """Take rows (tokens, in) into account."""
        known, self._tokens = self._tokens, self._tokens + len(rows)
        if self._sums:
            self._sum_up(rows)
        elif self._worker is None:
            self._average(rows, known)
        else:
            self._worker.submit(self._average, rows, known)

    def _sum_up(self, rows: torch.Tensor) -> None:
        for start, stop, panel in panels(self._line, self._inner):
            panel.add_(_product(rows[:, start:], rows[:, start:stop]))

    def _average(self, rows: torch.Tensor, known: int) -> None:
        total = known + len(rows)
        before = roots(self._square / max(known, 1)).float()
        self._square += rows.float().square().sum(dim=0, dtype=torch.float64)
        after = roots(self._square / total).float()
        for start, stop, panel in panels(self._line, self._inner):
            # C ← (C·r·rᵀ·known + XᵀX) / (total·r'·r'ᵀ); converted on the device, which is faster at it
            mean = panel.to(rows.device) if self._worker is None else self._worker.fetch(panel)
            mean = mean.float().mul_(before[start:, None]).mul_(before[start:stop] * known)
            mean.add_(_product(rows[:, start:], rows[:, start:stop]))
            mean = mean.div_(after[start:, None]).div_(after[start:stop] * total).to(panel.dtype)
            panel.copy_(mean) if self._worker is None else self._worker.store(mean, panel)

    def start(self, gram: Gram, tokens: int) -> None:
        """Begin with what an earlier calibration found."""
        if not isinstance(gram, PackedGram):
            raise CalibrationError(
                "A calibration kept in low rank cannot be continued in full; keep it in low rank again."
            )
        self._square.copy_(gram.roots.double().square() * tokens)
        self._tokens = tokens
        self._line.copy_(gram.panels)
        if self._sums:
            self._scale(self._line, gram.roots.to(self._line) * tokens**0.5)

    def _scale(self, line: torch.Tensor, factors: torch.Tensor) -> None:
        for start, stop, panel in panels(line, self._inner):
            panel.mul_(factors[start:, None]).mul_(factors[start:stop])

    def result(self) -> PackedGram:
        """H so far."""
        root = roots(self.square / max(self._tokens, 1))
        line = self._line
        if self._sums:
            line = line.clone()
            self._scale(line, (root * max(self._tokens, 1) ** 0.5).reciprocal().to(line))
            line = line.half()
        return PackedGram(line, root.float().cpu())

    @property
    def kept(self) -> float:
        """The share of the inputs' energy tr H that is known with its directions."""
        return 1.0


class PairedGrams:
    """H of inputs side by side with what INT8 per token makes of them; ``line`` as for a :class:`FullGram` of 2·in."""

    kept = 1.0

    def __init__(self, inner: int, line: torch.Tensor, device: torch.device, worker: "Worker | None" = None):
        self._both = FullGram(2 * inner, line, device, worker)
        self._sum = torch.zeros(2 * inner, dtype=torch.float64, device=device)
        self._tokens, self._inner = 0, inner

    @property
    def square(self) -> torch.Tensor:
        """Σx² of each channel, float64 (in,)."""
        return self._both.square[: self._inner]

    def add(self, rows: torch.Tensor) -> None:
        """Take rows (tokens, in) into account."""
        both = torch.cat([rows.float(), _INT8.quantize_inputs(rows)], dim=1)
        self._both.add(both)
        self._sum += both.sum(dim=0, dtype=torch.float64)
        self._tokens += len(rows)

    def start(self, gram: Gram, tokens: int) -> None:
        """Begin with what an earlier calibration found."""
        if not isinstance(gram, PairedGram):
            raise CalibrationError("A calibration without quantized inputs cannot be continued with them; leave them out.")
        self._both.start(PackedGram(gram.panels, gram.roots), tokens)
        self._sum.copy_(gram.mean.double() * tokens)
        self._tokens = tokens

    def result(self) -> PairedGram:
        """H so far."""
        found = self._both.result()
        return PairedGram(found.panels, found.roots, (self._sum / max(self._tokens, 1)).float().cpu())


_INT8 = make_encoding("int8_tensorwise")


class Worker:
    """Work beside the model's own: a thread with a stream and page-locked memory of its own; on a CUDA ``device``.

    At most four tasks wait, so that what they hold stays small.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="learned-rounding-grams")
        self._room = threading.Semaphore(4)
        self._tasks: list[Future] = []
        self._staging = torch.empty(0, dtype=torch.float16)

    def submit(self, task: Callable, rows: torch.Tensor, *args) -> None:
        """Run ``task(rows, *args)`` when the rows are ready."""
        ready = torch.cuda.current_stream(self._device).record_event()
        rows.record_stream(self._stream)
        self._room.acquire()
        self._tasks = [task for task in self._tasks if not task.done() or task.exception()]
        self._tasks.append(self._pool.submit(self._run, ready, task, rows, *args))

    @torch.inference_mode()
    def _run(self, ready: torch.cuda.Event, task: Callable, *args) -> None:
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                task(*args)
                self._stream.synchronize()
        finally:
            self._room.release()

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of host memory on the device."""
        return self._staged(values).copy_(values).to(self._device, non_blocking=True)

    def store(self, values: torch.Tensor, target: torch.Tensor) -> None:
        """Bring values of the device into host memory."""
        staged = self._staged(target).copy_(values, non_blocking=True)
        self._stream.synchronize()
        target.copy_(staged)

    def _staged(self, values: torch.Tensor) -> torch.Tensor:
        if self._staging.numel() < values.numel():
            self._staging = torch.empty(values.numel(), dtype=values.dtype, pin_memory=True)
        return self._staging[: values.numel()].view(values.shape)

    def wait(self) -> None:
        """Return when all is done; raises what a task raised."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.result()

    def close(self) -> None:
        """Drop what has not begun, and wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class SketchedGram:
    """H in low rank with its exact diagonal: Frequent Directions (arXiv 1501.01711) while the inputs stream by.

    The sketch S (rank, in) keeps the leading directions; what each step cuts off is lowered evenly, and the exact
    diagonal takes up what the sketch has lost.
    """

    def __init__(self, inner: int, rank: int, device: torch.device):
        self._rank = min(rank, inner)
        self._sketch = torch.zeros(0, inner, device=device)
        self.square = torch.zeros(inner, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, rows: torch.Tensor) -> None:
        """Take rows (tokens, in) into account."""
        values = rows.float()
        self.square += values.square().sum(dim=0, dtype=torch.float64)
        self._tokens += len(rows)
        stacked = torch.cat([self._sketch, values])
        if len(stacked) > self._rank:
            energies, vectors = torch.linalg.eigh((stacked @ stacked.t()).double())  # ascending
            cut = energies[-self._rank - 1].clamp_min(0)
            energies, vectors = energies[-self._rank :], vectors[:, -self._rank :]
            shrunk = ((energies - cut).clamp_min(0) / energies.clamp_min(1e-300)).sqrt()
            stacked = (vectors * shrunk).t().float() @ stacked
        self._sketch = stacked

    def start(self, gram: Gram, tokens: int) -> None:
        """Begin with what an earlier calibration found."""
        if not isinstance(gram, LowRankGram):
            raise CalibrationError("A full calibration cannot be continued in low rank; keep it in full again.")
        factor = gram.factor.double()
        self.square.copy_((factor.square().sum(dim=1) + gram.diagonal.double()) * tokens)
        self._sketch, self._tokens = (factor.t() * math.sqrt(tokens)).to(self._sketch), tokens

    def result(self) -> LowRankGram:
        """H so far."""
        tokens = max(self._tokens, 1)
        factor = (self._sketch.t() / math.sqrt(tokens)).contiguous()
        rest = self.square / tokens - factor.double().square().sum(dim=1)
        return LowRankGram(factor.cpu(), rest.clamp_min(0).float().cpu())

    @property
    def kept(self) -> float:
        """The share of the inputs' energy tr H that is known with its directions."""
        total = float(self.square.sum())
        return float(self._sketch.double().square().sum()) / total if total else 1.0


class Accumulator:
    """Statistics of one input of ``inner`` channels.

    Args:
        gram: what becomes of the Gram.
        held: where rows held out from it are kept, (rows, in), any float dtype and device.
        device: where the arithmetic runs.
        batch: how many rows to wait for before they are summed up, which is faster in one go.
    """

    def __init__(
        self,
        gram: FullGram | PairedGrams | SketchedGram,
        inner: int,
        held: torch.Tensor,
        device: torch.device,
        batch: int = 1,
    ):
        self.gram, self.inner, self._batch = gram, inner, batch
        self._waiting: list[torch.Tensor] = []
        self._extremes: list[torch.Tensor] = []
        self.tokens = self.held_tokens = 0
        self._held = held
        self._low = torch.zeros(inner, dtype=held.dtype, device=device)
        self._high = torch.zeros(inner, dtype=held.dtype, device=device)
        self._sum = torch.zeros(inner, dtype=torch.float64, device=device)
        self._counts = torch.zeros(BINS, dtype=torch.float64, device=device)

    def see(self, x: torch.Tensor) -> None:
        """Note the largest magnitudes of inputs (tokens, in), sampled or not."""
        self._extremes += torch.aminmax(x, dim=0)
        if len(self._extremes) >= _EXTREMES:
            self._settle_extremes()

    def _settle_extremes(self) -> None:
        if self._extremes:
            found = torch.stack(self._extremes)
            self._low = torch.minimum(self._low, found.amin(dim=0))
            self._high = torch.maximum(self._high, found.amax(dim=0))
            self._extremes.clear()

    def add(self, rows: torch.Tensor) -> None:
        """Take rows (tokens, in) into account, now or with those that follow; the rows must not change any more."""
        if not len(rows):
            return
        self._waiting.append(rows)
        self.tokens += len(rows)
        if sum(map(len, self._waiting)) >= self._batch:
            self.settle()

    @torch.inference_mode()  # in which a model may run and so make tensors that change in no other
    def settle(self) -> None:
        """Sum up all rows that wait."""
        if not self._waiting:
            return
        rows = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting.clear()
        self.gram.add(rows)
        self._sum += rows.sum(dim=0, dtype=torch.float64)
        self._counts += histogram(rows[::_COUNTED])

    def hold_out(self, rows: torch.Tensor, places: torch.Tensor, seen: int) -> None:
        """Put held-out rows (n, in) at these places (n,), all different; ``seen``: of how many they are a sample."""
        self._held[places.to(self._held.device)] = rows.to(self._held)
        self.held_tokens += seen

    def start(self, known: Inputs, tokens: int, held_tokens: int) -> None:
        """Begin with what an earlier calibration found.

        Raises:
            CalibrationError: it keeps its Grams in another way, or lacks something.
        """
        if any(part is None for part in (known.gram, known.mean, known.amax, known.histogram)):
            raise CalibrationError("This calibration holds Grams only, so it cannot be continued.")
        self.gram.start(known.gram, tokens)
        self.tokens = tokens
        self._sum.copy_(known.mean.double() * tokens)
        self._high.copy_(known.amax)
        self._counts.copy_(known.histogram)
        if known.holdout_gram is not None:
            rows = known.holdout_gram.factor.t() * math.sqrt(known.holdout_gram.factor.shape[1])
            count = min(len(rows), len(self._held))
            self._held[:count] = rows[:count].to(self._held)
            self.held_tokens = held_tokens if count == len(self._held) else count  # no more than there is room for

    @torch.inference_mode()
    def result(self) -> Inputs:
        """All statistics so far, channels on the CPU."""
        self.settle()
        self._settle_extremes()
        rows = self._held[: self.held_tokens]
        held_out = LowRankGram(rows.t().cpu() / math.sqrt(len(rows)), torch.zeros(self.inner)) if len(rows) else None
        mean = (self._sum / max(self.tokens, 1)).float().cpu()
        amax = torch.maximum(-self._low, self._high).float().cpu()
        return Inputs(self.gram.result(), held_out, mean, amax, self._counts.cpu())
