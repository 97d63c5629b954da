"""Checks of in_process.py: files left when saving fails, on other disks, after kills and after interrupts."""

import errno
import functools
import gc
import itertools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import folder_paths
from pack.nodes import host
from pack.quant_core import QuantizationError
from pack.quant_core.output import SafetensorsWriter
from pack.quant_core.run import loop
from pack.quant_core.sources import SafetensorsFile
from saving_checks import files, output, quantized, replaced, verified, without_links


def full_disk() -> dict:
    """The disk is full at the second of two copies."""
    sources = {part: Path(folder_paths.base_path) / f"{part}.bin" for part in ("first", "second")}
    for path in sources.values():
        path.write_bytes(os.urandom(1 << 16))
    made = host.Quantized(sources, "text_encoders", "label", None)
    copy, copied = host.folders._copy_bytes, []

    def full(source, target):
        copied.append(target.write(source.read(1 << 15)))
        if len(copied) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copy(source, target)

    with replaced(host.folders, "_copy_bytes", full):
        try:
            without_links(lambda: host.save_files(made, "full", "output"))
        except QuantizationError as error:
            said = str(error)
    left = files(output())
    without_links(lambda: host.save_files(made, "full", "output"))
    return {"said": said, "left": left, "afterwards": files(output())}


def other_disks() -> dict:
    """Folders on other disks: the result is moved and saved by copies, and no file is overwritten."""
    temp, made, found = host.folders.temporary_folder(), quantized(), {}
    whole = made.files[""].read_bytes()
    for name, within in {"another disk": output(), "a disk without links": None}.items():
        paths = [
            without_links(lambda within=within: host.save_files(made, "verified", "output"), within)[0]
            for _ in range(2)
        ]
        found[name] = {
            "names": [path.name for path in paths],
            "same": all(path.read_bytes() == whole for path in paths),
            "copies": all(not path.samefile(made.files[""]) for path in paths),
            "files": files(output()),
            "verified": verified(made, paths[:1])[0],
        }
    rename, moves = Path.rename, []

    def no_rename(path, target):
        if temp not in Path(target).parents:
            return rename(path, target)
        moves.append(path)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with replaced(Path, "rename", no_rename):
        found["temp"] = {
            "same": quantized().files[""].read_bytes() == whole,
            "moves": len(moves),
            "left": files(temp.parent / ".learned_rounding"),
        }
        host.quantizing._last = None
        before = files(temp)

        def full(source, target):
            target.write(source.read(1 << 15))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with replaced(host.folders, "_copy_bytes", full):
            try:
                quantized()
            except QuantizationError as error:
                found["full temp"] = {
                    "said": str(error),
                    "left": files(temp.parent / ".learned_rounding") + sorted({*files(temp)} - {*before}),
                }
    return found


def die(*_) -> None:
    """End the process as kill -9 does, after reporting to the test."""
    print("RESULT" + json.dumps(files(output())), flush=True)
    os._exit(0)


def half(source, target) -> None:
    target.write(source.read(1 << 15))
    target.flush()
    die()


def then_die(call: Callable) -> Callable:
    return lambda *args: (call(*args), die())


# Point at which a server is killed while it saves → (object, attribute, replacement, folder with hard links).
DEATHS = {
    "copying": lambda: (host.folders, "_copy_bytes", half, None),
    "copied": lambda: (host.folders, "_rename_new", die, None),
    "named": lambda: (host.folders, "_rename_new", then_die(host.folders._rename_new), output()),
    "named without links": lambda: (host.folders, "_rename_new", then_die(host.folders._rename_new), None),
    "verifying": lambda: (host.verifying, "reload_file", die, None),
}


def dying(point: str) -> None:
    """Save on a server that is killed at one of the points."""
    place, name, value, within = DEATHS[point]()
    made = quantized()
    with replaced(place, name, value):
        without_links(lambda: host.verify_saved(made, host.save_files(made, "verified", "output")), within)


def after_death() -> dict:
    """Save the same file under the same name on the next server."""
    found = files(output())
    whole = [
        path for path in output().rglob("verified*") if host.verify_saved(quantized(), [path]).startswith("Verified: ")
    ]
    paths = without_links(lambda: host.save_files(quantized(), "verified", "output"), output())
    return {
        "found": found,
        "whole": len(whole),
        "saved": paths[0].name,
        "files": files(output()),
        "verified": verified(quantized(), paths)[0],
    }


SEED = 30


TRIES = 4  # per point


# Functions during which the user interrupts.
POINTS = {
    "reading": (SafetensorsFile, "read"),
    "writing": (SafetensorsWriter, "add"),
    "rounding": (loop, "quantize_layer"),
    "moving": (host.quantizing, "move_to_temp"),
    "copying": (host.folders, "_copy_bytes"),
    "naming": (host.folders, "_rename_new"),
    "reloading": (host.verifying, "reload_file"),
    "comparing": (host.loaded_layers, "_has_same_bytes"),
    "running": (host.loaded_layers, "_compute_dtype"),
}


def interrupts() -> dict:
    """Interrupts at random calls of the functions of a run and a save; the same run is repeated each time."""
    draw, found, base = random.Random(SEED), {}, Path(folder_paths.base_path)

    def run() -> bytes:
        made = quantized("int8_tensorwise")
        (path,) = without_links(lambda: host.save_files(made, "verified", "output"))
        host.verify_saved(made, [path])
        return path.read_bytes()

    def clear() -> None:
        for path in output().rglob("verified*"):
            path.unlink()

    def left() -> list[str]:
        host.quantizing._last = None
        gc.collect()
        return [name for folder in ("output", ".learned_rounding", "temp") for name in files(base / folder)]

    def tried(at: int | None, place, name: str) -> tuple[int, bytes | None]:
        """(number of calls, content of the file if the run was completed)."""
        call, calls = getattr(place, name), itertools.count()

        def interrupting(*args, **options):
            if next(calls) == at:
                comfy.model_management.interrupt_current_processing()
            return call(*args, **options)

        with replaced(place, name, interrupting):
            try:
                made = run()
            except BaseException as error:
                if not host.is_interrupt(error):
                    raise
                made = None
        comfy.model_management.interrupt_current_processing(False)
        return next(calls), made

    for point, (place, name) in POINTS.items():
        calls, whole = tried(None, place, name)
        clear()
        found[point] = []
        for at in draw.sample(range(calls), min(TRIES, calls)):
            _, made = tried(at, place, name)
            if made is not None:  # the interrupt came too late
                clear()
            found[point].append(
                {"at": at, "of": calls, "interrupted": made is None, "same": made == whole, "left": left()}
            )
    found["afterwards"] = run() == whole
    return found


CHECKS = {f"failing_{check.__name__}": check for check in (full_disk, other_disks, after_death, interrupts)}
CHECKS |= {f"failing_dies_{point}": functools.partial(dying, point) for point in DEATHS}
