"""The command line in this process."""

import pytest

from learned_rounding.quant_core.cli.commands import main

from .reading import error_lines


@pytest.fixture
def lrq(strict_lrq):
    """As strict_lrq, with --general where it is an option: no preset recognizes the made-up models of these tests."""

    def run(command: str = "", *words) -> tuple[int, str, list[str]]:
        general = ("--general",) if command in ("quantize", "plan") else ()
        return strict_lrq(*filter(None, (command,)), *words, *general)

    return run


@pytest.fixture
def strict_lrq(capsys, tmp_path, monkeypatch):
    """strict_lrq(*words) → (exit code, stdout, lines on stderr without the progress bar), in the folder of the test."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> tuple[int, str, list[str]]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        except KeyboardInterrupt:
            pytest.fail("an interrupt came through")
        captured = capsys.readouterr()
        return code, captured.out, error_lines(captured.err)

    return run
