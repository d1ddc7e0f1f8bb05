"""Diagonal linear recurrences: every channel decays, turns and adds by itself."""

from kernels.linear_scan.api import complex_linear_scan, linear_scan

__all__ = ["complex_linear_scan", "linear_scan"]
