"""All hostile files, texts and patterns. ``tests/fuzz/test_attacks.py`` runs each through every entry point that reads them."""

from .attack import CANARY, Attack
from .gguf_files import GGUF
from .index_files import INDEXES
from .other_files import OTHERS
from .pickle_files import PICKLES
from .quantized_files import QUANTIZED
from .safetensors_files import SAFETENSORS
from .texts import TEXTS

__all__ = ["CANARY", "CASES", "PATTERNS", "TEXTS"]

CASES: dict[str, Attack] = {**SAFETENSORS, **QUANTIZED, **PICKLES, **INDEXES, **GGUF, **OTHERS}

PATTERNS = {  # regular expression → purpose
    "(a+)+$": "nested quantifiers, exponential in Python",
    "(a|a)*$": "ambiguous alternatives, exponential in Python",
    "(.*a){20}": "quantified wildcard, repeated 20 times",
    ".*.*.*.*.*.*=": "polynomial of degree six",
    "(" * 900 + ")" * 900: "900 nested groups",
    "(((a{99}){99}){99}){99}": "96 million letters in a short pattern",
    "(?=(a+))+": "quantified look-ahead",
    "(?R)": "endless recursion, one level of memory each",
    "a" * 2000: "long literal, whose search tables take cubic time",
    "a{999999999999}": "repeat count beyond 32 bits",
    "[": "unterminated character class",
    "[\\x00-\\U0010ffff]" * 110: "classes of a million characters, which Python compiles one by one",
}
