"""The recurrence as functions of tensors: reference, kernels and the public operator."""

from m2rnn.ops.scan import available_backends, m2rnn_scan, m2rnn_step

__all__ = ["available_backends", "m2rnn_scan", "m2rnn_step"]
