"""The one place that touches ComfyUI's internals.

* ``folders``: which model files there are, where a file of ours goes, and under which name.
* ``sources``: models as tensor sources: files, and the weights of a MODEL or CLIP with their patches baked in.
* ``opening``: a model file as ComfyUI will see it: decoded where that is asked for, under ComfyUI's names.
* ``quantizing``: from a source to quantized files in the temporary folder.
* ``calibrating``: run a model in full precision and collect statistics of its input activations.
* ``calibrations``: calibrations passed between nodes, and calibration files.
* ``comparing``: run two models on the same inputs and compare their outputs.
* ``images``: decode sampled latents to images.
* ``building``: from quantized files back to a MODEL or CLIP, by ComfyUI's own loaders wherever they know the format.
* ``layouts``: ComfyUI's own loaders read the formats of this pack.
* ``native_int8``: ComfyUI's own INT8 layers on this pack's kernels, where that is asked for.
* ``saving``: quantized files to where ComfyUI's loaders look.
* ``verifying``: a saved file, reloaded and compared with what was written.
* ``running``: the prompt that runs: outputs in use, progress, messages to pages, interrupts.
"""

from .building import build_clip, build_model, knows, load_quantized, quantized_layers
from .calibrating import KEEP, calibrate_clip, calibrate_model, samplers, schedulers
from .calibrations import Calibrated, calibration_files, calibration_state, load_calibration, save_calibration
from .comparing import compare_clips, compare_models
from .folders import FileSource, clip_types, file_state, model_files, safetensors_files, without_folders
from .images import decode_images
from .layouts import add_layouts
from .native_int8 import add_native_int8_setting, with_native_int8
from .opening import opened
from .quantizing import Quantized, quantize
from .running import (
    add_route,
    is_interrupt,
    latest_outputs,
    outputs_in_use,
    outputs_in_use_of_running_prompt,
    progress_bar,
    running_prompt,
    send,
)
from .saving import SAVE_FOLDERS, check_name, save
from .verifying import verify_saved

__all__ = [
    "add_layouts",
    "add_native_int8_setting",
    "add_route",
    "build_clip",
    "build_model",
    "calibrate_clip",
    "calibrate_model",
    "Calibrated",
    "calibration_files",
    "calibration_state",
    "check_name",
    "clip_types",
    "compare_clips",
    "compare_models",
    "decode_images",
    "file_state",
    "FileSource",
    "is_interrupt",
    "KEEP",
    "knows",
    "latest_outputs",
    "load_calibration",
    "load_quantized",
    "model_files",
    "opened",
    "outputs_in_use",
    "outputs_in_use_of_running_prompt",
    "progress_bar",
    "quantize",
    "Quantized",
    "quantized_layers",
    "running_prompt",
    "safetensors_files",
    "samplers",
    "save",
    "save_calibration",
    "SAVE_FOLDERS",
    "schedulers",
    "send",
    "verify_saved",
    "with_native_int8",
    "without_folders",
]
