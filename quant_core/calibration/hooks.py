"""Watch the linear layers of a running model and gather statistics of their inputs."""

import contextlib
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..errors import CalibrationError, OutputError
from .accumulate import Accumulator, FullGram, PairedGrams, SketchedGram
from .background import Background
from .file import CalibrationFile, write_calibration
from .panels import packed_size

__all__ = ["Collector", "ROTATION"]

ROTATION = 8  # a Gram in a file is summed up in every eighth call, from eight times the tokens
_LEAST_RANK = 16  # of a Gram in low rank: with fewer random signs its directions are not to be trusted
_HELD_OUT = 0.25  # of the tokens, where no run is held out as a whole
_HELD_BYTES = 1 << 30  # for held-out rows of all layers together
_LANES = 2  # threads that update Grams in files: one copies while the GPU computes for the other
_WAITING_BYTES = 2048  # for each channel of a Gram on the device: 1,024 rows of 16 bits that wait to be learned from


class Collector:
    """Statistics of the inputs of ``layers`` while a model runs.

    Each call of the model gives up to ``tokens`` seeded tokens to every layer's Gram; layers that are given the very same
    tensor share one. What the hooks see they only read, and they are gone when :meth:`watching` ends, however it ends.

    Memory: Grams lie in float32 on ``device``, with up to 1,024 rows each that wait to be learned from at once, as long
    as ``device_bytes`` last, then in files in ``folder`` (2 bytes for each of in²/2 numbers; on the device are the rows
    for four of them and pieces of two, and 0.2 GB of host memory is page-locked). In low rank they take 8·in²/``rank``
    bytes of ``device`` each; held-out rows of all layers together at most 1 GB.

    Args:
        layers: name (of its weight, without ``.weight``) → linear layer.
        folder: for the files; must exist.
        device: where the model runs.
        device_bytes: how much of its memory Grams may take.
        rank: None to keep Grams in full; a number to keep the leading ``in / rank`` directions, at least 16, and the
            diagonal.
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
        self._holdout_rows = max(16, min(holdout_rows, _HELD_BYTES // (4 * max(channels, 1))))
        self._sites: dict[str, str] = {}  # layer → the layer whose statistics are its own too
        self._found: dict[str, Accumulator] = {}
        self._turns: dict[
            str, tuple[int, int]
        ] = {}  # a Gram takes tokens at first, and when call + second is a multiple of first
        self._files: list[Path] = []
        self._background: list[Background] = []
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
        widths = [layer.weight.shape[1] for layer in self._layers.values()]
        return 0 if sum(map(self._device_bytes, widths)) <= self._left else 2 * sum(map(self._size, widths))

    @property
    def device_bytes(self) -> int:
        """The most that Grams, and rows that wait for them, can take of the device's memory."""
        widths = [layer.weight.shape[1] for layer in self._layers.values()]
        if self._rank:
            return sum(8 * width * max(_LEAST_RANK, width // self._rank) for width in widths)
        return min(sum(map(self._device_bytes, widths)), max(self._left, 0))

    @property
    def kept(self) -> float:
        """The least share, over all inputs, of the energy tr H that is known with its directions; 1 for full Grams."""
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
            self._flush()

    @torch.inference_mode()
    def _flush(self) -> None:
        """Learn from all rows that wait."""
        for found in self._found.values():
            found.flush()
        for background in self._background:
            background.finish()

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

    @torch.inference_mode()
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
        had_none = not (found.held_tokens if self._hold_out else found.tokens)
        if (self._calls + phase) % every and not had_none:
            return
        learned, held = self._choose(len(rows), every)
        if self._hold_out is not True:
            found.add(rows, learned)
        if self._hold_out is not False:
            found.hold_out(rows, *self._reservoir(held, found.held_tokens), len(held))

    def _choose(self, count: int, every: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the tokens to learn from, on the device, and of those to hold out; the same for all layers of a call."""
        if (count, every) not in self._chosen:
            generator = self._generator(count, 0)
            order = torch.randperm(count, generator=generator)[: self._tokens * every]
            if self._hold_out is None:
                apart = torch.rand(len(order), generator=generator) < _HELD_OUT
                parts = order[~apart], order[apart]
            else:
                parts = order, order
            learned, held = (part.sort().values for part in parts)
            self._chosen[count, every] = self._send(learned), held
        return self._chosen[count, every]

    def _reservoir(self, held: torch.Tensor, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the held-out tokens to keep, and where, for a fair sample of all so far (reservoir sampling); on the device."""
        key = id(held), seen
        if key not in self._kept:
            counts = torch.arange(len(held)) + seen
            drawn = torch.rand(len(held), generator=self._generator(len(held), seen + 1), dtype=torch.float64)
            places = torch.where(counts < self._holdout_rows, counts, (drawn * (counts + 1)).long()).tolist()
            last = {
                place: token for token, place in enumerate(places) if place < self._holdout_rows
            }  # two for one place
            tokens = held[torch.tensor(list(last.values()), dtype=torch.long)]
            self._kept[key] = tuple(self._send(torch.stack([tokens, torch.tensor(list(last), dtype=torch.long)])))
        return self._kept[key]

    def _send(self, indices: torch.Tensor) -> torch.Tensor:
        """``indices`` on the device; a GPU is not waited for."""
        if self._device.type == "cuda":
            indices = indices.pin_memory()
        return indices.to(self._device, non_blocking=True)

    def _generator(self, *numbers: int) -> torch.Generator:
        mixed = hash((self._seed, self._calls, *numbers))  # of whole numbers alone, so the same in every process
        return torch.Generator().manual_seed(mixed & (2**63 - 1))

    def _begin(self, name: str, x: torch.Tensor) -> Accumulator:
        inner = x.shape[-1]
        gram, waiting, background = self._gram(name, inner)
        held, waiting = (
            torch.zeros(rows, inner, dtype=x.dtype, device=self._device)
            for rows in (self._holdout_rows, waiting // x.element_size())
        )
        found = Accumulator(gram, inner, held, waiting, self._device, background)
        if self._earlier is not None and (known := self._earlier.inputs(name)) is not None:
            found.start(known, *self._earlier.tokens(name))
        return found

    def _size(self, inner: int) -> int:
        """How many numbers a full Gram has."""
        return packed_size(2 * inner if self._paired else inner)

    def _device_bytes(self, inner: int) -> int:
        """What a full Gram takes on the device, with the rows that wait for it."""
        return 4 * self._size(inner) + _WAITING_BYTES * inner

    def _gram(self, name: str, inner: int) -> tuple[FullGram | PairedGrams | SketchedGram, int, Background | None]:
        """A Gram, how many bytes of each channel may wait for it, and who updates it, if not the hook."""
        self._turns[name] = 1, 0
        if self._rank:
            return SketchedGram(inner, max(_LEAST_RANK, inner // self._rank), self._device), 0, None
        size, kind = self._size(inner), PairedGrams if self._paired else FullGram
        if self._device_bytes(inner) <= self._left:
            self._left -= self._device_bytes(inner)
            return kind(inner, torch.zeros(size, device=self._device), self._device), _WAITING_BYTES, None
        number = len(self._files)
        self._turns[name] = ROTATION, number
        background = None
        if self._device.type == "cuda":
            if not self._background:
                self._background = [Background(self._device) for _ in range(_LANES)]
            background = self._background[number // ROTATION % _LANES]  # those of one call on all of them
        return kind(inner, self._mapped(size), self._device), 0, background

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
        self._flush()
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

    def close(self) -> None:
        """Give back all memory and remove the files."""
        for background in self._background:
            background.close()
        self._background.clear()
        self._found.clear()
        for path in self._files:
            path.unlink(missing_ok=True)
        self._files.clear()

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_) -> None:
        self.close()


_ZEROS = memoryview(bytes(1 << 22))
