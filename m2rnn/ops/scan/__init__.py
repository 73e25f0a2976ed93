"""The M2RNN recurrence: its definition, the public operator and the backends."""

from m2rnn.ops.scan.operator import available_backends, m2rnn_scan, m2rnn_step

__all__ = ["available_backends", "m2rnn_scan", "m2rnn_step"]
