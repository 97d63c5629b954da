"""Plain data of a batch."""

import pickle

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.batch import BatchPlan, Group, Outcome, Output


def test_a_plan_can_be_sent_to_another_process(tmp_path):
    output = Output("r", Recipe(format="int8", keep=("x",)), tmp_path / "a_r.safetensors", calibrated=True)
    plan = BatchPlan(tmp_path / "plan.toml", (Group(tmp_path / "a.safetensors", "a", (output,)),), tmp_path / "plan")
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_an_outcome_can_be_sent_to_another_process():
    outcome = Outcome("a", "a", "r", "a_r", "failed", 1.0, {"type": "SourceError"}, {"layers": 1}, "Traceback")
    assert pickle.loads(pickle.dumps(outcome)) == outcome


def test_a_report_is_two_files_of_one_name(tmp_path):
    plan = BatchPlan(tmp_path / "plan.toml", (), tmp_path / "flux.1")
    assert plan.report_files == (tmp_path / "flux.1.json", tmp_path / "flux.1.md")
