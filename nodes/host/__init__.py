"""The only package that imports ComfyUI's internals.

* ``folders``: model files in ComfyUI's folders, and folders and names for files of this pack.
* ``sources``: models as tensor sources: files, and the weights of a MODEL or CLIP with their patches applied.
* ``opening``: open a model file under ComfyUI's tensor names, dequantized on request.
* ``devices``: cards of a run.
* ``quantizing``: quantize a source into files in the temp folder.
* ``previewing``: preview of a run over a model file, for the page.
* ``reusing``: saved files as the result of a run of the same inputs.
* ``releasing``: release memory and temporary files on request of the user.
* ``calibrating``: run a model in full precision and collect statistics of its input activations.
* ``recording``: record calls of a running model, for :class:`~.quant_core.calibration.ReplaySet`.
* ``calibrations``: calibrations passed between nodes, and calibration files.
* ``comparing``: run two models on the same inputs and compare their outputs.
* ``images``: decode sampled latents to images.
* ``decoding``: formats that this ComfyUI cannot run, and layers of this pack that dequantize them.
* ``expanding``: layers that this ComfyUI's comfy-kitchen is too old for, as INT8 layers of the same values.
* ``loading``: load quantized files as a MODEL or CLIP.
* ``building``: build a MODEL or CLIP from the files of a finished run.
* ``layouts``: register this pack's formats with ComfyUI's loaders.
* ``native_layers``: ComfyUI's native INT8 and W4A8 layers on this pack's kernels; ``native_int8``: off, on or auto.
* ``saving``: save quantized files in folders that ComfyUI's loaders search; ``naming``: name of the source model.
* ``verifying``: reload saved files and compare them with what was quantized; ``loaded_layers``: the comparisons.
* ``validating``: one error for the one wrong input of a node.
* ``running``: the running prompt: outputs in use, progress, messages to pages, interrupts.
"""

from .building import build_clip, build_model
from .calibrating import KEEP, calibrate_clip, calibrate_model, samplers, schedulers
from .calibrations import Calibrated, calibration_files, calibration_state, load_calibration, save_calibration
from .comparing import ModelComparison, compare_clips, compare_models
from .decoding import describe_formats, supports_format
from .devices import DEVICE_CHOICES
from .folders import FileSource, choice_stamp, clip_types, model_files, safetensors_files, shorten_paths
from .images import decode_images
from .layouts import add_layouts
from .loading import load_quantized, quantized_layers
from .naming import MODEL_NAME, insert_model_name
from .native_int8 import add_native_int8_setting, native_int8_mode
from .native_layers import NATIVE_INT8_MODES
from .opening import open_file
from .previewing import describe_device, find_stock_support, preview_file
from .quantizing import Quantized, quantize
from .releasing import follow_free_requests
from .reusing import remember_saved
from .running import (
    add_route,
    add_value_route,
    is_interrupt,
    latest_outputs,
    outputs_in_use,
    outputs_in_use_of_running_prompt,
    progress_bar,
    renders_markdown,
    running_prompt,
    send_message,
    show_text,
)
from .saving import SAVE_FOLDERS, check_name, save_card, save_files
from .validating import report_wrong_inputs
from .verifying import verify_saved

__all__ = [
    "DEVICE_CHOICES",
    "KEEP",
    "MODEL_NAME",
    "NATIVE_INT8_MODES",
    "SAVE_FOLDERS",
    "Calibrated",
    "FileSource",
    "ModelComparison",
    "Quantized",
    "add_layouts",
    "add_native_int8_setting",
    "add_route",
    "add_value_route",
    "build_clip",
    "build_model",
    "calibrate_clip",
    "calibrate_model",
    "calibration_files",
    "calibration_state",
    "check_name",
    "choice_stamp",
    "clip_types",
    "compare_clips",
    "compare_models",
    "decode_images",
    "describe_device",
    "describe_formats",
    "find_stock_support",
    "follow_free_requests",
    "insert_model_name",
    "is_interrupt",
    "latest_outputs",
    "load_calibration",
    "load_quantized",
    "model_files",
    "native_int8_mode",
    "open_file",
    "outputs_in_use",
    "outputs_in_use_of_running_prompt",
    "preview_file",
    "progress_bar",
    "quantize",
    "quantized_layers",
    "remember_saved",
    "renders_markdown",
    "report_wrong_inputs",
    "running_prompt",
    "safetensors_files",
    "samplers",
    "save_calibration",
    "save_card",
    "save_files",
    "schedulers",
    "send_message",
    "shorten_paths",
    "show_text",
    "supports_format",
    "verify_saved",
]
