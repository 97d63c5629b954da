"""Model files of all file formats under ComfyUI's tensor names."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.errors import QuantizationError, SourceError
from learned_rounding.quant_core.recipes.refused import find_refusal
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo
from learned_rounding.quant_core.sources.diffusers_names import assemble_diffusers
from learned_rounding.quant_core.sources.renaming import RenamedSource
from learned_rounding.tests.architectures import read
from learned_rounding.tests.architectures.table import CONVERTED, RENAMED
from learned_rounding.tests.in_comfyui import IN_COMFYUI
from learned_rounding.tests.quant_core.sources.diffusers_lists import DIFFUSERS_LISTS, read_diffusers

if IN_COMFYUI:
    import comfy.sd
    import comfy.utils
    from comfy import model_detection

    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.configure import ConfigureQuantization
    from learned_rounding.nodes.load import LoadModel
    from learned_rounding.tests.architectures.collect import DIFFUSION
    from learned_rounding.tests.nodes.host.tiny_model import TINY

pytestmark = pytest.mark.usefixtures("in_comfyui")

RECIPE = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest")


@pytest.fixture
def models(tmp_path):
    """ComfyUI's folder of diffusion models."""
    folder = tmp_path / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    return folder


def choose(name: str):
    return pack.FileSource.choose(f"diffusion_models/{name}", pack.clip_types()[0])


def quantize(source):
    return pack.quantize(source, RECIPE, lambda event: None)


def renamed(state: dict[str, torch.Tensor], names: dict) -> dict[str, torch.Tensor]:
    """``state`` under diffusers' names, by the inverse of one of ComfyUI's mappings."""
    found = {}
    for theirs, place in names.items():
        ours, part, change = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
        if ours in state:
            tensor = state[ours] if part is None else state[ours].narrow(*part)
            found[theirs] = (change(tensor) if change else tensor).contiguous()  # a change is its own inverse
    return found


def tiny_of_diffusers() -> dict[str, torch.Tensor]:
    """The tiny model under diffusers' names."""
    state = load_file(TINY)
    blocks = model_detection.count_blocks(state, "joint_blocks.{}.")
    depth = state["x_embedder.proj.weight"].shape[0] // 64
    return renamed(state, comfy.utils.mmdit_to_diffusers({"depth": depth, "num_blocks": blocks}))


def header(name: str, tensors: dict[str, torch.Tensor]) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        metadata={},
        tensors={key: TensorInfo(value.dtype, tuple(value.shape)) for key, value in tensors.items()},
    )


@pytest.fixture
def stored_alike(models):
    """The tiny model in every file format, and under diffusers' names; the names of the files."""
    original, theirs = load_file(TINY), tiny_of_diffusers()
    halves = [dict(list(theirs.items())[half::2]) for half in range(2)]
    shards = [f"tiny-{number:05}-of-00002.safetensors" for number in (1, 2)]
    places = {}
    for file, half in zip(shards, halves, strict=True):
        save_file(half, models / file)
        places |= dict.fromkeys(half, file)
    (models / "tiny.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file(theirs, models / "diffusers.safetensors")
    save_file(original, models / "comfyui.safetensors")
    torch.save(original, models / "pickle.pt")
    save_file(original, models / "safetensors.gguf")  # read by content
    for number in (1, 2):  # without an index
        torch.save(dict(list(original.items())[number - 1 :: 2]), models / f"parts-{number:05}-of-00002.bin")
    for number in (0, 1):  # numbered from 0
        save_file(dict(list(original.items())[number::2]), models / f"zero_{number}_of_2.sft")
    return [
        "comfyui.safetensors",
        "diffusers.safetensors",
        "parts-00001-of-00002.bin",
        "pickle.pt",
        "safetensors.gguf",
        "tiny.safetensors.index.json",
        "zero_0_of_2.sft",
    ]


def test_all_file_formats_and_names_give_the_same_model(stored_alike, sentences, subtests):
    original, told = load_file(TINY), set()
    expected = load_file(quantize(choose("comfyui.safetensors")).files[""])
    for name in stored_alike:
        source = choose(name)
        with subtests.test(f"{name}: weights"), pack.open_file(source) as weights:
            assert weights.tensors.keys() == original.keys()
            assert [key for key, tensor in original.items() if not torch.equal(weights.read(key), tensor)] == []
            assert source.path in weights.paths  # the state of these paths decides whether a run can be resumed
        with subtests.test(f"{name}: quantized"):
            quantized = quantize(source)
            made = load_file(quantized.files[""])
            assert made.keys() == expected.keys()
            assert [key for key, tensor in expected.items() if not torch.equal(made[key], tensor)] == []
        with subtests.test(f"{name}: shown by Load Model"):
            shown = LoadModel.execute(f"diffusion_models/{name}").ui.value.splitlines()[-1]
            told.add(shown)
            assert quantized.report.recognised == shown
            assert dict(quantized.report._rows())["model"] == shown
    assert len(told) == 1
    sentences(*told)


def test_files_are_listed_once(stored_alike):
    assert sorted(pack.model_files()) == [f"diffusion_models/{name}" for name in stored_alike]
    assert pack.safetensors_files() == [
        "diffusion_models/comfyui.safetensors",
        "diffusion_models/diffusers.safetensors",
    ]


def test_file_with_a_changed_shard_is_quantized_again(stored_alike, models):
    """Its index does not change."""
    name, shard = "tiny.safetensors.index.json", models / "tiny-00002-of-00002.safetensors"
    before, made = LoadModel.fingerprint_inputs(f"diffusion_models/{name}"), quantize(choose(name))
    assert quantize(choose(name)) is made
    assert made.files[""].exists()
    save_file({key: tensor * 2 for key, tensor in load_file(shard).items()}, shard)
    other = quantize(choose(name))
    assert LoadModel.fingerprint_inputs(f"diffusion_models/{name}") != before
    assert other is not made
    assert made.files[""].read_bytes() != other.files[""].read_bytes()


def test_layer_config_has_comfyuis_names(stored_alike):
    rules = json.dumps({"mlp": "skip", "attn.qkv": {"format": "fp8"}})
    options = {"rounding": "nearest", "layer_config": rules}
    recipe = ConfigureQuantization.execute("int8_tensorwise", "row", "auto", 0, **options).args[0]
    report = pack.quantize(choose("diffusers.safetensors"), recipe, lambda event: None).report
    kept = {layer.name for layer in report.kept if layer.reason == "layer config mlp" and "joint_blocks" in layer.name}
    assert {name.split(".")[-2] for name in kept} == {"fc1", "fc2"}
    formats = {layer.name.split(".")[-2]: layer.format for layer in report.layers if "joint_blocks" in layer.name}
    assert formats.pop("qkv") == "float8_e4m3fn"
    assert set(formats.values()) == {"int8_tensorwise"}


def comes_back(name: str, tensors: dict, to_diffusers) -> bool:
    """Whether a mapping has all tensor names of a model, and the conversion restores all names and shapes."""
    names = to_diffusers(copy.deepcopy(DIFFUSION[name].options))
    known = {place if isinstance(place, str) else place[0] for place in names.values()}
    # ComfyUI 0.3.75 calls the weight of a norm "scale".
    ours = {key if key in known else re.sub(r"_norm\.weight$", "_norm.scale", key): key for key in tensors}
    if not ours.keys() <= known:
        return False
    shapes = {key: torch.empty(tensors[there].shape, device="meta") for key, there in ours.items()}
    theirs = renamed(shapes, names)
    assert [key for key in shapes if key.endswith("qkv.weight") and key in theirs] == []
    assert "diffusers" in find_refusal(theirs)
    assert find_refusal(shapes) is None
    source = header(name, theirs)
    convert = pack.opening._converter(source)
    again = pack.opening.RenamedWeights(source, convert).tensors if convert else {}
    return {key: info.shape for key, info in again.items()} == {
        key: tuple(value.shape) for key, value in shapes.items()
    }


def test_models_that_comfyui_converts_are_renamed(host):
    maps = [getattr(comfy.utils, name) for name in dir(comfy.utils) if name.endswith("_to_diffusers")]
    tensors = {name: read(name) for name in DIFFUSION}
    found = {name for name in DIFFUSION if any(comes_back(name, tensors[name], to_map) for to_map in maps)}
    assert found == RENAMED - ({"zimage"} if host.version == "0.3.75" else set())


def quantize_as_bitsandbytes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with one layer in INT8 as bitsandbytes stores it."""
    layer = next(key.removesuffix(".weight") for key, tensor in tensors.items() if tensor.dim() == 2)
    rows = tensors[f"{layer}.weight"].float().abs().amax(1).clamp(min=1e-6)
    values = (tensors[f"{layer}.weight"].float() / rows[:, None] * 127).round().to(torch.int8)
    return tensors | {f"{layer}.weight": values, f"{layer}.SCB": rows}


def show_or_refuse(folder: Path, name: str, tensors: dict) -> str:
    """What Load Model shows for a file, or its error."""
    path = folder / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    try:
        return LoadModel.execute(f"{name}.safetensors").ui.value
    except SourceError as error:
        return str(error)


def test_files_of_diffusers_that_are_not_whole_models_are_refused(models, sentences, subtests):
    unet = {"conv_in.weight": torch.zeros(8, 7, 3, 3), "down_blocks.0.resnets.0.norm1.weight": torch.zeros(8)}
    flux2 = {
        "x_embedder.weight": torch.zeros(8, 8),
        "transformer_blocks.0.attn.add_k_proj.weight": torch.zeros(8, 8),
    }  # without biases
    more = tiny_of_diffusers() | {"extra.weight": torch.zeros(8, 8)}
    files = {
        "diffusion_models/unet": unet,
        "diffusion_models/flux2": flux2,
        "diffusion_models/more": more,
        "checkpoints/more": more,
    }
    for name, tensors in files.items():
        with subtests.test(name):
            sentences(show_or_refuse(models.parent, name, tensors))


def test_quantized_file_of_diffusers_is_shown_as_such(models):
    said = show_or_refuse(models.parent, "diffusion_models/quantized", quantize_as_bitsandbytes(tiny_of_diffusers()))
    assert "already quantized: bitsandbytes INT8" in said


def fits_comfyuis_class(name: str) -> bool | None:
    """Whether ComfyUI detects the converted names of a model and its class has the same tensors; None where it lacks that size."""
    shapes = {
        key: shape for key, shape in read_diffusers(name).items() if not re.search(r"blocks\.([2-9]|\d\d)\.", key)
    }
    source = header(name, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    source.path, source.paths, source.size = Path(name), (), 0
    renamed = RenamedSource(source, assemble_diffusers(source))
    state = {key: torch.empty(info.shape, device="meta") for key, info in renamed.tensors.items()}
    config = model_detection.model_config_from_unet(copy.copy(state), "")
    try:
        model = config.get_model(copy.copy(state), "", device="meta")
    except ValueError:
        return None
    expected = {key: value.shape for key, value in model.diffusion_model.state_dict().items()}
    return {key: value.shape for key, value in config.process_unet_state_dict(state).items()} == expected


NOT_IN_0_3_75 = {"flux2_klein_4b", "flux2_klein_9b"}


def test_names_that_comfyui_does_not_convert_fit_its_classes(host, subtests):
    assert set(DIFFUSERS_LISTS) == set(CONVERTED)
    for name in CONVERTED:
        with subtests.test(name):
            missing = host.version == "0.3.75" and name in NOT_IN_0_3_75
            assert fits_comfyuis_class(name) is (None if missing else True)


def tiny_wan() -> dict[str, torch.Tensor]:
    """WAN of width 256 with one block under diffusers' names."""
    shapes = {
        key: shape for key, shape in read_diffusers("wan_t2v_1_3b").items() if not re.search(r"blocks\.[1-9]", key)
    }
    sides = {1536: 256, 8960: 512, 9216: 1536}
    generator = torch.Generator().manual_seed(0)
    return {
        key: (torch.randn([sides.get(side, side) for side in shape], generator=generator) * 0.05).bfloat16()
        for key, shape in shapes.items()
    }


def test_model_with_converted_names_is_quantized_and_loaded(models, sentences):
    save_file(tiny_wan(), models / "wan.safetensors")
    quantized = quantize(choose("wan.safetensors"))
    model = pack.build_model(choose("wan.safetensors"), quantized)
    assert type(model.model).__name__ == "WAN21"
    assert len(pack.quantized_layers(model)) == 10
    sentences(quantized.report.recognised)


@pytest.mark.parametrize("config", [{}, {"causal_temporal_positioning": True}], ids=["0.9.1", "0.9.5"])
def test_what_comfyui_reads_from_the_header_is_in_the_quantized_file(models, config, subtests):
    """The positions of frames of LTX-Video depend on its version, which its tensors do not show."""
    sides = {2048: 256, 4096: 4096, 8192: 1024, 12288: 1536}
    shapes = {key: tensor.shape for key, tensor in read("ltxv").items() if not re.search(r"blocks\.[1-9]", key)}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: (torch.randn([sides.get(side, side) for side in shape], generator=generator) * 0.05).bfloat16()
        for key, shape in shapes.items()
    }
    save_file(tensors, models / "ltxv.safetensors", {"config": json.dumps({"transformer": config})} if config else None)
    source = choose("ltxv.safetensors")
    for kind, given in {"file": source, "model": comfy.sd.load_diffusion_model(str(source.path))}.items():
        with subtests.test(kind):
            quantized = quantize(given)
            with SafetensorsFile(quantized.files[""]) as file:
                stored = json.loads(file.metadata.get("config", "{}")).get("transformer", {})
            assert stored == config
            model = pack.build_model(given, quantized).model.diffusion_model
            assert model.causal_temporal_positioning is bool(config)


def test_checkpoints_of_pickle_give_the_weights_of_comfyuis_loader(models, subtests):
    weights, averaged = load_file(TINY), {name: tensor * 2 for name, tensor in load_file(TINY).items()}
    files = {
        "plain": weights,
        "state_dict": {"ema": averaged, "state_dict": weights, "epoch": 3},
        "only averaged": {"ema": averaged},
        "averaged beside": {"state_dict": weights | {f"model_ema.{name}": tensor for name, tensor in averaged.items()}},
    }
    for name, content in files.items():
        torch.save(content, models / f"{name}.ckpt")
        stock = comfy.utils.load_torch_file(str(models / f"{name}.ckpt"), safe_load=True)
        with subtests.test(name), pack.open_file(choose(f"{name}.ckpt")) as source:
            assert source.tensors.keys() == stock.keys()
            assert [key for key in source.tensors if not torch.equal(source.read(key), stock[key])] == []


def test_shard_that_lacks_others_is_not_listed_and_refused(models, sentences):
    name = "lost-00002-of-00002.safetensors"
    save_file(load_file(TINY), models / name)
    assert f"diffusion_models/{name}" not in pack.model_files()
    assert f"diffusion_models/{name}" not in pack.safetensors_files()
    with sentences.raises(QuantizationError):
        LoadModel.execute(f"diffusion_models/{name}")
    with sentences.raises(QuantizationError):
        pack.load_quantized(choose(name))
