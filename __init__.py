"""Learned Rounding: quantized diffusion models made inside ComfyUI.

This folder is both a ComfyUI custom node pack and the Python package
``learned_rounding``. ComfyUI knocks here; everything else lives in the folders:
``quant_core`` (the library), ``nodes`` (thin ComfyUI nodes), ``web`` (the widget).
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI; nodes are imported here so that the library needs no ComfyUI."""
    from .nodes import LearnedRoundingExtension

    return LearnedRoundingExtension()
