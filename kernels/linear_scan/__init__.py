"""A diagonal linear recurrence: every channel decays and adds by itself."""

from kernels.linear_scan.api import linear_scan

__all__ = ["linear_scan"]
