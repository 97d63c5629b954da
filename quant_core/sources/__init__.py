"""Sources of tensors: safetensors files and shards, PyTorch pickles, GGUF files, state dicts."""

from .opening import model_paths, open_safetensors, open_source
from .safetensors import SafetensorsFile
from .shards import ShardedFiles
from .source import SampledSource, Source, TensorInfo
from .state_dict import TensorSource

__all__ = [
    "SafetensorsFile",
    "SampledSource",
    "ShardedFiles",
    "Source",
    "TensorInfo",
    "TensorSource",
    "model_paths",
    "open_safetensors",
    "open_source",
]
