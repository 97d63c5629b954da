"""One run from a source to a quantized file: the loop, resuming, bit allocation, the report."""
