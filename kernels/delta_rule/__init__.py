"""The (gated) delta rule, and states whose transition is diagonal plus low rank."""

from kernels.delta_rule.api import delta_rule, dplr

__all__ = ["delta_rule", "dplr"]
