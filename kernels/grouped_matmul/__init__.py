"""Rows sorted by group, each group times its own matrix: the experts of a mixture."""

from kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
