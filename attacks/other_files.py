"""Files that are not models."""

from .attack import Attack

__all__ = ["OTHERS"]

OTHERS = {
    "other_page": Attack(
        "x.safetensors", b"<!DOCTYPE html><title>\x1b[2J</title>" * 9, "web page with control characters"
    ),
    "other_text": Attack("x.pt", b"\xc2\x9b2J word " * 100_000, "text file with control characters"),
    "other_pointer": Attack(
        "x.gguf", b"version https://git-lfs.github.com/spec/v1\n" * 9_000, "Git LFS pointer of 400 kB"
    ),
    "other_zip_entries": Attack(
        "x.pt", b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2), "archive that declares 65,535 files and has none"
    ),
    "other_zeros": Attack("x.safetensors", lambda folder: bytes(10_000_000), "10 MB of zeros"),
}
