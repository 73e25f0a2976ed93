"""The import path of before for the vector recurrences."""

from m2rnn.ops.vector_scan import gru_scan, rnn_scan

__all__ = ["gru_scan", "rnn_scan"]
