"""Names of tensors of models that were saved inside a wrapper."""

import torch

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources import TensorSource
from learned_rounding.quant_core.sources.renaming import Assembly
from learned_rounding.quant_core.sources.wrapper_names import assemble_unwrapped

NAMES = ["img_in.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"]


def unwrapped(names) -> dict[str, Assembly] | None:
    return assemble_unwrapped(TensorSource(dict.fromkeys(names, torch.zeros(1)), name="model.safetensors"))


WRAPPERS = {
    "compile": lambda name: f"_orig_mod.{name}",
    "DataParallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "model in memory": lambda name: f"diffusion_model.{name}",
    "DataParallel of a model in memory": lambda name: f"module.diffusion_model.{name}",
    "checkpoint": lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name.replace('blocks.0.', 'blocks.0._fsdp_wrapped_module.')}",
    "compiled block": lambda name: name.replace("attn.", "attn._orig_mod."),
}


def test_names_are_those_without_the_wrapper(subtests):
    for kind, wrap in WRAPPERS.items():
        with subtests.test(kind):
            assert unwrapped(map(wrap, NAMES)) == {name: Assembly((wrap(name),)) for name in NAMES}


def test_names_without_a_wrapper_stay():
    assert unwrapped(NAMES) is None


def test_no_names_stay():
    assert unwrapped([]) is None


def test_a_module_of_that_name_beside_others_stays(subtests):
    for prefix in ["module.", "diffusion_model."]:
        with subtests.test(prefix=prefix):
            assert unwrapped([*NAMES, f"{prefix}weight"]) is None


def test_a_module_whose_name_ends_like_a_wrapper_stays():
    assert unwrapped([*NAMES, "my_orig_mod.weight"]) is None


def test_two_tensors_of_one_name_are_refused(sentences):
    with sentences.raises(SourceError):
        unwrapped([*NAMES, f"_orig_mod.{NAMES[0]}"])
