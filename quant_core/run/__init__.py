"""One run from a source to a quantized file: the loop, resume, bit allocation, estimates, the report."""

from .quantize import QuantizedTensors, quantize_file, quantize_tensors
from .report import Report

__all__ = ["QuantizedTensors", "Report", "quantize_file", "quantize_tensors"]
