"""Many models and many recipes as one batch: the plan file, the groups that share a source, the report."""

from .plan import BatchPlan, Group, Outcome, Output

__all__ = ["BatchPlan", "Group", "Outcome", "Output"]
