"""The vector recurrences of the paper's baselines: RNN and GRU."""

from m2rnn.ops.vector_scan.operator import gru_scan, rnn_scan

__all__ = ["gru_scan", "rnn_scan"]
