"""Many models and many recipes as one batch: the plan file, the groups that share a source, the report."""

from .plan import BatchPlan, Group, Outcome, Output
from .plan_file import read_plan
from .report import BatchReport
from .run import run_group, run_plan

__all__ = ["BatchPlan", "BatchReport", "Group", "Outcome", "Output", "read_plan", "run_group", "run_plan"]
