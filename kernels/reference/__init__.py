"""Plain torch: what every kernel computes, on any device."""

from .rounding import grid_step, round_block, round_to_grid, scale_errors

__all__ = ["grid_step", "round_block", "round_to_grid", "scale_errors"]
