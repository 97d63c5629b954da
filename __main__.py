"""Command ``lrq`` without installation: ``python PATH/TO/THIS/FOLDER quantize ...``."""

import importlib.util
import sys
from pathlib import Path


def _load_package(folder: Path, name: str = "learned_rounding"):
    """Import this folder as package ``name``, independent of the folder's own name."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


here = Path(__file__).resolve().parent
# Python puts a folder that it runs first on the path, where our `nodes` would shadow ComfyUI's module of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
_load_package(here)

from learned_rounding.command_line import run  # noqa: E402

run()
