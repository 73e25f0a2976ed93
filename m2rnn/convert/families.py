"""Where transformers' hybrid models keep their mixers, and an M2RNN layer that can stand in for one."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from m2rnn.layers import M2RNN, M2RNNState, Packing

#: An empty tensor of a swapped layer. Its shape makes it an error to load the layer as what the family has there: where
#: nobody reads the record of the swap, as in the family's own from_pretrained, that would start anew with a warning.
GUARD = "A_log"
RECURRENT, ATTENTION = "linear_attention", "full_attention"  # as transformers names the types of layers


@dataclass(frozen=True)
class Family:
    """Attributes of a decoder layer: where its recurrent mixer is, and where its attention."""

    recurrent: str
    attention: str


#: by the ``model_type`` of the configuration of the text part
FAMILIES = {
    "qwen3_next": Family("linear_attn", "self_attn"),
    "qwen3_5_text": Family("linear_attn", "self_attn"),
    "qwen3_5_moe_text": Family("linear_attn", "self_attn"),
    "granitemoehybrid": Family("mamba", "self_attn"),
    "bamba": Family("mamba", "self_attn"),
    "nemotron_h": Family("mixer", "mixer"),
}


class SwappedMixer(nn.Module):
    """An ``M2RNN`` layer that is called as these families call their recurrent mixers, its state in the model's cache.

    Padding (a mask ``[B, T]``) and packing (``cu_seq_lens_q`` or ``seq_idx``) give each sequence's own results exactly;
    outputs at padding are zero. After a packed row, the cache holds the state of its last sequence.
    """

    def __init__(self, m2rnn: M2RNN, layer_idx: int) -> None:
        super().__init__()
        self.m2rnn, self.layer_idx = m2rnn, layer_idx
        self.register_buffer(GUARD, torch.empty(0))
        self.train(m2rnn.training)

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``[B, T, hidden_size]`` to the same; other arguments of the families are not needed."""
        cache_params = cache_params if cache is None else cache  # its name since transformers 5.24
        state = None if cache_params is None else self._read(cache_params)
        if cu_seq_lens_q is None and seq_idx is not None:
            starts = (seq_idx.diff(dim=1)[0] != 0).nonzero().squeeze(1) + 1
            cu_seq_lens_q = nn.functional.pad(nn.functional.pad(starts, (1, 0)), (0, 1), value=seq_idx.shape[1])
        padded = packed = None
        if cu_seq_lens_q is not None:
            if hidden_states.shape[0] != 1:
                raise ValueError(f"cu_seq_lens_q packs sequences in one row, got a batch of {hidden_states.shape[0]}")
            packed = Packing.from_cu_seqlens(cu_seq_lens_q, hidden_states.shape[1])
            if state is not None:  # it belongs to the first sequence
                state = M2RNNState(*(None if x is None else _first_of(x, packed.rows) for x in state))  # type: ignore[arg-type]
        elif attention_mask is not None:
            padded = Packing.from_mask(attention_mask)
            packed, hidden_states = padded.aligned, padded.pack(hidden_states)
        y, state = self.m2rnn(hidden_states, state, packed, output_state=cache_params is not None)
        if cache_params is not None:
            assert state is not None
            if padded is None and packed is not None:
                state = M2RNNState(*(None if x is None else x[-1:] for x in state))  # type: ignore[arg-type]
            self._write(cache_params, state)
        return y if padded is None else padded.pad(y)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + GUARD, getattr(self, GUARD))  # older files have none
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _read(self, cache: Cache) -> M2RNNState | None:
        recurrent = cache.get_recurrent_state(self.layer_idx)
        if recurrent is None:
            return None
        conv = cache.get_conv_state(self.layer_idx)
        if self.m2rnn.conv is None or conv is None:
            return M2RNNState(recurrent, None)
        if self.m2rnn.conv.width == 1:  # no past inputs: what the cache holds only marks it as filled
            return M2RNNState(recurrent, conv.new_zeros(conv.shape[0], 0, self.m2rnn.conv.weight.shape[0]))
        return M2RNNState(recurrent, conv[..., 1 - self.m2rnn.conv.width :].transpose(1, 2))

    def _write(self, cache: Cache, state: M2RNNState) -> None:
        conv = state.conv
        if conv is None or not conv.shape[1]:  # only with some convolution does the cache count as filled
            conv = state.recurrent.new_zeros(state.recurrent.shape[0], 1, 1)
        cache.update_conv_state(conv.transpose(1, 2), self.layer_idx)  # channels before time
        cache.update_recurrent_state(state.recurrent, self.layer_idx)


def _first_of(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_zeros(rows - 1, *x.shape[1:])])


def text_config_of(model: PreTrainedModel) -> PreTrainedConfig:
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    return config


def family_of(model: PreTrainedModel) -> Family:
    kind = text_config_of(model).model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"swap does not know models of type {kind!r}, only {', '.join(FAMILIES)}: replace the mixer by hand, "
            "m2rnn.M2RNN is an ordinary module"
        )
    if not hasattr(Cache, "get_recurrent_state"):
        raise ValueError(f"swap needs transformers 5.23 or newer, this is {transformers.__version__}: update it")
    return FAMILIES[kind]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, wherever the model keeps them."""
    decoder = model if hasattr(model, "layers") else model.get_decoder()
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def mixer_of(model: PreTrainedModel, layer: int) -> nn.Module:
    """The mixer of a layer.

    Raises:
        ValueError: for a layer that there is not, or that has no mixer, saying which have one.
    """
    family, kinds = family_of(model), text_config_of(model).layer_types
    mixers = [i for i, kind in enumerate(kinds) if kind in (RECURRENT, ATTENTION)]
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(kinds):
        raise ValueError(f"layers must be from 0 to {len(kinds) - 1} (the model's last), got {layer!r}")
    if layer not in mixers:
        raise ValueError(
            f"layer {layer} is of type {kinds[layer]!r} and has no mixer to replace; those that do: {mixers}"
        )
    name = family.recurrent if kinds[layer] == RECURRENT else family.attention
    mixer = getattr(decoder_layers(model)[layer], name)
    assert isinstance(mixer, nn.Module)
    return mixer


def put_mixer(model: PreTrainedModel, layer: int, mixer: SwappedMixer) -> None:
    """Put ``mixer`` in the layer's place for recurrent ones; the configuration, and so the cache, follow."""
    family, config, block = family_of(model), text_config_of(model), decoder_layers(model)[layer]
    if config.layer_types[layer] == ATTENTION:
        if family.attention != family.recurrent:
            delattr(block, family.attention)
        if config.model_type == "bamba":  # its layer types follow from this list
            config.attn_layer_indices = [i for i in config.attn_layer_indices if i != layer]
        else:
            config.layer_types = [RECURRENT if i == layer else kind for i, kind in enumerate(config.layer_types)]
        block.block_type = RECURRENT  # type: ignore[assignment]
    setattr(block, family.recurrent, mixer)
