"""Files in this pack's formats through ComfyUI's own loaders."""

import sys
from pathlib import Path

import pytest
import torch

from learned_rounding.quant_core import FORMATS
from learned_rounding.quant_core.convert.dequantize import DecodedSource
from learned_rounding.quant_core.formats import detect_layer
from learned_rounding.quant_core.formats.layer_json import CONFIG_KEY, config_tensor, layer_configs
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.sources import SafetensorsFile
from learned_rounding.tests.in_comfyui import IN_COMFYUI
from learned_rounding.tests.nodes.probing import stock_loads, takes_layouts

if IN_COMFYUI:
    import comfy.model_management
    import comfy.ops
    import comfy.quant_ops
    import comfy.sd

    from learned_rounding.nodes import host as pack
    from learned_rounding.tests.nodes.host.tiny_model import TinyModel, distance

pytestmark = pytest.mark.usefixtures("in_comfyui")

OURS = {
    name: {"format": name, **({"block_size": 64} if "block" in name else {})}
    for name, entry in FORMATS.items()
    if entry.stock_since is None
}
# Name → recipe of the formats below 8 bits and of the microscaling ones.
STOCK = {
    "asym_w4a8_int8": {"format": "asym_w4a8_int8"},
    "asym_w4a8_int8 6 bits": {"format": "asym_w4a8_int8", "bits": 6},
    "convrot_w4a4": {"format": "convrot_w4a4"},
    "convrot_w4a4 int4": {"format": "convrot_w4a4", "linear_dtype": "int4"},
    "nvfp4": {"format": "nvfp4"},
    "mxfp8": {"format": "mxfp8"},
}
# Relative error of the tiny model's prediction for random inputs; round to nearest, quantized activations.
BOUND = 0.25


@pytest.fixture
def taught(host):
    if not takes_layouts(host):
        pytest.skip(f"ComfyUI {host.version} has no way to add formats; graphs use our own layers")


@pytest.fixture
def tiny():
    return TinyModel()


def stored_bytes(path) -> dict[str, tuple]:
    """{tensor: (dtype, shape, bytes)} of a file's quantized layers without their JSON; values as float32 of other tensors."""
    with SafetensorsFile(path) as opened:
        layers = layer_configs(opened)[0]
        found = {}
        for name, info in opened.tensors.items():
            if name.endswith(CONFIG_KEY):
                continue
            tensor = opened.read(name)
            coded = name.rpartition(".")[0].removeprefix("model.diffusion_model.") in {
                layer.removeprefix("model.diffusion_model.") for layer in layers
            } and not name.endswith(".bias")
            value = (
                tensor.contiguous().flatten().view(torch.uint8) if coded else tensor.float().flatten().view(torch.uint8)
            )
            # ComfyUI saves the scales of mxfp8 under the name of their dtype, with the same bytes.
            dtype = torch.uint8 if info.dtype is torch.float8_e8m0fnu else info.dtype
            known = (str(dtype), info.shape) if coded else info.shape
            found[name.removeprefix("model.diffusion_model.")] = known, value.numpy().tobytes()
        return found


def codecs_of(path) -> dict[str, str]:
    """{layer: codec and its JSON} of a file."""
    with SafetensorsFile(path) as opened:
        codecs = {
            layer.removeprefix("model.diffusion_model."): detect_layer(layer, config, opened.tensors)
            for layer, config in layer_configs(opened)[0].items()
        }
    return {layer: f"{codec}: {codec.config}" for layer, codec in codecs.items()}


def dequantized(path) -> dict[str, torch.Tensor]:
    """{tensor: value} of a file whose quantized layers are dequantized."""
    with SafetensorsFile(path) as opened:
        decoded = DecodedSource(opened)
        return {name.removeprefix("model.diffusion_model."): decoded.read(name) for name in decoded.tensors}


def load_aligned(path):
    """The model of a file with plain weights copied: products depend on the alignment, which is random in a mapped file."""
    model = comfy.sd.load_diffusion_model(str(path))
    for weight in model.model.parameters():
        if type(weight.data) is torch.Tensor:
            weight.data = weight.data.clone()
    return model


def load_before_registration(tiny, path) -> str:
    """The error of ComfyUI that does not know our formats; "" if there is none."""
    try:
        tiny.run(load_aligned(path))
    except Exception as error:
        return repr(error)
    return ""


def check_loaded(tiny, quantized, recipe: dict, expanded: bool, subtests, name: str) -> dict[str, float]:
    """What holds for files of every format through ComfyUI's own functions; returns the errors of the predictions."""
    path, format = Path(quantized.files[""]), recipe["format"]
    model = comfy.sd.load_diffusion_model(str(path))
    layers = pack.quantized_layers(model)
    stored = str(torch.int8 if expanded else FORMATS[format].storage_dtype).removeprefix("torch.")
    with subtests.test(f"{name}: layers"):
        assert len(layers) > 30
        assert stored in layers.values()
        assert set(layers.values()) <= {stored, "int8"}

    expected, expected_lora = tiny.run(tiny.original), tiny.run(tiny.with_lora(tiny.original))
    plain, patched = tiny.run(model), tiny.with_lora(model)
    whole = tiny.run(patched)
    beside = comfy.sd.load_bypass_lora_for_models(model, None, tiny.lora, 1.0, 0.0)[0]
    before = pack.build_model(tiny.original, tiny.file(source=tiny.with_lora(tiny.original), **recipe))
    errors = {
        "alone": distance(plain, expected),
        "with the LoRA": distance(whole, expected_lora),
        "with the LoRA and little memory": distance(tiny.run(patched, lowvram_model_memory=1), expected_lora),
        "with the LoRA beside": distance(tiny.run(beside), expected_lora),
        "with the LoRA before": distance(tiny.run(before), expected_lora),
    }
    for case, error in errors.items():
        with subtests.test(f"{name}: error {case}"):
            assert 0 < error < BOUND
    with subtests.test(f"{name}: the LoRA is applied"):
        assert errors["with the LoRA"] < distance(expected_lora, expected)
    with subtests.test(f"{name}: little memory changes nothing"):
        assert torch.equal(tiny.run(model, lowvram_model_memory=1), plain)
    with subtests.test(f"{name}: the LoRA is removed"):
        assert torch.equal(tiny.run(model), plain)
    with subtests.test(f"{name}: as in the graph"):
        assert torch.equal(tiny.run(pack.build_model(tiny.original, quantized)), plain)

    saved, baked = path.with_name(f"{name}_saved.safetensors"), path.with_name(f"{name}_baked.safetensors")
    comfy.sd.save_checkpoint(str(saved), model)
    comfy.sd.save_checkpoint(str(baked), patched)
    comfy.model_management.unload_all_models()
    with subtests.test(f"{name}: saved by ComfyUI"):
        assert (stored_bytes(saved) == stored_bytes(path) and codecs_of(saved) == codecs_of(path)) is not expanded
        ours, theirs = dequantized(path), dequantized(saved)
        assert ours.keys() == theirs.keys()
        assert [layer for layer in ours if not torch.equal(ours[layer], theirs[layer])] == []
        assert torch.equal(tiny.run(load_aligned(saved)), plain)
    with subtests.test(f"{name}: saved by ComfyUI with the LoRA"):
        assert codecs_of(baked) == codecs_of(saved)
        assert verify_file(baked).layers == len(layers)
        assert torch.equal(tiny.run(load_aligned(baked)), whole)
    for file in (path, saved, baked):
        with subtests.test(f"{name}: {file.stem} is valid"):
            assert not verify_file(file).problems
    return errors


@pytest.mark.usefixtures("taught")
def test_comfyui_loads_runs_patches_and_saves_own_formats(tiny, subtests):
    files = {name: tiny.file(**recipe) for name, recipe in OURS.items()}
    before = {name: load_before_registration(tiny, quantized.files[""]) for name, quantized in files.items()}
    pack.add_layouts()
    for name, quantized in files.items():
        with subtests.test(name):
            assert before[name] == f"KeyError('{name}')"
            assert pack.describe_formats(quantized.files[""]) == f"{name}, run by ComfyUI itself"
        check_loaded(tiny, quantized, OURS[name], False, subtests, name)
        (saved,) = pack.save_files(quantized, "tiny", "output")
        with subtests.test(f"{name}: saved by this pack"):
            assert saved.read_bytes() == quantized.files[""].read_bytes()


@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize("name", STOCK)
def test_comfyui_loads_runs_patches_and_saves_formats_below_8_bits(host, tiny, name, sentences, subtests):
    """The layers that comfy-kitchen 0.2.31 cannot decode run as INT8 layers of the same values, and fail without this pack."""
    if not stock_loads(host, STOCK[name]["format"]):
        pytest.skip(f"ComfyUI {host.version} cannot load {STOCK[name]['format']} files")
    quantized = tiny.file(**STOCK[name])
    before = load_before_registration(tiny, quantized.files[""])
    pack.add_layouts()
    runs = pack.describe_formats(quantized.files[""])
    expanded = "INT8 layers" in runs
    assert before.startswith("ValueError") if expanded else before == ""
    if host.version == "0.33.0":
        assert expanded is name.endswith("6 bits")
    errors = check_loaded(tiny, quantized, STOCK[name], expanded, subtests, name)
    # A merged LoRA is rounded again; beside the layer, or before its quantization, it adds no error.
    for way in ("beside", "before"):
        with subtests.test(f"no error of the LoRA {way}"):
            assert errors[f"with the LoRA {way}"] < 1.1 * errors["alone"]
            assert errors[f"with the LoRA {way}"] < errors["with the LoRA"]
    (saved,) = pack.save_files(quantized, "tiny", "output")
    assert saved.read_bytes() == quantized.files[""].read_bytes()
    sentences(runs, pack.verify_saved(quantized, [saved]))


@pytest.mark.usefixtures("taught")
def test_models_in_own_formats_compile_as_native_ones(tiny, subtests):
    files = {name: tiny.file(format=name) for name in ("int8_tensorwise", *OURS)}
    pack.add_layouts()
    breaks = {}
    for name, quantized in files.items():
        model = comfy.sd.load_diffusion_model(str(quantized.files[""]))
        plain = tiny.run(model)
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model.model.diffusion_model = torch.compile(model.model.diffusion_model, backend="aot_eager")
        with subtests.test(name):
            result = tiny.run(model)
            breaks[name] = len(torch._dynamo.utils.counters["graph_break"])
            assert torch.equal(result, plain)
            assert breaks[name] == breaks["int8_tensorwise"]


def class_names(model) -> list[str]:
    """Classes of the modules; of a layer with our short forward pass, ComfyUI's class that it extends."""
    classes = (
        type(module).__base__ if getattr(module, "is_extended", False) else type(module)
        for module in model.model.modules()
    )
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in classes]


NATIVE = {
    "float8_e4m3fn": {"format": "float8_e4m3fn"},
    "float8_e5m2": {"format": "float8_e5m2"},
    "int8 row": {"format": "int8_tensorwise"},
    "int8 tensor": {"format": "int8_tensorwise", "granularity": "tensor"},
    "int8 convrot": {"format": "int8_tensorwise", "convrot": True},
}


def run_and_watch(tiny, file):
    """Load and run a file; returns the model, its prediction, and the functions of our layouts that ran."""
    ran = set()

    def watch(frame, event, _):
        if event == "call" and Path(frame.f_code.co_filename).name == "layouts.py":
            ran.add(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        model = comfy.sd.load_diffusion_model(str(file.files[""]))
        return model, tiny.run(model), sorted(ran)
    finally:
        sys.setprofile(None)


@pytest.mark.usefixtures("taught")
def test_native_formats_do_not_run_own_code(tiny, subtests):
    files = {name: tiny.file(**recipe) for name, recipe in NATIVE.items()}
    models = {name: comfy.sd.load_diffusion_model(str(file.files[""])) for name, file in files.items()}
    before = {name: tiny.run(model) for name, model in models.items()}
    classes = {name: class_names(model) for name, model in models.items()}
    algorithms = dict(comfy.quant_ops.QUANT_ALGOS)
    pack.add_layouts()
    for name, file in files.items():
        with subtests.test(name):
            model, after, ran = run_and_watch(tiny, file)
            assert ran == ["load_quantized_module"]
            assert torch.equal(after, before[name])
            assert class_names(model) == classes[name]
    changed = [name for name, entry in algorithms.items() if comfy.quant_ops.QUANT_ALGOS[name] is not entry]
    assert changed == []


@pytest.mark.usefixtures("taught")
def test_own_formats_run_own_code(tiny):
    file = tiny.file(format="int8_blockwise")
    pack.add_layouts()
    assert "_load_layer" in run_and_watch(tiny, file)[2]


@pytest.mark.usefixtures("taught")
def test_layouts_are_added_once():
    pack.add_layouts()
    before = comfy.ops._load_quantized_module
    pack.add_layouts()
    assert comfy.ops._load_quantized_module is before


@pytest.mark.usefixtures("taught")
def test_layers_whose_tensors_contradict_their_json_are_rejected_by_name(sentences, subtests):
    pack.add_layouts()
    operations = comfy.ops.mixed_precision_ops({}, torch.float32)
    coded = comfy.quant_ops.QuantizedTensor.from_float(
        torch.randn(64, 96), "LearnedRoundingInt8Blockwise", block_size=32
    )
    entry = {"format": "int8_blockwise", "group_size": 32}
    valid = {**coded.state_dict("a.weight"), "a.comfy_quant": config_tensor(entry)}
    damaged = {
        "no scale": {name: tensor for name, tensor in valid.items() if name != "a.weight_scale"},
        "no weight": {name: tensor for name, tensor in valid.items() if name != "a.weight"},
        "another block size": {**valid, "a.comfy_quant": config_tensor({**entry, "group_size": 64})},
        "FP8 codes": {**valid, "a.weight": valid["a.weight"].view(torch.float8_e4m3fn)},
        "a bank of matrices": {**valid, "a.weight": valid["a.weight"][None]},
    }

    def load(state_dict):
        layer = operations.Linear(96, 64, bias=False)
        layer._load_from_state_dict(dict(state_dict), "a.", {}, True, [], [], [])

    load(valid)
    for name, state_dict in damaged.items():
        with subtests.test(name):
            with pytest.raises(ValueError, match="a: ") as error:
                load(state_dict)
            sentences(repr(error.value))


def other_loader(module, state_dict, prefix):
    raise AssertionError("not ours to call")


@pytest.mark.parametrize("change", ["gone", "other arguments"])
def test_decoding_layers_run_where_formats_cannot_be_registered(tiny, caplog, monkeypatch, change, sentences):
    """ComfyUI with other internals: nothing is changed, and one warning is logged."""
    loader = getattr(comfy.ops, "_load_quantized_module", None)
    changed = None if change == "gone" else other_loader
    if loader is None and changed:
        pytest.skip("this ComfyUI has no such loader")
    with monkeypatch.context() as patch:
        if changed:
            patch.setattr(comfy.ops, "_load_quantized_module", changed)
        else:
            patch.delattr(comfy.ops, "_load_quantized_module", raising=False)
        pack.add_layouts()
        assert getattr(comfy.ops, "_load_quantized_module", None) is changed
    assert [name for name in OURS if pack.supports_format(name)] == []
    (said,) = (record.getMessage() for record in caplog.records if record.name.endswith("nodes.host.layouts"))
    sentences(said)
    model = pack.build_model(tiny.original, tiny.file(format="int8_blockwise"))
    assert len(pack.quantized_layers(model)) > 30
    assert 0 < distance(tiny.run(model), tiny.run(tiny.original)) < BOUND
