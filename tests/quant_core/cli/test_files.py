"""Files that options name: anything but a regular file is refused at once, without opening it."""

import os
import socket

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core.cli import commands
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.tests.system import FULL_DEVICE

pytestmark = pytest.mark.posix(reason="pipes, sockets and devices have names")

QUANTIZE = ("quantize", "-i", "model.safetensors", "-o", "out.safetensors", "--int8")
# Command line up to the name of the file.
OPTIONS = {
    "quantize -i": ("quantize", "-i"),
    "plan -i": ("plan", "-i"),
    "migrate -i": ("migrate", "-i"),
    "inspect": ("inspect",),
    "verify": ("verify",),
    "-o": ("quantize", "-i", "model.safetensors", "-o"),
    "migrate -o": ("migrate", "-i", "model.safetensors", "-o"),
    **{option: (*QUANTIZE, option) for option in ("--calibration", "--recipe", "--layer-config", "--report")},
    "migrate --calibration": ("migrate", "-i", "model.safetensors", "--calibration"),
    "plan --recipe": ("plan", "-i", "model.safetensors", "--recipe"),
    "batch": ("batch",),
}
FOLDERS = (
    "quantize -i",
    "plan -i",
    "migrate -i",
    "inspect",
    "verify",
    "-o",
)  # may be a folder, with the files of a model in it, or for outputs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model, a pipe, a socket, a folder, and links to them, as the current one."""
    monkeypatch.chdir(tmp_path)
    save_file({"blocks.0.a.weight": torch.zeros(64, 64)}, "model.safetensors")
    os.mkfifo("pipe")
    os.mkdir("folder")
    os.symlink("pipe", "link to a pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        yield tmp_path


def test_what_is_not_a_regular_file_is_refused_before_any_work(folder, capsys, monkeypatch, sentences, subtests):
    def work(*_):
        raise AssertionError("work has begun")

    commands_of_today, before = dict(commands._COMMANDS), sorted(os.listdir())
    for name in ("pipe", "socket", "folder", "link to a pipe", "/dev/zero", str(FULL_DEVICE)):
        for option, words in OPTIONS.items():
            with subtests.test(option, name=name), monkeypatch.context() as patch:
                if name == str(FULL_DEVICE) and not FULL_DEVICE.exists():
                    pytest.skip("only Linux has /dev/full")
                if name != "folder" or option not in FOLDERS:
                    patch.setattr(commands, "_COMMANDS", dict.fromkeys(commands_of_today, work))
                assert main([*words, name]) == 1
                output, error = capsys.readouterr()
                assert output == ""
                assert error.count("\n") == 1
                assert sorted(os.listdir()) == before
                sentences(error)


def test_regular_files_and_missing_outputs_are_accepted(folder, capsys):
    (folder / "recipe.toml").write_text('format = "int8_tensorwise"\nrounding = "nearest"\n')
    os.symlink("recipe.toml", "link.toml")
    assert main([*QUANTIZE, "--preset", "none", "--recipe", "link.toml", "--report", "report.json"]) == 0
    assert (folder / "report.json").is_file()
    assert (folder / "out.safetensors").is_file()


def test_large_text_files_are_refused_without_reading_them(folder, capsys, sentences, subtests):
    for option in ["--recipe", "--layer-config"]:
        with subtests.test(option):
            with open("large", "wb") as file:
                file.truncate(1 << 40)
            assert main([*QUANTIZE, option, "large"]) == 1
            sentences(capsys.readouterr().err)


def test_output_names_of_up_to_255_bytes(folder, capsys, subtests):
    for size in [236, 237, 238, 250, 255]:
        with subtests.test(size=size):
            name = "n" * (size - len(".safetensors")) + ".safetensors"
            assert main(["quantize", "-i", "model.safetensors", "-o", name, "--int8", "--preset", "none"]) == 0
            assert (folder / name).is_file()
            assert not list(folder.glob(".*"))
