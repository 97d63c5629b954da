import json
import struct

import pytest


@pytest.fixture
def raw_file(tmp_path):
    """Return raw_file(header, data=b""), which writes a safetensors file; ``header``: string, bytes or JSON value, valid or not."""

    def make(header, data: bytes = b"", name: str = "raw.safetensors", length: int | None = None):
        text = (
            header
            if isinstance(header, bytes)
            else (header if isinstance(header, str) else json.dumps(header)).encode()
        )
        path = tmp_path / name
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return path

    return make
