"""Learned Rounding: quantize diffusion models in ComfyUI.

This folder is both a ComfyUI custom node pack and the Python package ``learned_rounding``. ComfyUI imports this module as
its entry point. The code is in ``quant_core`` (library), ``kernels`` (linear layers and rounding), ``nodes`` (ComfyUI nodes)
and ``web`` (widgets of the page).
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's entry point. It imports the nodes, so that the library can be imported without ComfyUI."""
    from .nodes import LearnedRoundingExtension

    return LearnedRoundingExtension()
