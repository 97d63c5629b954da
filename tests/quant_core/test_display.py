"""Text output of bounded length."""

import pytest

from learned_rounding.quant_core.cli import streams
from learned_rounding.quant_core.cli.streams import prepare_streams, print_error, print_line
from learned_rounding.quant_core.display import bound_lines, describe_cause, shorten, size_change, three_digits
from learned_rounding.quant_core.errors import QuantizationError, UnknownNameError


@pytest.mark.parametrize("length", [0, 1, 8, 9, 10, 1000])
def test_long_texts_lose_their_middle(length):
    text = "".join(chr(ord("a") + index % 26) for index in range(length))
    short = shorten(text, 9)
    assert short == text if length <= 9 else (short == f"{text[:4]}…{text[-4:]}" and len(short) <= 9)


def test_numbers_have_three_digits():
    shown = {0.0263412: "0.0263", 0.5: "0.5", 12.345: "12.3", 1234.5: "1230", 0: "0", 0.0000263: "2.63e-05"}
    assert {value: three_digits(value) for value in shown} == shown
    assert three_digits(float("nan")) == "–"


def test_sizes_are_compared_with_those_before():
    assert [size_change(100, after) for after in (54, 100, 112)] == ["46 % smaller", "0 % smaller", "12 % larger"]
    assert size_change(0, 5) == ""


def test_many_lines_are_counted():
    assert bound_lines(["a", "b"], 2) == "a\nb"
    assert bound_lines(["x" * 100_000, *"abc"], 2).split("\n")[1:] == ["a", "… 2 more lines"]
    assert len(bound_lines(["x" * 100_000])) <= 2000


def test_causes_are_named_whatever_the_exception_says(subtests):
    for error, text in [
        (KeyError("dtype"), "'dtype' is missing"),
        (IndexError("list index out of range"), "list index out of range"),
        (MemoryError(), "MemoryError"),
        (ValueError("x" * 1000), "x" * 300),
    ]:
        with subtests.test(type(error).__name__):
            assert describe_cause(error) == text


def test_message_of_an_error_is_bounded():
    assert len(str(QuantizationError("x" * 10**6))) <= 2000


def test_unknown_name_of_any_length_is_refused_at_once():
    """The search for a similar name takes time that grows with the square of the length."""
    error = UnknownNameError("format", "int8_tensorwise" * 10**6, ["int8_tensorwise"])
    assert len(str(error)) < 300 and error.name.startswith("int8")


def test_output_of_a_command_is_bounded(capsys, monkeypatch):
    monkeypatch.setattr(streams, "_MOST", 10_000)
    prepare_streams()
    print_line("")
    print_line("a\n\x1b[2J" + "\0" * 10**6)
    first = capsys.readouterr().out
    assert first.startswith("\na\n\\x1b[2J") and len(first) < 4000
    for _ in range(100):
        print_line("x" * 1000), print_error("y" * 1000)
    output, error = capsys.readouterr()
    assert (output + error).count("left out") == 1 and len(first + output + error) < 10_200
    prepare_streams()
    print_line("the next command")
    assert capsys.readouterr().out == "the next command\n"
