"""RMS normalisation fused with what stands around it: a residual sum and gates."""

from kernels.norm.api import norm

__all__ = ["norm"]
