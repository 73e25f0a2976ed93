"""The layers' short convolution, fused for GPUs."""

from m2rnn.ops.short_conv.operator import is_fast, short_conv

__all__ = ["is_fast", "short_conv"]
