"""The entry point of ``lrq``: help and version without torch, other commands then end with one sentence."""

import os
import subprocess
import sys
from pathlib import Path

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


def test_help_pages_are_those_of_the_parser(subtests):
    """Written by python tests/help_pages.py."""
    for name, page in PAGES.items():
        with subtests.test(name):
            assert (FOLDER / f"{name}.txt").read_text(encoding="utf-8").split() == page.split()
            assert max(map(len, page.splitlines())) <= 80


def test_every_help_page_has_its_command():
    assert {path.stem for path in FOLDER.iterdir()} == set(PAGES)


def test_help_works_without_torch(subtests):
    for name, page in PAGES.items():
        with subtests.test(name):
            result = run_without_packages(*([] if name == "lrq" else [name]), "--help")
            assert result.returncode == 0
            assert result.stderr == ""
            assert result.stdout.split() == page.split()


def test_version_works_without_torch():
    assert run_without_packages("--version").stdout == f"lrq {VERSION}\n"


def test_other_commands_end_with_one_sentence_without_torch(sentences, subtests):
    for words in (["formats"], ["quantize", "model.safetensors"], []):
        with subtests.test(words=words):
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


PAGE_OF = [
    (["--help"], "lrq"),
    (["-h"], "lrq"),
    (["--debug", "plan", "--int8", "-h"], "plan"),
    (["quantize", "a", "--help"], "quantize"),
    (["quantize", "a"], None),
    (["nonsense", "--help"], None),
    (["../../version", "--help"], None),
]


def test_the_page_is_that_of_the_command(subtests):
    for words, page in PAGE_OF:
        with subtests.test(words=words):
            text = find_text(words)
            assert (text and text.split()) == (page and PAGES[page].split())


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
