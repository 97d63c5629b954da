"""Main file of a worker process, run by its path: ``python start.py PACKAGE ROOT PATH ARGUMENTS…``.

It imports the package under the name that it has in the process that starts it, which for a custom node need not be importable, so
that pickled classes are found. The ``__init__`` of the package needs ComfyUI and is left out.
"""

import importlib
import json
import sys
import types

__all__ = ["start"]


def start(name: str, root: str, path: str, *arguments: str) -> None:
    """Import the package as ``name`` from the folder ``root``, with the JSON of ``sys.path``, and run tasks."""
    sys.path[:] = json.loads(path)
    package = types.ModuleType(name)
    package.__path__ = [root]
    sys.modules[name] = package
    importlib.import_module(f"{name}.quant_core.workers.process").serve(*arguments)


if __name__ == "__main__":
    start(*sys.argv[1:])
