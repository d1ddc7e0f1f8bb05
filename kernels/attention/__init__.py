"""Softmax attention: of a row to itself, and of new tokens to a cache."""

from kernels.attention.api import attention, cached_attention

__all__ = ["attention", "cached_attention"]
