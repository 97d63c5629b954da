"""Node Save Calibration: save a calibration in the output folder, for fine-tunes and for the command line."""

from comfy_api.latest import io, ui

from . import host
from .ui.schema import CalibrationType, check_inputs, schema, widget

__all__ = ["SaveCalibration"]


class SaveCalibration(io.ComfyNode):
    """Node; its schema describes it."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingSaveCalibration",
            display_name="Save Calibration",
            description="Keep a calibration as a file in output/calibrations. It serves every fine-tune of the same architecture. Nothing is ever overwritten.",
            inputs=[
                CalibrationType.Input("calibration", tooltip="From Calibrate or Calibrate Text Encoder."),
                widget(
                    io.String,
                    id="filename_prefix",
                    default="calibration",
                    tooltip="Start of the file name; may contain folders. A number is added.",
                ),
                widget(
                    io.Boolean,
                    id="save_calls",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Also save the recorded calls of the model (replay_calls of Calibrate) in a file beside it (.calls.safetensors), "
                    "for sequential rounding after a restart of the server.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="The file; lrq quantize --calibration takes it too.")
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        return check_inputs(host.check_name, filename_prefix)

    @classmethod
    def execute(cls, calibration, filename_prefix, save_calls=False) -> io.NodeOutput:
        path = str(host.save_calibration(calibration, filename_prefix, save_calls=save_calls))
        return io.NodeOutput(path, ui=ui.PreviewText(path))
