import random

import pytest


@pytest.fixture
def picture():
    """picture(color=…) → a stock workflow that needs no model."""

    def make(color=None, **save):
        """EmptyImage → ImageInvert → SaveImage. A new colour each time: a known workflow is not run again."""
        color = random.randrange(1, 0xFFFFFF) if color is None else color
        return {
            "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": color}},
            "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
            "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "picture", **save}},
        }

    return make
