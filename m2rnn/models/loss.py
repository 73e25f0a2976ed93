"""Cross-entropy of a language model without float32 logits for the whole batch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from m2rnn.layers.projection import is_plain_linear, product_dtype
from m2rnn.ops import cross_entropy
from m2rnn.ops.cross_entropy import IGNORED as IGNORED

LOGITS_PER_CHUNK = 2**26  # 256 MiB of float32


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

    def total(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, labels.to(logits.device), ignore_index=IGNORED, reduction="sum")

    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    weight, dtype = _fusible_weight(head), product_dtype(hidden)
    fused = weight is not None and torch.is_grad_enabled() and cross_entropy.why_not(hidden, weight, dtype) is None
    if weight is not None and fused:
        loss = cross_entropy.linear_cross_entropy(hidden, weight, labels, dtype, chunk_size)
        return loss / _divisor(labels, num_items, loss.device)
    chunk_size = max(1, LOGITS_PER_CHUNK // vocab_size) if chunk_size is None else chunk_size
    if labels.shape[0] <= chunk_size:
        loss = total(hidden, labels)
    else:
        chunks = zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
        loss = torch.stack([checkpoint(total, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    return loss / _divisor(labels, num_items, loss.device)


def _divisor(labels: Tensor, num_items: int | Tensor | None, device: torch.device) -> int | Tensor:
    divisor = (labels != IGNORED).sum() if num_items is None else num_items
    return divisor.to(device) if isinstance(divisor, Tensor) else divisor


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
