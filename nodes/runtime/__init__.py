"""Layouts and layers that hold quantized weights while a model runs in ComfyUI."""
