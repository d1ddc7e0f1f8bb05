"""Linear attention with a decaying outer-product state."""

from kernels.gated_linear.api import gated_linear

__all__ = ["gated_linear"]
