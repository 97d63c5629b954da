"""The routes of the pack: requests that no page sends get 400 and a sentence, and change nothing."""

import json
import urllib.error
import urllib.request

import pytest
from safetensors import safe_open

from learned_rounding.tests.nodes.probing import ProbedGraph, saved_path, unique

PROGRESS, NATIVE_INT8, PREVIEW = (f"/learned_rounding/{name}" for name in ("progress", "native_int8", "preview"))
JSON = "application/json"

# Bodies for the setting of INT8 kernels: (content type, body).
BODIES = {
    "empty": (JSON, b""),
    "not JSON": (JSON, b"nonsense"),
    "not UTF-8": (JSON, b"\xff\xfe"),
    "object": (JSON, b'{"auto": 1}'),
    "list": (JSON, b'["auto"]'),
    "number": (JSON, b"1"),
    "NaN": (JSON, b"NaN"),
    "boolean": (JSON, b"true"),
    "null": (JSON, b"null"),
    "unknown mode": (JSON, b'"fast"'),
    "nested 100,000 levels deep": (JSON, b"[" * 100_000),
    "number of 5 MB": (JSON, b"1" * 5_000_000),
    "a mode and five million spaces": (JSON, b'"on"' + b" " * 5_000_000),
    "text, as a page of another site sends it": ("text/plain", b'"on"'),
    "form": ("application/x-www-form-urlencoded", b'"on"'),
    "without a type": ("", b'"on"'),
}
MODEL = "diffusion_models/tiny_mmdit_emoji.safetensors"
CONFIGURE = {"format": "int8_tensorwise", "granularity": "auto", "preset": "auto", "seed": 0, "convrot": "off"}
# Requests for a preview that no page sends.
REQUESTS = {
    "list": [],
    "no model": {"recipe": None},
    "model as a number": {"model": 1},
    "recipe as a text": {"model": MODEL, "recipe": "int8"},
    "recipe without a format": {"model": MODEL, "recipe": {"seed": 0}},
    "unknown input": {"model": MODEL, "recipe": {**CONFIGURE, "colour": "red"}},
    "keep as a number": {"model": MODEL, "recipe": {**CONFIGURE, "keep": 1}},
    "options as a list": {"model": MODEL, "recipe": CONFIGURE, "options": ["damping"]},
    "300 KB": {"model": MODEL, "recipe": {**CONFIGURE, "keep": "x" * 300_000}},
}
# Requests for a preview of a run that would be refused.
REFUSED = {
    "missing file": {"model": "diffusion_models/missing.safetensors"},
    "another folder": {"model": "../../etc/passwd"},
    "null byte": {"model": "diffusion_models/a\0b"},
    "unknown format": {"model": MODEL, "recipe": {**CONFIGURE, "format": "int9"}},
    "format as a number": {"model": MODEL, "recipe": {**CONFIGURE, "format": 8}},
    "pattern": {"model": MODEL, "recipe": {**CONFIGURE, "keep": "("}},
    "no calibration": {"model": MODEL, "recipe": {**CONFIGURE, "rounding": "calibrated"}},
}
QUERIES = {
    "none": "",
    "another name": "?flow=x",
    "no workflow": "?workflow=",
    "twice": "?workflow=a&workflow=b",
    "another name twice": "?workflow=a&x=1&x=2",
    "long": f"?workflow={'x' * 4000}",
}


def status(comfy, method: str, path: str, content_type: str = "", body: bytes | None = None) -> tuple[int, str]:
    """Status and text of the response to a request."""
    request = urllib.request.Request(comfy.url + path, method=method, data=body, headers={"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("body", BODIES)
def test_wrong_body_gets_400(comfy, sentences, body):
    code, text = status(comfy, "POST", NATIVE_INT8, *BODIES[body])
    assert code == 400
    sentences(text)


@pytest.mark.parametrize("query", QUERIES)
def test_wrong_query_gets_400(comfy, sentences, query):
    code, text = status(comfy, "GET", PROGRESS + QUERIES[query])
    assert code == 400
    sentences(text)


@pytest.mark.parametrize("request_", REQUESTS)
def test_wrong_preview_request_gets_400(comfy, sentences, request_):
    code, text = status(comfy, "POST", PREVIEW, JSON, json.dumps(REQUESTS[request_]).encode())
    assert code == 400
    sentences(text)


@pytest.mark.parametrize("request_", REFUSED)
def test_preview_of_a_refused_run_is_one_sentence(comfy, sentences, request_):
    error = comfy.post(PREVIEW, REFUSED[request_])["error"]
    assert str(comfy.base) not in error
    sentences(error)


@pytest.mark.parametrize("format", ["float8_e4m3fn", "int8_tensorwise", "asym_w4a8_int8"])
def test_preview_has_the_size_of_the_saved_file(comfy, request, format):
    found = comfy.post(PREVIEW, {"model": MODEL, "recipe": {**CONFIGURE, "format": format}})
    graph = ProbedGraph()
    node = graph.save(graph.quantize(graph.source()[0], format, convrot="off"), unique(request))
    saved = saved_path(comfy.queue(graph), node)
    assert found["bytes_out"] == saved.stat().st_size
    assert found["seconds"] > 0
    with safe_open(saved, "pt") as file:
        layers = [name for name in file.keys() if name.endswith(".comfy_quant")]
    assert found["layers"] == len(layers) == sum(count for _, count, *_ in found["formats"])


def test_right_requests_are_answered(comfy):
    assert status(comfy, "POST", NATIVE_INT8, f"{JSON}; charset=utf-8", b' "auto" ') == (200, '"auto"')
    assert status(comfy, "GET", f"{PROGRESS}?workflow=x&other=1") == (200, "[]")
    assert comfy.post(NATIVE_INT8, "off") == "off"
