"""The selective scan of Mamba-1: N decaying numbers a channel, written and read by every token."""

from kernels.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
