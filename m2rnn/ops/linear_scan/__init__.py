"""Linear recurrences with a matrix state: those of Gated DeltaNet and Mamba-2."""

from m2rnn.ops.linear_scan.operator import gated_delta_scan, gated_linear_scan

__all__ = ["gated_delta_scan", "gated_linear_scan"]
