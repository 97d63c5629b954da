"""Sums over the inputs of a layer as they come by: a Gram in full or in low rank, and what is kept per channel."""

import math
import weakref
from collections.abc import Iterator

import torch

from ..errors import CalibrationError
from ..formats import make_codec
from ..linalg import lapack
from .background import Background, Transfer
from .hessian import Gram, Inputs, LowRankGram, PackedGram, PairedGram, roots
from .histogram import BINS, histogram
from .panels import panels

__all__ = ["Accumulator", "FullGram", "PairedGrams", "SketchedGram"]

_COUNTED = 4  # of so many additions one is counted in the histogram, the first to begin with
_PIECE = 4096  # rows of a panel that travel at a time


def _factors(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` as :func:`_add_product` takes them: 16-bit where the GPU sums their products, which are exact, in float32."""
    mixed = rows.is_cuda and torch.version.hip is None and torch.__version__ >= (2, 8)
    if mixed and rows.dtype is torch.bfloat16:
        mixed = torch.cuda.get_device_capability(rows.device) >= (8, 0)
    elif mixed and rows.dtype is torch.float16:
        mixed = not torch.backends.cuda.matmul.allow_fp16_accumulation
    return rows if mixed else rows.float()


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a·b in float32."""
    if a.dtype is torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class FullGram:
    """H in full. A float32 ``line`` holds sums; a float16 one, in a mapped file mostly, the running mean of correlations."""

    def __init__(self, inner: int, line: torch.Tensor, device: torch.device):
        self._inner, self._line = inner, line
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
        (self._sum_up if self._sums else self._average)(_factors(rows))
        self._tokens += len(rows)

    def _sum_up(self, rows: torch.Tensor) -> None:
        for start, stop, panel in panels(self._line, self._inner):
            _add_product(panel, rows[:, start:].t(), rows[:, start:stop])

    def _average(self, rows: torch.Tensor) -> None:
        known, total = self._tokens, self._tokens + len(rows)
        before = roots(self._square / max(known, 1)).float()
        self._square += rows.float().square().sum(dim=0, dtype=torch.float64)
        after = roots(self._square / total).float()
        transfer = Transfer(rows.device)
        for first, last, start, stop, piece in self._pieces():
            # C ← (C·r·rᵀ·known + XᵀX) / (total·r'·r'ᵀ)
            mean = (transfer.fetch(piece) * before[first:last, None]).mul_(before[start:stop] * known)
            _add_product(mean, rows[:, first:last].t(), rows[:, start:stop])
            transfer.store(mean.div_(after[first:last, None]).div_(after[start:stop] * total).half(), piece)
        transfer.finish()

    def _pieces(self) -> Iterator[tuple[int, int, int, int, torch.Tensor]]:
        """(first row, last row, first column, last column, view) of all that is kept."""
        for start, stop, panel in panels(self._line, self._inner):
            first = start
            for piece in panel.split(_PIECE):
                yield first, first + len(piece), start, stop, piece
                first += len(piece)

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

    def __init__(self, inner: int, line: torch.Tensor, device: torch.device):
        self._both = FullGram(2 * inner, line, device)
        self._sum = torch.zeros(2 * inner, dtype=torch.float64, device=device)
        self._tokens, self._inner = 0, inner

    @property
    def square(self) -> torch.Tensor:
        """Σx² of each channel, float64 (in,)."""
        return self._both.square[: self._inner]

    def add(self, rows: torch.Tensor) -> None:
        """Take rows (tokens, in) into account."""
        both = torch.cat([rows.float(), _INT8.quantize_activations(rows)], dim=1)
        self._both.add(both)
        self._sum += both.sum(dim=0, dtype=torch.float64)
        self._tokens += len(rows)

    def start(self, gram: Gram, tokens: int) -> None:
        """Begin with what an earlier calibration found."""
        if not isinstance(gram, PairedGram):
            raise CalibrationError(
                "A calibration without quantized inputs cannot be continued with them; leave them out."
            )
        self._both.start(PackedGram(gram.panels, gram.roots), tokens)
        self._sum.copy_(gram.mean.double() * tokens)
        self._tokens = tokens

    def result(self) -> PairedGram:
        """H so far."""
        found = self._both.result()
        return PairedGram(found.panels, found.roots, (self._sum / max(self._tokens, 1)).float().cpu())


_INT8 = make_codec("int8_tensorwise")


class SketchedGram:
    """H in low rank with its exact diagonal: fixed-rank Nyström approximation (arXiv 1706.05736) while inputs stream by.

    What is summed up is Y = XᵀX·Ω with random signs Ω (in, 2·rank), 8·in·rank bytes. H ≈ Y·(ΩᵀY)⁻¹·Yᵀ, of which the
    leading directions stay; the exact diagonal takes up what they leave.
    """

    def __init__(self, inner: int, rank: int, device: torch.device):
        self._rank = min(rank, inner)
        self._signs = _signs(inner, min(2 * rank, inner), device)
        self._product = torch.zeros(self._signs.shape, device=device)
        self.square = torch.zeros(inner, dtype=torch.float64, device=device)
        self._tokens = 0
        self._kept: float | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Take rows (tokens, in) into account."""
        factors, values = _factors(rows), rows.float()
        products = torch.zeros(len(rows), self._signs.shape[1], device=rows.device)
        _add_product(products, factors, self._signs.to(factors.dtype))
        self._product.addmm_(values.t(), products)
        self.square += values.square().sum(dim=0, dtype=torch.float64)
        self._tokens, self._kept = self._tokens + len(rows), None

    def start(self, gram: Gram, tokens: int) -> None:
        """Begin with what an earlier calibration found."""
        if not isinstance(gram, LowRankGram):
            raise CalibrationError("A full calibration cannot be continued in low rank; keep it in full again.")
        factor, diagonal = (part.to(self._product) for part in (gram.factor, gram.diagonal))
        self.square.copy_((factor.double().square().sum(dim=1) + diagonal.double()) * tokens)
        signs = self._signs.float()
        self._product.copy_((factor @ (factor.t() @ signs) + diagonal[:, None] * signs) * tokens)
        self._tokens = tokens

    def result(self) -> LowRankGram:
        """H so far."""
        tokens = max(self._tokens, 1)
        product, signs = self._product.double() / tokens, self._signs.double()
        core = signs.t() @ product
        energies, vectors = lapack(torch.linalg.eigh, (core + core.t()) / 2)  # ascending
        known = energies > _NOISE * energies[-1].clamp_min(0)
        factor = product @ (vectors * torch.where(known, energies.clamp_min(1e-300).rsqrt(), 0))
        factor = factor @ lapack(torch.linalg.eigh, factor.t() @ factor).eigenvectors[:, -self._rank :]
        shares = factor.square().sum(dim=1)
        total = float(self.square.sum()) / tokens
        self._kept = float(shares.sum()) / total if total else 1.0
        return LowRankGram(
            factor.float().contiguous().cpu(), (self.square / tokens - shares).clamp_min(0).float().cpu()
        )

    @property
    def kept(self) -> float:
        """The share of the inputs' energy tr H that is known with its directions."""
        if self._kept is None:
            self.result()
        return self._kept


_NOISE = 1e-8  # of the largest eigenvalue: what float32 sums cannot tell from nothing
_known_signs: weakref.WeakValueDictionary[tuple, torch.Tensor] = weakref.WeakValueDictionary()


def _signs(inner: int, count: int, device: torch.device) -> torch.Tensor:
    """Random signs (inner, count), bfloat16: always the same, and one tensor for all Grams of a size."""
    key = inner, count, device
    signs = _known_signs.get(key)
    if signs is None:
        drawn = torch.randint(2, (inner, count), generator=torch.Generator().manual_seed(inner), dtype=torch.int8)
        signs = _known_signs[key] = drawn.mul_(2).sub_(1).to(device, torch.bfloat16)
    return signs


class Accumulator:
    """Statistics of one input of ``inner`` channels.

    Args:
        gram: what becomes of the Gram.
        held: where rows held out from it are kept, (rows, in), any float dtype, on ``device``.
        waiting: where rows wait until there are enough of them for the GPU to be busy, (rows, in); may have none.
        device: where the arithmetic runs.
        background: who updates the Gram, if not the caller.
    """

    def __init__(
        self,
        gram: FullGram | PairedGrams | SketchedGram,
        inner: int,
        held: torch.Tensor,
        waiting: torch.Tensor,
        device: torch.device,
        background: Background | None = None,
    ):
        self.gram, self.inner = gram, inner
        self.tokens = self.held_tokens = self._additions = self._filled = 0
        self._held, self._waiting, self._background = held, waiting, background
        self._amax = torch.zeros(inner, dtype=held.dtype, device=device)
        self._sum = torch.zeros(inner, dtype=torch.float64, device=device)
        self._counts = torch.zeros(BINS, dtype=torch.float64, device=device)

    def see(self, x: torch.Tensor) -> None:
        """Note the largest magnitudes of inputs (tokens, in), sampled or not."""
        torch.maximum(self._amax, torch.linalg.vector_norm(x, math.inf, dim=0), out=self._amax)

    def add(self, x: torch.Tensor, chosen: torch.Tensor) -> None:
        """Take the ``chosen`` tokens (indices) of inputs (tokens, in) into account, at the latest in :meth:`flush`."""
        count = len(chosen)
        if not count:
            return
        self.tokens += count
        if self._filled + count > len(self._waiting):
            self.flush()
        if count > len(self._waiting) or x.dtype is not self._waiting.dtype:
            self._learn(x.index_select(0, chosen))
        else:
            torch.index_select(x, 0, chosen, out=self._waiting[self._filled : self._filled + count])
            self._filled += count

    def flush(self) -> None:
        """Learn from the rows that wait."""
        if self._filled:
            rows, self._filled = self._waiting[: self._filled], 0
            self._learn(rows)

    def _learn(self, rows: torch.Tensor) -> None:
        if self._background is None:
            self.gram.add(rows)
        else:
            self._background.do(self.gram.add, rows)
        self._sum += rows.sum(dim=0, dtype=torch.float64)
        if self._additions % _COUNTED == 0:
            self._counts += histogram(rows)
        self._additions += 1

    def hold_out(self, x: torch.Tensor, chosen: torch.Tensor, places: torch.Tensor, seen: int) -> None:
        """Put ``chosen`` tokens of x at these places (n,), all different; ``seen``: of how many they are a sample."""
        if len(chosen):
            self._held.index_copy_(0, places, x.index_select(0, chosen).to(self._held))
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
        self._amax.copy_(known.amax)
        self._counts.copy_(known.histogram)
        if known.holdout_gram is not None:
            rows = known.holdout_gram.factor.t() * math.sqrt(known.holdout_gram.factor.shape[1])
            count = min(len(rows), len(self._held))
            self._held[:count] = rows[:count].to(self._held)
            self.held_tokens = held_tokens if count == len(self._held) else count  # no more than there is room for

    def result(self) -> Inputs:
        """All statistics so far, channels on the CPU."""
        rows = self._held[: self.held_tokens]
        held_out = LowRankGram(rows.t().cpu() / math.sqrt(len(rows)), torch.zeros(self.inner)) if len(rows) else None
        mean = (self._sum / max(self.tokens, 1)).float().cpu()
        return Inputs(self.gram.result(), held_out, mean, self._amax.float().cpu(), self._counts.cpu())
