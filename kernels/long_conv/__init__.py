"""A causal convolution of every channel with a filter as long as the sequence."""

from kernels.long_conv.api import long_conv

__all__ = ["long_conv"]
