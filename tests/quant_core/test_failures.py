"""Errors as plain data: class, message and what they concern."""

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.failures import describe_error


def test_known_errors_are_described_with_what_they_concern():
    described = describe_error(SourceError("It is damaged.", file="a.safetensors", tensor="b.weight"))
    assert described == {
        "type": "SourceError",
        "message": "It is damaged.",
        "file": "a.safetensors",
        "tensor": "b.weight",
        "option": None,
    }


def test_unexpected_errors_ask_for_a_report():
    described = describe_error(KeyError("name"))
    assert described["type"] == "KeyError"
    assert described["message"] == (
        "unexpected error (KeyError: 'name'); run again with --debug for the traceback, and report it."
    )
    assert described["file"] is None
