"""The (gated) delta rule: a state that corrects what it recalls before it writes."""

from kernels.delta_rule.api import delta_rule

__all__ = ["delta_rule"]
