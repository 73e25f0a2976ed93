"""How large a model is: parameters, state, and the work of training, without making its weights."""

from collections import Counter
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from m2rnn.layers import M2RNN, RNN, Attention, GatedDeltaNet, Mamba2
from m2rnn.layers.moe import MoE
from m2rnn.models.config import M2RNNConfig
from m2rnn.models.model import M2RNNForCausalLM


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model.

    Attributes:
        parameters: all of them.
        active: without the experts that a token does not take.
        non_embedding: all without the embedding and the head.
        per_layer: parameters of one layer's mixer and MLP, by their names, without the RMSNorm before each.
        state_per_layer: for each recurrent mixer of the model, the numbers of one layer's recurrent state, which one
            sequence keeps whatever its length; without the last inputs of the convolution.
        conv_per_layer: likewise those last inputs, for the mixers that have a convolution.
        state: numbers of the recurrent states of all layers.
        kv_cache: numbers that the attention layers together keep for each token.
        context: length of the sequences that the next number assumes.
        training_flops: floating-point operations of a forward and backward pass, per token: three times those of the
            forward pass, which are 2 for each active parameter (but the embedding, and once for W of M2RNN, below), and
            those of mixing. A multiplication and an addition count as two. Recomputation does not count, nor does tanh.
            Mixing is, for a token and layer with S state numbers,

            - attention: 2 (context + 1) · heads · head_dim, the average over causal positions; with a window w shorter
              than the context, 2 (2 w - w (w - 1) / context) · heads · head_dim, rounded down;
            - m2rnn: S (2V + 7) less 2 for each element of W;
            - gated_deltanet: S (3 + 4n) with n Householder factors, as a recurrence;
            - mamba2: 5 S, as a recurrence;
            - gru, rnn: nothing beyond their matrices.
    """

    parameters: int
    active: int
    non_embedding: int
    per_layer: dict[str, int]
    state_per_layer: dict[str, int]
    conv_per_layer: dict[str, int]
    state: int
    kv_cache: int
    context: int
    training_flops: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def size_of(config: M2RNNConfig, context: int = 4096) -> ModelSize:
    """The sizes of a configuration's model, of which one layer of each kind is built on the meta device.

    Args:
        config: of the model.
        context: length of training sequences, for the work of attention.

    Raises:
        ValueError: for a context below 1.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1, got {context}")
    layers = Counter(zip(config.mixers, config.mlps, strict=True))
    sample = copy(config)  # one layer of each kind
    sample.mixers, sample.mlps = (list(names) for names in zip(*layers, strict=True))
    with torch.device("meta"):
        model = M2RNNForCausalLM(sample)
    blocks = model.model.layers
    total = model.num_parameters()
    idle = 0
    for block, count in zip(blocks, layers.values(), strict=True):
        total += (count - 1) * _count(block)
        idle += count * sum(_idle(module) for module in block.modules() if isinstance(module, MoE))
    vocabulary = config.vocab_size * config.hidden_size
    tables = 1 if config.tie_word_embeddings else 2

    mixers = {name: blocks[sample.mixers.index(name)].mixer for name in dict.fromkeys(config.mixers)}
    mlps = {name: blocks[sample.mlps.index(name)].mlp for name in dict.fromkeys(config.mlps) if name != "none"}
    per_layer = {name: _count(module) for name, module in (mixers | mlps).items()}
    state_per_layer: dict[str, int] = {}
    conv_per_layer: dict[str, int] = {}
    state = kv_cache = mixing = 0
    for name, mixer in mixers.items():
        count = config.mixers.count(name)
        kept = state_after_one_token(mixer, config.hidden_size)
        if "recurrent" in kept:
            state_per_layer[name] = kept["recurrent"]
        if "conv" in kept:
            conv_per_layer[name] = kept["conv"]
        state += count * kept.get("recurrent", 0)
        kv_cache += count * (kept.get("keys", 0) + kept.get("values", 0))
        mixing += count * _mixing_flops(mixer, kept.get("recurrent", 0), context)

    worked = total - idle - tables * vocabulary + vocabulary  # the head works, the embedding is looked up
    return ModelSize(
        parameters=total,
        active=total - idle,
        non_embedding=total - tables * vocabulary,
        per_layer=per_layer,
        state_per_layer=state_per_layer,
        conv_per_layer=conv_per_layer,
        state=state,
        kv_cache=kv_cache,
        context=context,
        training_flops=3 * (2 * worked + mixing),
    )


def state_after_one_token(mixer: nn.Module, hidden_size: int) -> dict[str, int]:
    """How many numbers each part of a mixer's state holds after one token of one sequence, by its name."""
    weight = next(mixer.parameters())
    _, state = mixer(torch.empty(1, 1, hidden_size, device=weight.device, dtype=weight.dtype))
    return {name: part.numel() for name, part in state._asdict().items() if part is not None}


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _idle(moe: MoE) -> int:
    """Parameters of the experts that a token does not take."""
    experts = _count(moe.experts)
    return experts - experts * moe.num_experts_per_tok // moe.experts.num_experts


def _mixing_flops(mixer: nn.Module, state: int, context: int) -> int:
    """Of one token in the forward pass, beyond 2 for each parameter."""
    match mixer:
        case Attention():
            seen = context if mixer.window is None else min(context, mixer.window)
            pairs_twice = 2 * context * seen - seen * (seen - 1)  # the first tokens see fewer
            return 2 * mixer.num_heads * mixer.head_dim * pairs_twice // context
        case M2RNN():
            return state * (2 * mixer.value_dim + 7) - 2 * mixer.state_weight.numel()
        case GatedDeltaNet():
            return state * (3 + 4 * mixer.num_householder)
        case Mamba2():
            return 5 * state
        case RNN():
            return 0
    raise AssertionError(type(mixer))
