"""Node Load Calibration: load a calibration file."""

from comfy_api.latest import io, ui

from . import host
from .ui.file_inputs import check_file, file_input
from .ui.schema import CalibrationType, schema

__all__ = ["LoadCalibration"]

_ADVICE = "run Calibrate with Save Calibration, or copy a .calib.safetensors file into models/calibrations"


class LoadCalibration(io.ComfyNode):
    """Node; its schema describes it."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingLoadCalibration",
            display_name="Load Calibration",
            description="Choose a saved calibration. It fits every model whose layers have the same names and shapes.",
            inputs=[
                file_input(
                    "file",
                    host.calibration_files(),
                    tooltip="From output/calibrations and models/calibrations (.calib.safetensors), with the calls of the model that were saved beside it.",
                ),
            ],
            outputs=[
                CalibrationType.Output(
                    display_name="calibration", tooltip="For Learned Round Quantize, or to continue it."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        return check_file(host.load_calibration, file, _ADVICE)

    @classmethod
    def fingerprint_inputs(cls, file):
        return (file, *host.calibration_state(file))

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        calibration, text = host.load_calibration(file)
        return io.NodeOutput(calibration, ui=ui.PreviewText(text))
