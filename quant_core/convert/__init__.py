"""Quantized files read and written anew: relabelled (migrate) or decoded (dequantize)."""
