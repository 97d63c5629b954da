"""Images of the shipped tiny model match their prompts."""

from safetensors.torch import load_file

from learned_rounding.benchmarks.tiny_model.evaluate import nearest, start_noise
from learned_rounding.benchmarks.tiny_model.model import MMDiT, sample
from learned_rounding.benchmarks.tiny_model.place import ASSETS, prompt_names, read_conditioning

MODEL = "tiny_mmdit_emoji.safetensors"


def test_latents_are_nearest_to_those_of_the_prompt():
    model = MMDiT()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(ASSETS / MODEL).items()})
    conditioning = read_conditioning()
    prompts = ["red apple", "owl", "rocket", "guitar", "flag: Japan", "lady beetle"]
    expected = [prompt_names().index(name) for name in prompts]
    text = read_conditioning(prompts)
    latents = sample(model.eval(), start_noise(len(prompts), "cpu"), text["context"], text["pooled"])
    references = (conditioning["latents"] - 0.0609) * 1.5305  # ComfyUI's SD3 latents → input of the model
    assert nearest(latents.flatten(1), references.flatten(1)).tolist() == expected
