"""Layouts and layers of quantized weights in models that run in ComfyUI."""
