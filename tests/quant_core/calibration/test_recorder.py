"""The recorder: which calls are kept, in how much memory, and what it leaves behind."""

import gc

import pytest
import torch

from learned_rounding.quant_core.errors import OutputError

from .recorded_calls import CPU, Nested, make_call, make_recorder, record, recorded_number


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
