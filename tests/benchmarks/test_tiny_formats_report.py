"""Report of the benchmark of image formats: comparisons of calibrations, and prompts that a difference needs."""

import json

from learned_rounding.benchmarks.tiny_formats_report import main, prompts_needed


def test_fewer_prompts_suffice_for_a_larger_difference():
    assert prompts_needed(1.0, 0.5, 1.5, prompts=32) == 8
    assert prompts_needed(-0.25, -0.75, 0.25, prompts=32) == 128
    assert prompts_needed(0.0, -1.0, 1.0, prompts=32) is None


def test_report_compares_calibrations_of_the_same_images(tmp_path, monkeypatch, capsys):
    cases = {"W4A8 / nearest": [30.0, 31.0], "W4A8 / calibrated": [31.0, 32.0], "W4A8 / sequential": [31.5, 32.5]}
    result = {"device": "CPU", "host_device": "cpu", "prompts": ["owl", "pizza"], "seeds": 2, "steps": 20, "rows": []}
    for count, change in ((32, 0.0), (64, 0.25)):
        values = {f"as run / {name}": [value + change for value in line] for name, line in cases.items()}
        about = {"calibration_prompts": count, "calibration_seed": 1001, "dB_per_prompt": values}
        (tmp_path / f"{count}.json").write_text(json.dumps(result | about))
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "32.json"), str(tmp_path / "64.json")])
    main()
    cells = "+0.50 (+0.50…+0.50) | +0.50 (+0.50…+0.50) | +0.25 (+0.25…+0.25)"
    assert f"| as run | W4A8 | sequential | {cells} |" in capsys.readouterr().out
