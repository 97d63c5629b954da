"""Where tensors come from: safetensors files and shards, pickles of weights, GGUF files, state dicts."""

from .opening import ShardedFiles, open_safetensors, open_source
from .safetensors import SafetensorsFile
from .source import SampledSource, Source, TensorInfo, TensorSource

__all__ = [
    "SafetensorsFile",
    "SampledSource",
    "ShardedFiles",
    "Source",
    "TensorInfo",
    "TensorSource",
    "open_safetensors",
    "open_source",
]
