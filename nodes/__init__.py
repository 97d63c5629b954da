"""Thin ComfyUI nodes, one file each. ``host.py`` alone touches ComfyUI's internals."""

from comfy_api.latest import ComfyExtension

from .configure import ConfigureQuantization
from .load import LoadModel
from .options import RoundingOptions
from .quantize import LearnedRoundQuantize
from .save import SaveQuantized

__all__ = ["LearnedRoundingExtension"]


class LearnedRoundingExtension(ComfyExtension):
    """What ComfyUI loads."""

    async def get_node_list(self):
        return [LoadModel, ConfigureQuantization, RoundingOptions, LearnedRoundQuantize, SaveQuantized]
