"""The entry point of ``lrq``: help and version without torch, other commands then end with one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import learned_rounding
from learned_rounding.command_line import describe_import, find_text
from learned_rounding.quant_core.version import VERSION
from learned_rounding.tests.help_pages import FOLDER, render_pages

ROOT = Path(learned_rounding.__file__).parent
PAGES = render_pages()


def run_without_packages(*words, **options) -> subprocess.CompletedProcess:
    """The clone as a command, in a Python without installed packages."""
    command = [sys.executable, "-I", "-S", ROOT, *words]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, **options)


@pytest.mark.parametrize("name", PAGES)
def test_help_pages_are_those_of_the_parser(name):
    """Written by python tests/help_pages.py."""
    assert (FOLDER / f"{name}.txt").read_text(encoding="utf-8").split() == PAGES[name].split()
    assert all(len(line) <= 80 for line in PAGES[name].splitlines())


def test_every_help_page_has_its_command():
    assert {path.stem for path in FOLDER.iterdir()} == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_help_works_without_torch(name):
    result = run_without_packages(*([] if name == "lrq" else [name]), "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.split() == PAGES[name].split()


def test_version_works_without_torch():
    assert run_without_packages("--version").stdout == f"lrq {VERSION}\n"


@pytest.mark.parametrize("words", [["formats"], ["quantize", "model.safetensors"], []], ids=" ".join)
def test_other_commands_end_with_one_sentence_without_torch(words, sentences):
    result = run_without_packages(*words)
    assert result.returncode == 1
    assert result.stdout == ""
    sentences(result.stderr.replace(sys.executable, "PYTHON"))


def test_a_package_that_cannot_be_loaded_is_named(sentences):
    errors = [
        ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"),
        ModuleNotFoundError("No module named 'regex'", name="regex"),
        OSError("libcudart.so: cannot open\nshared object file"),
    ]
    sentences([describe_import(error).replace(sys.executable, "PYTHON") for error in errors])


@pytest.mark.parametrize(
    "words, page",
    [
        (["--help"], "lrq"),
        (["-h"], "lrq"),
        (["--debug", "plan", "--int8", "-h"], "plan"),
        (["quantize", "a", "--help"], "quantize"),
        (["quantize", "a"], None),
        (["nonsense", "--help"], None),
        (["../../version", "--help"], None),
    ],
)
def test_the_page_is_that_of_the_command(words, page):
    text = find_text(words)
    assert text is None if page is None else text.split() == PAGES[page].split()


def test_help_into_a_pipe_without_a_reader_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-I", "-S", ROOT, "quantize", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=120)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == b""


def test_help_into_an_encoding_without_its_characters():
    result = run_without_packages("quantize", "--help", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0
