"""Files that Save Quantized leaves on full disks, on other disks, after kills and after interrupts."""

import errno
import gc
import itertools
import os
import random
from pathlib import Path
from unittest.mock import patch

import pytest

from learned_rounding.quant_core import QuantizationError
from learned_rounding.quant_core.output import SafetensorsWriter
from learned_rounding.quant_core.run import layer_task
from learned_rounding.quant_core.sources import SafetensorsFile
from learned_rounding.tests.in_comfyui import IN_COMFYUI, call_in_new_process

if IN_COMFYUI:
    import comfy.model_management

    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.host import folders, loaded_layers, quantizing, verifying
    from learned_rounding.tests.nodes.host.saved_files import file_names, output, quantize_tiny, save_without_links

pytestmark = pytest.mark.usefixtures("in_comfyui")

NAMES = ["verified_float8_e4m3fn.safetensors", "verified_float8_e4m3fn_00001_.safetensors"]


def save(made) -> list[Path]:
    return pack.save_files(made, "verified", "output")


def fill_disk(source, target):
    """Copy a part of a file to a disk that is full then."""
    target.write(source.read(1 << 15))
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_leaves_no_partial_save(tmp_path, tried, sentences):
    """The disk is full at the second of two copies."""
    sources = {part: tmp_path / f"{part}.bin" for part in ("first", "second")}
    for path in sources.values():
        path.write_bytes(os.urandom(1 << 16))
    made = pack.Quantized(sources, "text_encoders", "label", None)
    copies = iter([folders._copy_bytes, fill_disk])

    def copy(source, target):
        next(copies)(source, target)

    def save_both():
        return save_without_links(lambda: pack.save_files(made, "full", "output"))

    with patch.object(folders, "_copy_bytes", copy), sentences.raises(QuantizationError):
        save_both()
    assert file_names(output()) == []
    save_both()
    assert file_names(output()) == ["full_first_label.safetensors", "full_second_label.safetensors"]
    tried("ENOSPC when Save Quantized copies", 1, "none, one sentence, next run works")


@pytest.mark.parametrize("has_links", [True, False], ids=["another disk", "a disk without links"])
def test_saving_on_another_disk_copies_and_never_overwrites(has_links, sentences):
    made, within = quantize_tiny(), output() if has_links else None
    paths = [save_without_links(lambda: save(made), within)[0] for _ in range(2)]
    assert [path.name for path in paths] == NAMES
    for path in paths:
        assert path.read_bytes() == made.files[""].read_bytes()
        assert not path.samefile(made.files[""])
    assert file_names(output()) == NAMES
    sentences(pack.verify_saved(made, paths[:1]))


@pytest.fixture
def temp_on_another_disk():
    """ComfyUI's temp folder is on another disk; the value is the list of the files that could not be renamed into it."""
    temp, rename, refused = folders.temporary_folder(), Path.rename, []

    def refuse(path, target):
        if temp not in Path(target).parents:
            return rename(path, target)
        refused.append(path)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with patch.object(Path, "rename", refuse):
        yield refused


def unfinished() -> list[str]:
    return file_names(folders.temporary_folder().parent / ".learned_rounding")


def test_result_moves_to_a_temp_folder_on_another_disk(temp_on_another_disk):
    expected = quantize_tiny().files[""].read_bytes()
    assert quantize_tiny().files[""].read_bytes() == expected
    assert len(temp_on_another_disk) == 2
    assert unfinished() == []


def test_full_temp_folder_on_another_disk_keeps_nothing(temp_on_another_disk, tried, sentences):
    with patch.object(folders, "_copy_bytes", fill_disk), sentences.raises(QuantizationError):
        quantize_tiny()
    assert unfinished() == []
    assert file_names(folders.temporary_folder()) == []
    tried("ENOSPC when a result moves into ComfyUI's temp folder on another disk", 1, "none, one sentence")


def die(*_) -> None:
    """End the process as kill -9 does."""
    os._exit(0)


def copy_half_and_die(source, target) -> None:
    target.write(source.read(1 << 15))
    target.flush()
    die()


# Point at which a server is killed while it saves → kinds of the files that it leaves, name of the next save.
DEATHS = {
    "copying": (["partial"], NAMES[0]),
    "copied": (["partial"], NAMES[0]),
    "named": (["partial", "whole"], NAMES[1]),
    "named without links": (["whole"], NAMES[1]),
    "verifying": (["whole"], NAMES[1]),
}


def save_and_die(point: str) -> None:
    """Save on a server that is killed at one of the points."""
    rename = folders._rename_new

    def rename_then_die(*args):
        rename(*args)
        die()

    # Object, attribute, replacement, folder with hard links.
    place, name, replacement, within = {
        "copying": (folders, "_copy_bytes", copy_half_and_die, None),
        "copied": (folders, "_rename_new", die, None),
        "named": (folders, "_rename_new", rename_then_die, output()),
        "named without links": (folders, "_rename_new", rename_then_die, None),
        "verifying": (verifying, "reload_file", die, None),
    }[point]
    made = quantize_tiny()
    with patch.object(place, name, replacement):
        save_without_links(lambda: pack.verify_saved(made, save(made)), within)
    raise AssertionError("the process did not end")


@pytest.mark.parametrize("point", DEATHS)
def test_kill_during_saving_leaves_a_complete_file_or_none(tried, point, sentences):
    left, name = DEATHS[point]
    call_in_new_process(save_and_die, point)
    found = file_names(output())
    assert sorted("partial" if file.endswith(".partial") else "whole" for file in found) == left
    for path in output().rglob("verified*"):
        assert pack.verify_saved(quantize_tiny(), [path]).startswith("Verified: ")
    (saved,) = save_without_links(lambda: save(quantize_tiny()), output())
    assert saved.name == name
    assert file_names(output()) == NAMES[: NAMES.index(name) + 1]  # the partial copy is deleted
    sentences(pack.verify_saved(quantize_tiny(), [saved]))
    tried("a server killed while it saves", 1, "whole or none; the next save removes the rest")


SEED, TRIES = 30, 4  # per point
# Functions during which the user interrupts.
INTERRUPTED = {
    "reading": lambda: (SafetensorsFile, "read"),
    "writing": lambda: (SafetensorsWriter, "add"),
    "rounding": lambda: (layer_task, "quantize_layer"),
    "moving": lambda: (quantizing, "move_to_temp"),
    "copying": lambda: (folders, "_copy_bytes"),
    "naming": lambda: (folders, "_rename_new"),
    "reloading": lambda: (verifying, "reload_file"),
    "comparing": lambda: (loaded_layers, "_has_same_bytes"),
    "running": lambda: (loaded_layers, "_compute_dtype"),
}


def quantize_save_and_verify() -> bytes:
    made = quantize_tiny("int8_tensorwise")
    (path,) = save_without_links(lambda: save(made))
    pack.verify_saved(made, [path])
    return path.read_bytes()


def run_interrupted(at: int | None, place, name: str) -> tuple[int, bytes | None]:
    """Number of calls of a function, of which the one with number ``at`` is interrupted, and the file of a completed run."""
    call, calls = getattr(place, name), itertools.count()

    def interrupting(*args, **options):
        if next(calls) == at:
            comfy.model_management.interrupt_current_processing()
        return call(*args, **options)

    with patch.object(place, name, interrupting):
        try:
            made = quantize_save_and_verify()
        except BaseException as error:
            if not pack.is_interrupt(error):
                raise
            made = None
    comfy.model_management.interrupt_current_processing(False)
    return next(calls), made


def delete_saved() -> None:
    for path in output().rglob("verified*"):
        path.unlink()


def test_interrupt_during_run_or_save_leaves_no_files(tmp_path, tried, subtests):
    """At random calls of the functions of a run and a save; the same run is repeated each time."""
    draw, tries, whole = random.Random(SEED), 0, None
    for point, find in INTERRUPTED.items():
        place, name = find()
        count, whole = run_interrupted(None, place, name)
        delete_saved()
        interrupted = 0
        for at in draw.sample(range(count), min(TRIES, count)):
            tries += 1
            with subtests.test(f"{point} {at} of {count}"):
                _, made = run_interrupted(at, place, name)
                interrupted += made is None
                if made is not None:  # the interrupt came too late
                    assert made == whole
                    delete_saved()
                quantizing._last = None
                gc.collect()
                for folder in ("output", ".learned_rounding", "temp"):
                    assert file_names(tmp_path / folder) == []
        with subtests.test(point):
            assert interrupted > 0
    assert quantize_save_and_verify() == whole
    tried(
        "ComfyUI's interrupt at a random call of reading, rounding, writing, saving or verifying",
        tries,
        "whole or none",
    )
