"""Quantized files read and written anew: relabelled (migrate) or decoded (dequantize)."""

from .dequantize import DecodedSource
from .migrate import Migration, migrate_file

__all__ = ["DecodedSource", "Migration", "migrate_file"]
