"""A bound on the singular values of W, the matrix that carries M2RNN's state from token to token.

For a small state the step is H (f + (1 - f) W) + …: along a singular direction where W has 1 or more, the forget gate
forgets nothing, and the state can grow long after the training length. With all singular values at most b < 1, two
states under the same inputs approach each other by f + (1 - f) b a step, so every head forgets. A head that is to hold
the state of an automaton must not forget: heads may be left free.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from m2rnn.ops.singular_values import bounded


@torch.no_grad()
def bound_state_weights(model: nn.Module, bound: float | None = None, heads: int | None = None) -> int:
    """Cut the singular values of W in every M2RNN layer of ``model``, in place: call it after the optimizer's step.

    In anybody's training loop, after every fourth step or so::

        optimizer.step()
        if step % 4 == 0:
            bound_state_weights(model)

    The host does not wait for the device. Sharded weights (FSDP2) are cut where they lie, nothing is sent.

    Args:
        model: any module; layers that are swapped into another's model count, too.
        bound: of all layers, instead of each layer's own ``state_weight_bound`` and ``bounded_heads``.
        heads: how many heads of each layer, the first ones, ``bound`` applies to; None for all.

    Returns:
        How many layers have a bound.

    Raises:
        ValueError: for a bound that is not above 0, or more heads than a layer has.
    """
    groups: dict[tuple[torch.device, torch.dtype, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    count = 0
    for layer in _layers(model):
        own = layer.state_weight_bound, layer.bounded_heads
        pair = _local(layer.state_weight, *(own if bound is None else (bound, heads)))
        if pair is not None:
            groups[pair[0].device, pair[0].dtype, pair[0].shape[-1]].append(pair)
            count += 1
    for pairs in groups.values():
        weights, limits = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        parts = _cut(weights, limits).split([len(weight) for weight, _ in pairs])
        for (weight, _), part in zip(pairs, parts, strict=True):
            weight.copy_(part)
    return count


@torch.no_grad()
def bound_(weight: Tensor, bound: float | None, bounded_heads: int | None) -> None:
    """Cut one layer's W ``[heads, V, V]``, sharded or not, in place."""
    pair = _local(weight, bound, bounded_heads)
    if pair is not None:
        pair[0].copy_(_cut(*pair))


def _cut(weights: Tensor, limits: Tensor) -> Tensor:
    return torch.where(limits.isinf()[:, None, None], weights, bounded(weights, limits))


def head_bounds(
    heads: int, bound: float | None, bounded_heads: int | None, device: torch.device | None = None
) -> Tensor | None:
    """The bound of each head, infinity for free ones, ``[heads]``; None where no bound is given.

    Raises:
        ValueError: for a bound that is not above 0, a number of heads that there is not, or heads without a bound.
    """
    if bound is None:
        if bounded_heads is not None:
            raise ValueError(f"bounded_heads {bounded_heads}: expected a state_weight_bound with it, such as 0.9")
        return None
    if not 0 < bound < float("inf"):
        raise ValueError(f"state_weight_bound {bound}: expected a number above 0, such as 0.9, or None")
    if bounded_heads is not None and not 0 <= bounded_heads <= heads:
        raise ValueError(f"bounded_heads {bounded_heads}: expected 0 to the number of heads of W, which is {heads}")
    # In float64, since float32's 0.9 is another number; made on the device, since a copy would wait for it.
    dtype = torch.float32 if device is not None and device.type == "mps" else torch.float64  # which mps lacks
    limits = torch.full((heads,), float("inf"), dtype=dtype, device=device)
    limits[: heads if bounded_heads is None else bounded_heads] = bound
    return limits


def _layers(model: nn.Module) -> Iterator[Any]:
    from m2rnn.layers.m2rnn import M2RNN  # which imports this file

    return (module for module in model.modules() if isinstance(module, M2RNN))


def _local(weight: Tensor, bound: float | None, bounded_heads: int | None) -> tuple[Tensor, Tensor] | None:
    """The heads that this process holds, and their bounds; None if no head has one."""
    limits = head_bounds(weight.shape[0], bound, bounded_heads, weight.device)
    if limits is None:
        return None
    weight = weight.detach()
    if not isinstance(weight, DTensor):
        return weight, limits
    shared = distribute_tensor(limits, weight.device_mesh, weight.placements, src_data_rank=None)
    return weight.to_local(), shared.to_local()
