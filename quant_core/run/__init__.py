"""One run from a source to a quantized file: the loop, resume, bit allocation, estimates, the report."""
