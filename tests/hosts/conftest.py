import random

import pytest


@pytest.fixture
def image_workflow():
    """image_workflow(color=…) → a workflow of stock nodes that needs no model."""

    def make(color=None, **save):
        """EmptyImage → ImageInvert → SaveImage. A random color by default, because ComfyUI does not execute a cached workflow."""
        color = random.randrange(1, 0xFFFFFF) if color is None else color
        return {
            "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": color}},
            "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
            "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "image", **save}},
        }

    return make
