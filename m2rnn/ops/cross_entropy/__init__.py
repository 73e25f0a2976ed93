"""Cross-entropy of a linear layer's outputs, which never holds all logits."""

from m2rnn.ops.cross_entropy.operator import IGNORED, LOGITS_PER_CHUNK, linear_cross_entropy, why_not

__all__ = ["IGNORED", "LOGITS_PER_CHUNK", "linear_cross_entropy", "why_not"]
