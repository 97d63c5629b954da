"""Deprecated: ``DecodedSource`` is in :mod:`..quant_core.convert.dequantize`."""

from .deprecated import moved_names

__getattr__ = moved_names(__name__, {"DecodedSource": f"{__package__}.convert.dequantize"})
