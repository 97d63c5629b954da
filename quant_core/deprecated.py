"""Names of version 0.1.0 that still work and warn. This module and its uses are removed in version 0.3.0."""

import importlib
import operator
import warnings
from collections.abc import Callable, Mapping

__all__ = ["moved_names", "renamed_attribute"]


def renamed_attribute(old: str, new: str) -> property:
    """A property that returns the attribute ``new`` (perhaps dotted) under its old name, with a DeprecationWarning."""
    get = operator.attrgetter(new)

    def read(instance):
        warnings.warn(f"{type(instance).__name__}.{old} is now {new}", DeprecationWarning, stacklevel=2)
        return get(instance)

    return property(read, doc=f"Deprecated: :attr:`{new}`.")


def moved_names(module: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """The ``__getattr__`` of a module whose ``names`` (name → module that has it now) have moved."""

    def get(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {names[name]}.{name}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(names[name]), name)

    return get
