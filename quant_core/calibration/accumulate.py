"""Accumulators of streaming activations: Hessians in packed, paired and low-rank form, and per-channel statistics."""

import math
import weakref
from collections.abc import Iterator

import torch

from ..errors import CalibrationError
from ..formats import make_codec
from ..linalg import lapack
from .background import BackgroundWorker, Transfer
from .hessian import (
    Hessian,
    LowRankHessian,
    PackedHessian,
    PairedHessian,
    TriangularHessian,
    channel_rms,
    unpack_triangle,
)
from .histogram import BINS, histogram
from .panels import iter_panels
from .products import add_product, matmul_operand
from .statistics import LayerStatistics

__all__ = [
    "HessianAccumulator",
    "LowRankHessianAccumulator",
    "PackedHessianAccumulator",
    "PairedHessianAccumulator",
    "StatisticsAccumulator",
]

_HISTOGRAM_PERIOD = 4  # every fourth batch of activations is counted in the histogram, starting with the first
_BLOCK_ROWS = 4096  # rows of a panel per copy to the device
_NOISE = 1e-8  # relative to the largest eigenvalue: rounding noise of float32 sums
_INT8 = make_codec("int8_tensorwise")


class PackedHessianAccumulator:
    """Accumulate the complete H in a packed buffer.

    A float32 buffer contains sums XᵀX. A float16 buffer, usually a memory-mapped file, contains the running mean of the
    correlations, with Σx² per channel in float64 on the device.

    Args:
        channels: number of channels.
        packed: zeros, (packed_size(channels),), float32 or float16; may be in host memory.
        device: where the arithmetic runs.
    """

    captured_energy = 1.0

    def __init__(self, channels: int, packed: torch.Tensor, device: torch.device):
        self._channels, self._packed = channels, packed
        self._holds_sums = packed.dtype is torch.float32
        self._square = torch.zeros(channels, dtype=torch.float64, device=device)  # used with correlations only
        self._tokens = 0

    @property
    def sum_of_squares(self) -> torch.Tensor:
        """Σx² per channel, float64 (channels,)."""
        if not self._holds_sums:
            return self._square
        return torch.cat([panel.diagonal() for *_, panel in iter_panels(self._packed, self._channels)]).double()

    def add(self, activations: torch.Tensor) -> None:
        """Add activations (tokens, channels)."""
        (self._add_sums if self._holds_sums else self._update_mean)(matmul_operand(activations))
        self._tokens += len(activations)

    def _add_sums(self, activations: torch.Tensor) -> None:
        for start, stop, panel in iter_panels(self._packed, self._channels):
            add_product(panel, activations[:, start:].t(), activations[:, start:stop])

    def _update_mean(self, activations: torch.Tensor) -> None:
        old_tokens, tokens = self._tokens, self._tokens + len(activations)
        old_rms = channel_rms(self._square / max(old_tokens, 1)).float()
        self._square += activations.float().square().sum(dim=0, dtype=torch.float64)
        rms = channel_rms(self._square / tokens).float()
        transfer = Transfer(activations.device)
        for first, last, start, stop, block in self._blocks():
            # C ← (n_old·C·r_old·r_oldᵀ + XᵀX) / (n·r·rᵀ)
            mean = (transfer.fetch(block) * old_rms[first:last, None]).mul_(old_rms[start:stop] * old_tokens)
            add_product(mean, activations[:, first:last].t(), activations[:, start:stop])
            transfer.store(mean.div_(rms[first:last, None]).div_(rms[start:stop] * tokens).half(), block)
        transfer.wait()

    def _blocks(self) -> Iterator[tuple[int, int, int, int, torch.Tensor]]:
        """Yield (first row, last row, first column, last column, view) for each block of the packed buffer."""
        for start, stop, panel in iter_panels(self._packed, self._channels):
            first = start
            for block in panel.split(_BLOCK_ROWS):
                yield first, first + len(block), start, stop, block
                first += len(block)

    def resume(self, hessian: Hessian, tokens: int) -> None:
        """Continue from H of an earlier calibration with ``tokens`` tokens."""
        if isinstance(hessian, TriangularHessian):
            hessian = unpack_triangle(hessian, self._square.device)
        if not isinstance(hessian, PackedHessian):
            raise CalibrationError(
                "A low-rank calibration cannot be continued with full Hessians; use the same form (keep: compact)."
            )
        self._square.copy_(hessian.rms.double().square() * tokens)
        self._tokens = tokens
        self._packed.copy_(hessian.panels)
        if self._holds_sums:
            self._scale(self._packed, hessian.rms.to(self._packed) * tokens**0.5)

    def _scale(self, packed: torch.Tensor, factors: torch.Tensor) -> None:
        for start, stop, panel in iter_panels(packed, self._channels):
            panel.mul_(factors[start:, None]).mul_(factors[start:stop])

    def result(self) -> PackedHessian:
        """Return H of all activations added."""
        rms = channel_rms(self.sum_of_squares / max(self._tokens, 1))
        packed = self._packed
        if self._holds_sums:
            packed = packed.clone()
            self._scale(packed, (rms * max(self._tokens, 1) ** 0.5).reciprocal().to(packed))
            packed = packed.half()
        return PackedHessian(packed, rms.float().cpu())


class PairedHessianAccumulator:
    """Accumulate H of [X, X̂]: activations next to their INT8 per-token quantization.

    Args:
        channels: number of channels of X.
        packed: as for a :class:`PackedHessianAccumulator` with 2·channels channels.
        device: where the arithmetic runs.
    """

    captured_energy = 1.0

    def __init__(self, channels: int, packed: torch.Tensor, device: torch.device):
        self._pair = PackedHessianAccumulator(2 * channels, packed, device)
        self._sum = torch.zeros(2 * channels, dtype=torch.float64, device=device)
        self._tokens, self._channels = 0, channels

    @property
    def sum_of_squares(self) -> torch.Tensor:
        """Σx² per channel of X, float64 (channels,)."""
        return self._pair.sum_of_squares[: self._channels]

    def add(self, activations: torch.Tensor) -> None:
        """Add activations (tokens, channels)."""
        pair = torch.cat([activations.float(), _INT8.quantize_activations(activations)], dim=1)
        self._pair.add(pair)
        self._sum += pair.sum(dim=0, dtype=torch.float64)
        self._tokens += len(activations)

    def resume(self, hessian: Hessian, tokens: int) -> None:
        """Continue from H of an earlier calibration with ``tokens`` tokens."""
        if not isinstance(hessian, PairedHessian):
            raise CalibrationError(
                "A calibration without quantized activations cannot be continued with them; use the same form (keep: full)."
            )
        self._pair.resume(PackedHessian(hessian.panels, hessian.rms), tokens)
        self._sum.copy_(hessian.mean.double() * tokens)
        self._tokens = tokens

    def result(self) -> PairedHessian:
        """Return H of all activations added."""
        packed = self._pair.result()
        return PairedHessian(packed.panels, packed.rms, (self._sum / max(self._tokens, 1)).float().cpu())


class LowRankHessianAccumulator:
    """Accumulate H in low rank with its exact diagonal: streaming fixed-rank Nyström approximation (arXiv 1706.05736).

    The sketch is Y = XᵀX·Ω with random signs Ω (channels, 2·rank); it takes 8·channels·rank bytes. H ≈ Y·(ΩᵀY)⁻¹·Yᵀ,
    truncated to the leading ``rank`` directions; the exact diagonal covers the rest.
    """

    def __init__(self, channels: int, rank: int, device: torch.device):
        self._rank = min(rank, channels)
        self._signs = _random_signs(channels, min(2 * rank, channels), device)
        self._sketch = torch.zeros(self._signs.shape, device=device)
        self.sum_of_squares = torch.zeros(channels, dtype=torch.float64, device=device)
        self._tokens = 0
        self._captured_energy: float | None = None

    def add(self, activations: torch.Tensor) -> None:
        """Add activations (tokens, channels)."""
        operand, values = matmul_operand(activations), activations.float()
        projected = torch.zeros(len(activations), self._signs.shape[1], device=activations.device)
        add_product(projected, operand, self._signs.to(operand.dtype))
        self._sketch.addmm_(values.t(), projected)
        self.sum_of_squares += values.square().sum(dim=0, dtype=torch.float64)
        self._tokens, self._captured_energy = self._tokens + len(activations), None

    def resume(self, hessian: Hessian, tokens: int) -> None:
        """Continue from H of an earlier calibration with ``tokens`` tokens."""
        if not isinstance(hessian, LowRankHessian):
            raise CalibrationError(
                "A calibration with full Hessians cannot be continued in low rank; use the same form (keep: full)."
            )
        factor, diagonal = (part.to(self._sketch) for part in (hessian.factor, hessian.diagonal))
        self.sum_of_squares.copy_((factor.double().square().sum(dim=1) + diagonal.double()) * tokens)
        signs = self._signs.float()
        self._sketch.copy_((factor @ (factor.t() @ signs) + diagonal[:, None] * signs) * tokens)
        self._tokens = tokens

    def result(self) -> LowRankHessian:
        """Return H of all activations added."""
        tokens = max(self._tokens, 1)
        sketch, signs = self._sketch.double() / tokens, self._signs.double()
        core = signs.t() @ sketch
        eigenvalues, vectors = lapack(torch.linalg.eigh, (core + core.t()) / 2)  # ascending
        significant = eigenvalues > _NOISE * eigenvalues[-1].clamp_min(0)
        factor = sketch @ (vectors * torch.where(significant, eigenvalues.clamp_min(1e-300).rsqrt(), 0))
        factor = factor @ lapack(torch.linalg.eigh, factor.t() @ factor).eigenvectors[:, -self._rank :]
        captured = factor.square().sum(dim=1)
        total = float(self.sum_of_squares.sum()) / tokens
        self._captured_energy = float(captured.sum()) / total if total else 1.0
        diagonal = (self.sum_of_squares / tokens - captured).clamp_min(0)
        return LowRankHessian(factor.float().contiguous().cpu(), diagonal.float().cpu())

    @property
    def captured_energy(self) -> float:
        """Fraction tr(F·Fᵀ)/tr(H) that the leading directions cover."""
        if self._captured_energy is None:
            self.result()
        assert self._captured_energy is not None
        return self._captured_energy


HessianAccumulator = PackedHessianAccumulator | PairedHessianAccumulator | LowRankHessianAccumulator

_signs_in_use: weakref.WeakValueDictionary[tuple, torch.Tensor] = weakref.WeakValueDictionary()


def _random_signs(channels: int, count: int, device: torch.device) -> torch.Tensor:
    """Return random signs (channels, count), bfloat16: deterministic, and one tensor shared by all sketches of a shape."""
    key = channels, count, device
    signs = _signs_in_use.get(key)
    if signs is None:
        bits = torch.randint(2, (channels, count), generator=torch.Generator().manual_seed(channels), dtype=torch.int8)
        signs = _signs_in_use[key] = bits.mul_(2).sub_(1).to(device, torch.bfloat16)
    return signs


class StatisticsAccumulator:
    """Accumulate all statistics of activations with ``channels`` channels.

    Args:
        hessian: accumulator of H.
        validation: buffer for validation activations, (size, channels), any float dtype, on ``device``.
        pending: buffer that collects activations into batches large enough to fill the GPU, (size, channels); size may
            be 0.
        device: where the arithmetic runs.
        background: worker that updates H; None to update it in the calling thread.

    Attributes:
        tokens: number of tokens in H.
        validation_tokens: number of tokens that the validation activations were sampled from.
    """

    def __init__(
        self,
        hessian: HessianAccumulator,
        channels: int,
        validation: torch.Tensor,
        pending: torch.Tensor,
        device: torch.device,
        background: BackgroundWorker | None = None,
    ):
        self.hessian, self.channels = hessian, channels
        self.tokens = self.validation_tokens = self._batches = self._filled = 0
        self._validation, self._pending, self._background = validation, pending, background
        self._amax = torch.zeros(channels, dtype=validation.dtype, device=device)
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self._counts = torch.zeros(BINS, dtype=torch.float64, device=device)

    def update_amax(self, x: torch.Tensor) -> None:
        """Update the largest magnitudes with all activations (tokens, channels), sampled or not."""
        torch.maximum(self._amax, torch.linalg.vector_norm(x, math.inf, dim=0), out=self._amax)

    def add(self, x: torch.Tensor, indices: torch.Tensor) -> None:
        """Add the tokens at ``indices`` of activations (tokens, channels); takes effect in :meth:`flush` at the latest."""
        count = len(indices)
        if not count:
            return
        self.tokens += count
        if self._filled + count > len(self._pending):
            self.flush()
        if count > len(self._pending) or x.dtype is not self._pending.dtype:
            self._update(x.index_select(0, indices))
        else:
            torch.index_select(x, 0, indices, out=self._pending[self._filled : self._filled + count])
            self._filled += count

    def flush(self) -> None:
        """Add the pending activations."""
        if self._filled:
            batch, self._filled = self._pending[: self._filled], 0
            self._update(batch)

    def _update(self, batch: torch.Tensor) -> None:
        if self._background is None:
            self.hessian.add(batch)
        else:
            self._background.submit(self.hessian.add, batch)
        self._sum += batch.sum(dim=0, dtype=torch.float64)
        if self._batches % _HISTOGRAM_PERIOD == 0:
            self._counts += histogram(batch)
        self._batches += 1

    def add_validation(self, x: torch.Tensor, indices: torch.Tensor, slots: torch.Tensor, sampled_from: int) -> None:
        """Store the tokens at ``indices`` of ``x`` in distinct ``slots`` (n,) of the validation buffer.

        ``sampled_from``: number of tokens that they are a sample of.
        """
        if len(indices):
            self._validation.index_copy_(0, slots, x.index_select(0, indices).to(self._validation))
        self.validation_tokens += sampled_from

    def resume(self, earlier: LayerStatistics, tokens: int, validation_tokens: int) -> None:
        """Continue from the statistics of an earlier calibration.

        Raises:
            CalibrationError: its Hessian has another form, or some statistics are missing.
        """
        hessian, mean, amax, counts = earlier.hessian, earlier.mean, earlier.amax, earlier.histogram
        if hessian is None or mean is None or amax is None or counts is None:
            raise CalibrationError(
                "A calibration without mean, amax or histogram cannot be continued; calibrate again."
            )
        self.hessian.resume(hessian, tokens)
        self.tokens = tokens
        self._sum.copy_(mean.double() * tokens)
        self._amax.copy_(amax)
        self._counts.copy_(counts)
        validation = earlier.validation_hessian
        if validation is not None:
            if not isinstance(validation, LowRankHessian):
                raise CalibrationError(
                    "A calibration without validation activations cannot be continued; calibrate again."
                )
            activations = validation.factor.t() * math.sqrt(validation.factor.shape[1])
            count = min(len(activations), len(self._validation))
            self._validation[:count] = activations[:count].to(self._validation)
            self.validation_tokens = validation_tokens if count == len(self._validation) else count

    def result(self) -> LayerStatistics:
        """Return the statistics of all activations added, per-channel statistics on the CPU."""
        activations = self._validation[: self.validation_tokens]
        validation = None
        if len(activations):
            validation = LowRankHessian(activations.t().cpu() / math.sqrt(len(activations)), torch.zeros(self.channels))
        mean = (self._sum / max(self.tokens, 1)).float().cpu()
        return LayerStatistics(self.hessian.result(), validation, mean, self._amax.float().cpu(), self._counts.cpu())
