"""Cross-entropy over a vocabulary, fused with the output head."""

from kernels.cross_entropy.api import cross_entropy

__all__ = ["cross_entropy"]
