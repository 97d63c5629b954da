"""Recorded calls: replays bit for bit, and their file."""

import copy
import json
import threading
import uuid

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from learned_rounding.quant_core.calibration import ReplaySet
from learned_rounding.quant_core.errors import CalibrationError, OutputError, SourceError

from .recorded_calls import CPU, LARGE, LIVE, Nested, double, make_recorder, record


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


def test_objects_that_are_not_stored_come_from_the_model_of_the_replay(tmp_path):
    recorder = make_recorder(tmp_path)
    record(Nested(), recorder)
    replays = recorder.result()
    assert replays.arguments(0, CPU, LIVE)[1]["options"]["patches"]["attn1"][0] is double
    for live in (None, {}, {"options": {"patches": {"attn1": []}}}, {"options": {"patches": double}}):
        with pytest.raises(CalibrationError, match="need options → patches → attn1 → 0, which the model no longer has"):
            replays.arguments(0, CPU, live)


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
    path, tensors, valid = saved
    for kind, change in CHANGES.items():
        with subtests.test(kind):
            calls = copy.deepcopy(valid)
            change(calls)
            save_file(tensors, path, {"learned_rounding_calls": json.dumps(calls)})
            with pytest.raises(CalibrationError, match=r"calibrate again|newer version"):
                ReplaySet.load(path)


def test_another_file_is_refused(saved, subtests):
    path, tensors, _ = saved
    for text in (None, "", "[]", "{}", "[" * 100_000, '{"version": "1"}', "3"):
        with subtests.test(text=text):
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
