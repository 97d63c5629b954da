"""The routes of the pack: requests that no page sends get 400 and a sentence, and change nothing."""

import urllib.error
import urllib.request

import pytest

PROGRESS, NATIVE_INT8 = "/learned_rounding/progress", "/learned_rounding/native_int8"
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


def test_right_requests_are_answered(comfy):
    assert status(comfy, "POST", NATIVE_INT8, f"{JSON}; charset=utf-8", b' "auto" ') == (200, '"auto"')
    assert status(comfy, "GET", f"{PROGRESS}?workflow=x&other=1") == (200, "[]")
    assert comfy.post(NATIVE_INT8, "off") == "off"
