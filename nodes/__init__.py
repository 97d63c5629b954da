"""ComfyUI nodes, one module each.

* ``host``: the only package that imports ComfyUI's internals.
* ``runtime``: layouts and layers that run in ComfyUI's models.
* ``ui``: schemas, progress messages, drawings.
"""

from comfy_api.latest import ComfyExtension

from . import host
from .calibrate import Calibrate
from .calibrate_text import CalibrateTextEncoder
from .compare import Compare
from .compare_text import CompareTextEncoders
from .configure import ConfigureQuantization
from .inspect_file import Inspect
from .load import LoadModel
from .load_calibration import LoadCalibration
from .load_quantized import LoadQuantized
from .options import RoundingOptions
from .quantize import LearnedRoundQuantize
from .report import QuantizationReport
from .save import SaveQuantized
from .save_calibration import SaveCalibration
from .ui.preview import add_preview_route
from .ui.progress import add_progress_route

__all__ = ["LearnedRoundingExtension"]


class LearnedRoundingExtension(ComfyExtension):
    """The nodes of this pack, for ComfyUI."""

    async def get_node_list(self):
        """Register formats, settings and routes with ComfyUI, and return the node classes."""
        # Not in on_load, which ComfyUI 0.3.75 does not call.
        host.add_layouts()
        host.add_native_int8_setting()
        host.follow_free_requests()
        host.report_wrong_inputs()
        add_progress_route()
        add_preview_route()
        return [
            LoadModel,
            ConfigureQuantization,
            RoundingOptions,
            LearnedRoundQuantize,
            SaveQuantized,
            Calibrate,
            CalibrateTextEncoder,
            Compare,
            CompareTextEncoders,
            QuantizationReport,
            Inspect,
            SaveCalibration,
            LoadCalibration,
            LoadQuantized,
        ]
