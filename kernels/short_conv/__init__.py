"""A short causal convolution of every channel with its own filter."""

from kernels.short_conv.api import short_conv

__all__ = ["short_conv"]
