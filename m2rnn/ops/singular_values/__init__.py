"""Singular values of small matrices, cut at a bound."""

from m2rnn.ops.singular_values.operator import bounded

__all__ = ["bounded"]
