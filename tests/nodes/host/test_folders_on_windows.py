"""Names of saved files, and files that are still mapped, on Windows."""

from pathlib import Path

import pytest

from learned_rounding.quant_core import file_system
from learned_rounding.quant_core.errors import OutputError, VerificationError
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.host import verifying
    from learned_rounding.nodes.host.folders import resolve_prefix
    from learned_rounding.tests.nodes.host.saved_files import file_names, output, quantize_tiny

pytestmark = pytest.mark.usefixtures("in_comfyui")


@pytest.mark.parametrize("prefix", ["nul", "folder/a:b", "con/a"])
def test_prefix_that_windows_cannot_store_is_refused(monkeypatch, sentences, prefix):
    monkeypatch.setattr(file_system, "WINDOWS", True)
    with sentences.raises(OutputError):
        resolve_prefix(output(), prefix)


def test_prefix_that_ends_with_a_period_is_accepted(monkeypatch):
    """The name of the file goes on."""
    monkeypatch.setattr(file_system, "WINDOWS", True)
    assert resolve_prefix(output(), "a.")[1] == "a."


def test_failed_file_that_is_still_mapped_keeps_its_name(monkeypatch, sentences):
    def refuse(*_):
        raise PermissionError

    made = quantize_tiny()
    paths = pack.save_files(made, "verified", "output")
    paths[0].write_bytes(b"damaged")
    monkeypatch.setattr(Path, "rename", refuse)
    with sentences.raises(VerificationError):
        verifying.verify_saved(made, paths)
    assert file_names(output()) == [paths[0].name]
