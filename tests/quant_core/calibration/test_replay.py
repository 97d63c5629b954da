"""Recorded calls: replays bit for bit, the sample, its memory, and its file."""

import gc
import json
import threading
import uuid

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from learned_rounding.quant_core.calibration import ReplayRecorder, ReplaySet
from learned_rounding.quant_core.errors import CalibrationError, OutputError, SourceError

CPU = torch.device("cpu")
LARGE = 1 << 30


class Nested(torch.nn.Module):
    """Model that uses all of its nested arguments, and changes them in place as ComfyUI's U-Net does."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, timestep, context=None, control=None, options=None, **others):
        options["blocks"] = 2  # a key that the caller does not pass
        x.mul_(2)
        hidden = self.layer(x) + context.mean() * timestep.float()
        while control["output"]:
            hint = control["output"].pop()
            hidden = hidden if hint is None else hidden + hint
        for patch in options["patches"].get("attn1", ()):
            hidden = patch(hidden)
        assert options["same"] is options["also"][0]
        assert isinstance(options["shape"], torch.Size)
        scale = options["replace"][("block", 3)] * options["scale"]
        return hidden * scale * (1 if options["device"].type == "cpu" else 0)


def double(x):
    return x * 2


def make_call(number, context):
    """Arguments of call ``number``; the context has equal values in all calls."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(2, 4, 6, 5, generator=generator).to(memory_format=torch.channels_last)
    same = torch.randn(3, generator=generator)
    options = {
        "patches": {"attn1": [double]},
        "replace": {("block", 3): 0.5 + number},
        "ids": [uuid.UUID(int=number)],
        "same": same,
        "also": (same,),
        "scale": torch.tensor(1.5, dtype=torch.bfloat16),
        "shape": x.shape,
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "raw": b"\x00\xff",
        "empty": torch.zeros(0, 3),
        "callbacks": {"on_load": [print]},
    }
    control = {"output": [torch.randn(1, 4, 1, 1, generator=generator).expand(2, 4, 6, 5), None]}
    timestep = torch.tensor([number, number])
    timestep = timestep[:1]
    return (x, timestep), {"context": context.clone(), "control": control, "options": options, "flag": True}


LIVE = {"options": {"patches": {"attn1": [double]}}}


def record(model, recorder, runs=1, calls=6, flags=None):
    """Run the model; returns the outputs of all calls."""
    outputs = []
    context = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(99))
    for run in range(runs):
        with torch.inference_mode(), recorder.watching(model, None if flags is None else flags[run]):
            for _ in range(calls):
                args, kwargs = make_call(len(outputs), context)
                outputs.append(model(*args, **kwargs))
    return outputs


def make_recorder(folder, calls=100, **options):
    options = {"seed": 0, "ram_bytes": LARGE, "ignored": [("options", "callbacks")]} | options
    return ReplayRecorder(calls, folder=folder, **options)


def recorded_number(replays, index):
    """Number of the recorded call in the order of all calls."""
    return int(replays.arguments(index, CPU, LIVE)[0][1])


@pytest.mark.parametrize("ram_bytes", [LARGE, 2000, 0])
def test_a_replay_equals_the_call_bit_for_bit(tmp_path, ram_bytes):
    torch.manual_seed(0)
    model, recorder = Nested(), make_recorder(tmp_path, ram_bytes=ram_bytes)
    outputs = record(model, recorder)
    replays = recorder.result()
    replays.save(tmp_path / "saved")
    for again in (replays, ReplaySet.load(tmp_path / "saved"), replays):  # each replay changes its arguments in place
        assert len(again) == 6
        assert again.fingerprint == replays.fingerprint
        for index, output in enumerate(outputs):
            args, kwargs = again.arguments(index, CPU, LIVE)
            assert args[0].is_contiguous(memory_format=torch.channels_last)
            assert not args[0].is_inference()
            assert kwargs["options"]["ids"] == [uuid.UUID(int=index)]
            assert kwargs["options"]["raw"] == b"\x00\xff"
            assert kwargs["options"]["dtype"] is torch.float16
            assert kwargs["options"]["empty"].shape == (0, 3)
            assert kwargs["flag"] is True
            assert "callbacks" not in kwargs["options"]
            assert torch.equal(model(*args, **kwargs), output)
    replayed = replays.arguments(0, CPU, LIVE)[0][0].requires_grad_()  # outside inference mode
    (replayed * 2).sum().backward()


def test_recording_does_not_change_outputs_and_removes_its_hook(tmp_path):
    torch.manual_seed(0)
    model, recorder = Nested(), make_recorder(tmp_path)
    outputs = record(model, recorder)
    with pytest.raises(ZeroDivisionError), recorder.watching(model):
        _ = 1 / 0
    assert not model._forward_pre_hooks
    context = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(99))
    args, kwargs = make_call(3, context)
    assert torch.equal(model(*args, **kwargs), outputs[3])
    assert len(recorder.result()) == 6


def test_objects_that_are_not_stored_come_from_the_model_of_the_replay(tmp_path):
    recorder = make_recorder(tmp_path)
    record(Nested(), recorder)
    replays = recorder.result()
    assert replays.arguments(0, CPU, LIVE)[1]["options"]["patches"]["attn1"][0] is double
    for live in (None, {}, {"options": {"patches": {"attn1": []}}}, {"options": {"patches": double}}):
        with pytest.raises(CalibrationError, match="need options → patches → attn1 → 0, which the model no longer has"):
            replays.arguments(0, CPU, live)


def test_objects_are_released_with_the_call(tmp_path):
    class Patch:
        pass

    recorder, patch = make_recorder(tmp_path), Patch()
    model = torch.nn.Identity()
    endless = []
    endless.append(endless)
    with recorder.watching(model):
        model({"patch": patch, Patch: 1, "endless": endless})
    count = len(gc.get_referrers(patch))
    del recorder
    assert len(gc.get_referrers(patch)) == count


def test_equal_tensors_are_stored_once(tmp_path):
    recorder = make_recorder(tmp_path)
    model, context = torch.nn.Identity(), torch.randn(100, 10)
    with recorder.watching(model):
        for number in range(8):
            model([context.clone(), context.clone(), torch.full((5,), float(number))])
        model(context.double() * 0 + 1)
        model(torch.ones(1000, 1, dtype=torch.float64))  # the same bytes in another shape
    replays = recorder.result()
    assert replays.nbytes == 4000 + 8 * 20 + 2 * 8000
    assert not replays.file_bytes
    (first, second, _), _ = replays.arguments(0, CPU)[0][0], None
    first.zero_()
    assert torch.equal(second, context)


def test_the_sample_covers_runs_steps_and_branches(tmp_path):
    """8 runs of 20 steps with two calls each, of which 64 are kept."""
    model = torch.nn.Identity()
    for seed in (0, 1, 2**64 - 1):
        recorder = make_recorder(tmp_path, 64, seed=seed)
        for run in range(8):
            with recorder.watching(model, run % 4 == 3):
                for call in range(40):
                    model((run, call))
        replays = recorder.result()
        calls = [replays.arguments(index, CPU)[0][0] for index in range(64)]
        assert calls == sorted(set(calls))
        runs = [sum(run == chosen for run, _ in calls) for chosen in range(8)]
        steps = [sum(call // 10 == quarter for _, call in calls) for quarter in range(4)]
        assert min(runs) >= 6
        assert min(steps) >= 13
        assert {call // 2 for _, call in calls} == set(range(20))
        assert 28 <= sum(call % 2 for _, call in calls) <= 36
        assert list(replays.positions) == [call / 40 for _, call in calls]
        assert list(replays.validation) == [run % 4 == 3 for run, _ in calls]


@pytest.mark.parametrize("calls", [1, 4, 9])
def test_the_same_seed_gives_the_same_calls(tmp_path, calls):
    found = {}
    for seed in (0, 0, 1, 2, 3):
        recorder = make_recorder(tmp_path, calls, seed=seed)
        record(Nested(), recorder, runs=3)
        replays = recorder.result()
        assert len(replays) == calls
        replays.save(tmp_path / f"{seed}")  # refused if the bytes differ
        chosen = tuple(recorded_number(replays, index) for index in range(calls)), replays.validation
        assert found.setdefault(seed, (replays.fingerprint, chosen)) == (replays.fingerprint, chosen)
    assert len({chosen for _, chosen in found.values()}) > 1
    assert len({mark for mark, _ in found.values()}) > 1


def test_some_calls_are_for_validation(tmp_path, subtests):
    for calls, flags, expected in [
        (1, [None], {0}),
        (2, [None], {1}),
        (12, [None, None], {3}),
        (12, [False, False], {1}),
        (12, [True, True], {11}),
        (12, [False, None], {1}),
        (12, [True, False], {6}),
    ]:
        with subtests.test(calls=calls, flags=flags, expected=expected):
            recorder = make_recorder(tmp_path, calls)
            record(Nested(), recorder, runs=len(flags), flags=flags)
            assert {sum(recorder.result().validation)} == expected


def test_memory_is_limited_and_files_are_removed(tmp_path):
    recorder = make_recorder(tmp_path, 4, ram_bytes=1000)
    model = torch.nn.Identity()
    with recorder.watching(model):
        for number in range(50):
            model(torch.full((100,), float(number)))
            files = list(tmp_path.iterdir())
            assert len(files) == max(0, min(number + 1, 4) - 2)
            assert all(file.stat().st_size == 400 for file in files)
    replays = recorder.result()
    assert replays.nbytes == 1600
    assert replays.file_bytes == 800
    del recorder
    gc.collect()
    values = [replays.arguments(index, CPU)[0][0] for index in range(4)]
    assert all(bool((value == value[0]).all()) for value in values)
    assert len(list(tmp_path.iterdir())) == 2
    del replays
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_fewer_calls_are_kept_where_the_limit_is_reached(tmp_path):
    model = torch.nn.Identity()
    for limit, expected in ((4000, 10), (399, 0)):
        recorder = make_recorder(tmp_path, 20, max_bytes=limit)
        with recorder.watching(model):
            for number in range(50):
                model(torch.full((100,), float(number)))
        replays = recorder.result()
        assert (0 if replays is None else len(replays)) == expected
        assert recorder.limited
    recorder = make_recorder(tmp_path, 0)
    with recorder.watching(model):
        model(torch.zeros(3))
    assert recorder.result() is None
    assert not recorder.limited


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    recorder = make_recorder(tmp_path / "missing", ram_bytes=0)
    with pytest.raises(OutputError, match="missing: No such file or directory; free some space"):
        record(Nested(), recorder)


def test_calls_can_be_read_by_several_threads(tmp_path):
    recorder = make_recorder(tmp_path, ram_bytes=0)
    outputs, model = record(model := Nested(), recorder), model
    recorder.result().save(tmp_path / "saved")
    replays, wrong = ReplaySet.load(tmp_path / "saved"), []

    def replay(index):
        args, kwargs = replays.arguments(index, CPU, LIVE)
        if not torch.equal(model(*args, **kwargs), outputs[index]):
            wrong.append(index)

    threads = [threading.Thread(target=replay, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def saved(tmp_path):
    """A file of calls, with its tensors and the JSON of the calls."""
    recorder = make_recorder(tmp_path)
    record(Nested(), recorder, calls=2)
    path = tmp_path / "calls"
    recorder.result().save(path, calibration="abc")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return path, tensors, json.loads(file.metadata()["learned_rounding_calls"])


def test_a_file_names_its_calibration_and_is_not_overwritten(saved, tmp_path):
    path, *_ = saved
    loaded = ReplaySet.load(path)
    assert loaded.calibration == "abc"
    assert loaded.file_bytes == loaded.nbytes > 0
    with pytest.raises(OutputError):
        loaded.save(path, calibration="def")
    stopped = iter([None, None])
    with pytest.raises(StopIteration):
        loaded.save(tmp_path / "stopped", check=lambda: next(stopped))
    assert not (tmp_path / "stopped").exists()


CHANGES = {
    "version": lambda calls: calls.update(version=2),
    "no calls": lambda calls: calls.update(calls=[]),
    "no list": lambda calls: calls.update(calls=3),
    "digest missing": lambda calls: calls["digests"].pop(),
    "tensor": lambda calls: calls["calls"][0]["tensors"][0].__setitem__(0, 10**30),
    "order": lambda calls: calls["calls"][0]["tensors"][0].__setitem__(1, [0, 1, 2, 2]),
    "position": lambda calls: calls["calls"][0].update(position=float("nan")),
    "validation": lambda calls: calls["calls"][0].update(validation=1),
    "kind": lambda calls: calls["calls"][0].update(arguments=["eval", "1"]),
    "scalar": lambda calls: calls["calls"][0].update(arguments=3),
    "no kind": lambda calls: calls["calls"][0].update(arguments=[]),
    "no dict": lambda calls: calls["calls"][0].update(arguments=["tuple", ["tuple"], ["list"]]),
    "key": lambda calls: calls["calls"][0].update(arguments=["tuple", ["tuple"], ["dict", [["list"], 1]]]),
    "live key": lambda calls: calls["calls"][0].update(arguments=["tuple", ["tuple"], ["dict", [["live"], 1]]]),
    "dtype": lambda calls: calls["calls"][0].update(arguments=["tuple", ["tuple", ["dtype", "x"]], ["dict"]]),
    "bytes": lambda calls: calls["calls"][0].update(arguments=["tuple", ["tuple", ["bytes", "x"]], ["dict"]]),
    "uuid": lambda calls: calls["calls"][0].update(arguments=["tuple", ["tuple", ["uuid", 3]], ["dict"]]),
}


def test_a_damaged_description_is_refused(saved, subtests):
    for change in CHANGES:
        with subtests.test(change):
            path, tensors, calls = saved
            CHANGES[change](calls)
            save_file(tensors, path, {"learned_rounding_calls": json.dumps(calls)})
            with pytest.raises(CalibrationError, match=r"calibrate again|newer version"):
                ReplaySet.load(path)


def test_another_file_is_refused(saved, subtests):
    for text in [None, "", "[]", "{}", "[" * 100_000, '{"version": "1"}', "3"]:
        with subtests.test(text=text):
            path, tensors, _ = saved
            save_file(tensors, path, None if text is None else {"learned_rounding_calls": text})
            with pytest.raises((CalibrationError, SourceError)):
                ReplaySet.load(path)


def test_a_damaged_file_is_refused(saved):
    path, *_ = saved
    content = path.read_bytes()
    for cut in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(SourceError):
            ReplaySet.load(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    replays = ReplaySet.load(path)
    with pytest.raises(CalibrationError, match="differs from its checksum"):
        for index in range(len(replays)):
            replays.arguments(index, CPU, LIVE)
