"""Deprecated: ``open_source`` is in :mod:`..quant_core.sources`."""

from .deprecated import moved_names

__getattr__ = moved_names(__name__, {"open_source": f"{__package__}.sources"})
