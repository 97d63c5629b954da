"""Watch the linear layers of a running model and gather statistics of their inputs."""

import contextlib
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..errors import CalibrationError, OutputError
from .accumulate import Accumulator, FullGram, PairedGrams, SketchedGram, Worker
from .file import CalibrationFile, write_calibration
from .panels import packed_size

__all__ = ["Collector", "ROTATION"]

# A Gram in a file takes its turn in every eighth call, from eight times the tokens; one in low rank, whose step is slow
# and which needs fewer, from as many as any. Turns begin when a Gram has seen so many tokens.
ROTATION, _AT_ONCE = 8, 2048
_BATCH, _FEWEST = 2048, 64  # rows that are summed up in one go, as memory permits
_WAITING_SHARE = 8  # the part of the device memory that rows may wait in
_HELD_OUT = 0.25  # of the tokens, where no run is held out as a whole
_HELD_BYTES = 1 << 30  # for held-out rows of all layers together


class Collector:
    """Statistics of the inputs of ``layers`` while a model runs.

    Each call of the model gives up to ``tokens`` seeded tokens to every layer's Gram; layers that are given the very same
    tensor share one. What the hooks see they only read, and they are gone when :meth:`watching` ends, however it ends.

    Memory: Grams lie in float32 on ``device`` as long as ``device_bytes`` last, then in files in ``folder`` (2 bytes for
    each of in²/2 numbers); rows that wait to be summed up take an eighth of ``device_bytes``, or what
    64 rows of each input take, held-out rows at most 1 GB.

    Args:
        layers: name (of its weight, without ``.weight``) → linear layer.
        folder: for the files; must exist.
        device: where the model runs.
        device_bytes: how much of its memory Grams may take.
        rank: None to keep Grams in full; a number to keep the leading ``in / rank`` directions and the diagonal.
        quantized_inputs: also keep, in full, how inputs go with what INT8 makes of them: four times the memory.
        tokens: how many tokens of a call are looked at.
        holdout_rows: how many held-out tokens to keep for each input.
        seed: of the choice of tokens.
        earlier: a calibration of the same layers to continue.

    Attributes:
        sensitivity: layer → :attr:`~.gram.Inputs.sensitivity`, where that was measured; saved with the rest.
    """

    def __init__(
        self,
        layers: Mapping[str, torch.nn.Module],
        folder: str | os.PathLike,
        *,
        device: torch.device,
        device_bytes: int,
        rank: int | None = None,
        quantized_inputs: bool = False,
        tokens: int = 256,
        holdout_rows: int = 512,
        seed: int = 0,
        earlier: CalibrationFile | None = None,
    ):
        self._layers, self._folder, self._device = dict(layers), Path(folder), device
        self._left, self._rank, self._tokens, self._seed = device_bytes, rank, tokens, seed
        self._earlier, self._paired = earlier, quantized_inputs
        channels = sum(layer.weight.shape[1] for layer in self._layers.values())
        self._batch = max(_FEWEST, min(_BATCH, device_bytes // _WAITING_SHARE // (4 * max(channels, 1))))
        self._left -= device_bytes // _WAITING_SHARE
        self._worker: Worker | None = None
        self._holdout_rows = max(16, min(holdout_rows, _HELD_BYTES // (4 * max(channels, 1))))
        self._sites: dict[str, str] = {}  # layer → the layer whose statistics are its own too
        self._found: dict[str, Accumulator] = {}
        # A Gram that has enough tokens takes more only when call + second is a multiple of first.
        self._turns: dict[str, tuple[int, int]] = {}
        self._files: list[Path] = []
        self._recent: dict[int, tuple[weakref.ref, str]] = {}
        self._chosen: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._calls = 0
        self._hold_out: bool | None = None
        self.sensitivity = dict(earlier.sensitivity) if earlier is not None else {}
        if earlier is not None:
            earlier.check({name: tuple(layer.weight.shape) for name, layer in self._layers.items()})

    @property
    def disk_bytes(self) -> int:
        """The most that files can take if no layers share an input."""
        if self._rank:
            return 0
        sizes = [self._size(layer.weight.shape[1]) for layer in self._layers.values()]
        return 0 if 4 * sum(sizes) <= self._left else 2 * sum(sizes)

    @property
    def kept(self) -> float:
        """The least share, over all inputs, of the energy tr H that is known with its directions; 1 for full Grams."""
        self.settle()
        return min((found.gram.kept for found in self._found.values()), default=1.0)

    @property
    def calls(self) -> int:
        """How many calls of the model were watched."""
        return self._calls

    @property
    def inputs(self) -> int:
        """How many different inputs were seen."""
        return len(self._found)

    @property
    def tokens(self) -> int:
        """The least number of tokens that a Gram is the mean of."""
        return min((found.tokens for found in self._found.values() if found.tokens), default=0)

    @contextlib.contextmanager
    def watching(self, model: torch.nn.Module, hold_out: bool | None = None) -> Iterator[None]:
        """Gather while ``model``, which holds the layers, is called.

        ``hold_out``: True to keep these inputs apart for judging, False to learn from all of them, None to hold out a
        quarter of the tokens.
        """
        self._hold_out = hold_out
        handles = [model.register_forward_pre_hook(self._next_call)]
        try:
            for name, layer in self._layers.items():
                handles.append(layer.register_forward_pre_hook(self._hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._recent.clear()

    def _next_call(self, *_) -> None:
        self._calls += 1
        self._recent.clear()
        self._chosen.clear()
        self._kept.clear()

    def _hook(self, name: str):
        def hook(layer: torch.nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].numel():
                self._take(name, args[0])

        return hook

    @torch.no_grad()
    def _take(self, name: str, x: torch.Tensor) -> None:
        seen, leader = self._recent.setdefault(id(x), (weakref.ref(x), name))
        if seen() is not x:  # another tensor that lay at the same address
            self._recent[id(x)], leader = (weakref.ref(x), name), name
        if name not in self._sites:
            self._sites[name] = leader
        elif self._sites[name] not in (name, leader):  # no longer given what its leader is
            self._sites[name] = name
        if self._sites[name] != name:
            return  # its leader has seen this tensor
        if name not in self._found:
            self._found[name] = self._begin(name, x)
        found, rows = self._found[name], x.detach().flatten(0, -2)
        found.see(rows)
        every, phase = self._turns[name]
        enough = (found.held_tokens if self._hold_out else found.tokens) >= _AT_ONCE
        if enough and (self._calls + phase) % every:
            return
        learned, held = self._choose(len(rows), 1 if self._rank else every)
        if self._hold_out is not True:
            found.add(rows[learned])
        if self._hold_out is not False:
            taken, places = self._reservoir(held, found.held_tokens)
            found.hold_out(rows[taken], places, len(held))

    def _choose(self, count: int, every: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the tokens to learn from and of those to hold out; the same for all layers of a call."""
        if (count, every) not in self._chosen:
            generator = self._generator(count, 0)
            order = torch.randperm(count, generator=generator)[: self._tokens * every]
            if self._hold_out is None:
                apart = torch.rand(len(order), generator=generator) < _HELD_OUT
                parts = order[~apart], order[apart]
            else:
                parts = order, order
            self._chosen[count, every] = tuple(self._sent(part.sort().values) for part in parts)
        return self._chosen[count, every]

    def _reservoir(self, held: torch.Tensor, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the held-out tokens to keep, and where, for a fair sample of all so far (reservoir sampling)."""
        key = id(held), seen
        if key not in self._kept:
            counts = torch.arange(len(held)) + seen
            drawn = torch.rand(len(held), generator=self._generator(len(held), seen + 1), dtype=torch.float64)
            places = torch.where(counts < self._holdout_rows, counts, (drawn * (counts + 1)).long()).tolist()
            last = {
                place: token for token, place in enumerate(places) if place < self._holdout_rows
            }  # two for one place
            chosen = self._sent(torch.tensor([list(last.values()), list(last)], dtype=torch.long))
            self._kept[key] = held[chosen[0]], chosen[1]
        return self._kept[key]

    def _sent(self, indices: torch.Tensor) -> torch.Tensor:
        """On the device; without waiting, as a copy of ordinary memory would, for all that the model has begun."""
        if self._device.type != "cuda":
            return indices.to(self._device)
        return indices.pin_memory().to(self._device, non_blocking=True)

    def _generator(self, *numbers: int) -> torch.Generator:
        mixed = hash((self._seed, self._calls, *numbers))  # of whole numbers alone, so the same in every process
        return torch.Generator().manual_seed(mixed & (2**63 - 1))

    def _begin(self, name: str, x: torch.Tensor) -> Accumulator:
        inner = x.shape[-1]
        gram = self._gram(name, inner)
        held = torch.zeros(self._holdout_rows, inner, dtype=x.dtype, device=self._device)
        found = Accumulator(gram, inner, held, self._device, self._batch)
        if self._earlier is not None and (known := self._earlier.inputs(name)) is not None:
            found.start(known, *self._earlier.tokens(name))
        return found

    def _gram(self, name: str, inner: int) -> FullGram | PairedGrams | SketchedGram:
        self._turns[name] = 1, 0
        if self._rank:
            self._turns[name] = ROTATION, len(self._found)
            return SketchedGram(inner, max(1, inner // self._rank), self._device)
        size, kind = self._size(inner), PairedGrams if self._paired else FullGram
        if 4 * size <= self._left:
            self._left -= 4 * size
            return kind(inner, torch.zeros(size, device=self._device), self._device)
        self._turns[name] = ROTATION, len(self._files)
        if self._worker is None and self._device.type == "cuda":
            self._worker = Worker(self._device)
        return kind(inner, self._mapped(size), self._device, self._worker)

    def _size(self, inner: int) -> int:
        return packed_size(2 * inner if self._paired else inner)

    def _mapped(self, size: int) -> torch.Tensor:
        path = self._folder / f"gram_{len(self._files):05}"
        try:
            with open(
                path, "xb"
            ) as file:  # written out, since a full disk would kill the process that maps a sparse file
                self._files.append(path)
                for start in range(0, 2 * size, len(_ZEROS)):
                    file.write(_ZEROS[: 2 * size - start])
        except OSError as error:
            raise OutputError(
                f"Grams cannot be kept in {self._folder}: {error.strerror or error}; free some space, or keep less."
            ) from error
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)

    def save(self, path: str | os.PathLike, provenance: Mapping[str, object]) -> int:
        """Write all that was found, see :class:`~.file.CalibrationFile`; returns the file's size in bytes.

        ``provenance``: what the statistics are of, as JSON values.

        Raises:
            CalibrationError: nothing was seen, or inputs were not finite.
        """
        self.settle()
        known = {name: found for name, found in self._found.items() if found.tokens}
        if not known:
            raise CalibrationError("No linear layer was called, so there is nothing to calibrate with.")
        for name, found in known.items():
            if not math.isfinite(float(found.gram.square.sum())):
                raise CalibrationError(
                    f"The inputs of {name} hold NaN or Inf; sample the model once to see what is wrong."
                )
        sites = {layer: site for layer, site in self._sites.items() if site in known}
        shapes = {layer: tuple(self._layers[layer].weight.shape) for layer in sites}
        counts = {name: (found.tokens, found.held_tokens) for name, found in known.items()}
        results = {name: found.result() for name, found in known.items()}
        return write_calibration(path, results, sites, shapes, counts, provenance, self.sensitivity)

    def settle(self) -> None:
        """Sum up everything that was seen so far."""
        for found in self._found.values():
            found.settle()
        if self._worker is not None:
            self._worker.wait()

    def close(self) -> None:
        """Give back all memory and remove the files."""
        if self._worker is not None:
            self._worker.close()
        self._found.clear()
        for path in self._files:
            path.unlink(missing_ok=True)
        self._files.clear()

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_) -> None:
        self.close()


_ZEROS = memoryview(bytes(1 << 22))
