"""Node Load Calibration: load a calibration file."""

from comfy_api.latest import io, ui

from . import host
from .ui.schema import CalibrationType, check_inputs, schema, widget

__all__ = ["LoadCalibration"]


class LoadCalibration(io.ComfyNode):
    """Node; its schema describes it."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingLoadCalibration",
            display_name="Load Calibration",
            description="Choose a saved calibration. It fits every model whose layers have the same names and shapes.",
            inputs=[
                widget(
                    io.Combo,
                    id="file",
                    options=host.calibration_files(),
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
        return check_inputs(host.load_calibration, file)

    @classmethod
    def fingerprint_inputs(cls, file):
        return (file, *host.calibration_state(file))

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        calibration, text = host.load_calibration(file)
        return io.NodeOutput(calibration, ui=ui.PreviewText(text))
