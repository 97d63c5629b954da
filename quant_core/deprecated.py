"""Names of version 0.1.0 that still work and warn. This module and its uses are removed in version 0.3.0."""

import functools
import importlib
import operator
import warnings
from collections.abc import Callable, Mapping

__all__ = ["moved_names", "renamed_attribute", "renamed_keywords"]


def renamed_attribute(old: str, new: str) -> property:
    """A property that returns the attribute ``new`` (perhaps dotted) under its old name, with a DeprecationWarning."""
    get = operator.attrgetter(new)

    def read(instance):
        warnings.warn(f"{type(instance).__name__}.{old} is now {new}", DeprecationWarning, stacklevel=2)
        return get(instance)

    return property(read, doc=f"Deprecated: :attr:`{new}`.")


def renamed_keywords(**names: str) -> Callable[[Callable], Callable]:
    """A decorator for a function whose keywords ``old="new"`` were renamed."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **options):
            for old, new in names.items():
                if old in options:
                    warnings.warn(f"{function.__name__}: {old} is now {new}", DeprecationWarning, stacklevel=2)
                    options[new] = options.pop(old)
            return function(*args, **options)

        return call

    return decorate


def moved_names(module: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """The ``__getattr__`` of a module whose ``names`` (name → module that has it now) have moved."""

    def get(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {names[name]}.{name}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(names[name]), name)

    return get
