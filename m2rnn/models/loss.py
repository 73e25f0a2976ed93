"""Cross-entropy of a language model without float32 logits for the whole batch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m2rnn.layers.projection import is_plain_linear, is_plain_weight, product_dtype, runs_as_written
from m2rnn.ops import cross_entropy
from m2rnn.ops.cross_entropy import IGNORED as IGNORED

LOGITS_PER_CHUNK = 2**26  # 256 MiB of float32


class LanguageModelHead(nn.Linear):
    """A linear layer to the logits of a vocabulary, which sums the loss itself if it is given labels.

    FSDP gathers the weight for a call and, in the backward pass, once for that call: a head that is called for every
    part of a loss would find its weight in shards when the second part is made again.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor | None = None, chunk_size: int | None = None) -> Tensor:
        """Logits ``[..., vocabulary]``; with labels the sum of the loss, as in `chunked_cross_entropy`."""
        if labels is None:
            return super().forward(hidden)
        weight = self.weight if is_plain_weight(self.weight) and not torch.compiler.is_compiling() else None
        return _summed_cross_entropy(hidden, labels, super().forward, weight, self.out_features, chunk_size)

    @property
    def sums_itself(self) -> bool:
        """Whether to call it with labels: not if hooks expect logits, but if they are FSDP's."""
        return runs_as_written(self) or hasattr(self, "unshard")


def chunked_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    num_items: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """``-Σ log softmax(head(hidden))[label]`` over labels other than -100, divided by their number.

    The logits are made, reduced and dropped ``chunk_size`` tokens at a time, and made again in the backward pass;
    or, in bfloat16 on a GPU with a plain linear head, turned into the gradients at once, by
    ``m2rnn.ops.cross_entropy``.

    Args:
        hidden: ``[..., D]``.
        labels: int64 ``[...]``, the token that each position predicts.
        head: from ``[n, D]`` to logits ``[n, vocab_size]``.
        num_items: divisor instead of the number of labels, for gradient accumulation.
        chunk_size: default ``LOGITS_PER_CHUNK / vocab_size``, or what ``m2rnn.ops.cross_entropy`` chooses.

    Returns:
        A float32 number (float64 for float64 logits); NaN if there is no label and no ``num_items``.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if isinstance(head, LanguageModelHead) and head.sums_itself:
        loss: Tensor = head(hidden, labels, chunk_size)
    else:
        loss = _summed_cross_entropy(hidden, labels, head, _fusible_weight(head), vocab_size, chunk_size)
    divisor = (labels != IGNORED).sum() if num_items is None else num_items
    return loss / (divisor.to(loss.device) if isinstance(divisor, Tensor) else divisor)


def _summed_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    weight: Tensor | None,
    vocab_size: int,
    chunk_size: int | None,
) -> Tensor:
    """For ``[n, D]`` and ``[n]``; ``weight`` is the head's if that is a product with it and nothing else."""

    def total(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, labels.to(logits.device), ignore_index=IGNORED, reduction="sum")

    dtype = product_dtype(hidden)
    if weight is not None and torch.is_grad_enabled() and cross_entropy.why_not(hidden, weight, dtype) is None:
        return cross_entropy.linear_cross_entropy(hidden, weight, labels, dtype, chunk_size)
    chunk_size = max(1, LOGITS_PER_CHUNK // vocab_size) if chunk_size is None else chunk_size
    if labels.shape[0] <= chunk_size:
        return total(hidden, labels)
    chunks = zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
    return torch.stack([checkpoint(total, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _fusible_weight(head: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The weight of a head that is a matrix product and nothing else; None for others, and in a compiled model."""
    return head.weight if not torch.compiler.is_compiling() and is_plain_linear(head) else None


def chunked_token_losses(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    chunk_size: int | None = None,
) -> Tensor:
    """``-log softmax(head(hidden))[label]`` of each token, without gradients.

    Args:
        hidden: ``[n, D]``.
        labels: int64 ``[n]``.
        head, chunk_size: as in `chunked_cross_entropy`.

    Returns:
        ``[n]`` in float32 (float64 for float64 logits).
    """
    losses = []
    chunk_size = max(1, LOGITS_PER_CHUNK // vocab_size) if chunk_size is None else chunk_size
    with torch.no_grad():
        for part, target in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
            logits = head(part)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
    return torch.cat(losses)
