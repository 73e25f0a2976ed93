"""Operators for decoding, a token at a time."""

from m2rnn.ops.decode.operator import FEW_ROWS, decode_step, few_rows_linear

__all__ = ["FEW_ROWS", "decode_step", "few_rows_linear"]
