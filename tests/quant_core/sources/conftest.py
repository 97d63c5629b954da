import json
import struct

import pytest


@pytest.fixture
def raw_file(tmp_path):
    """raw_file(header, data=b"") → a file with that header (text, bytes or a mapping) and data, right or wrong."""

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
