"""Mixers and feed-forward layers, each usable on its own.

Every mixer is a module with one contract, ``forward(hidden, state, packing) -> (hidden, state)``: tokens
``[B, T, hidden_size]``, or several sequences packed in one row; its state is a named tuple of batch-first
tensors. ``m2rnn.layers.moe`` is imported by its own name, since it needs transformers.
"""

from m2rnn.layers.attention import Attention
from m2rnn.layers.decay_gate import DecayGate
from m2rnn.layers.gated_deltanet import GatedDeltaNet
from m2rnn.layers.gru import GRU
from m2rnn.layers.m2rnn import M2RNN
from m2rnn.layers.mamba2 import Mamba2
from m2rnn.layers.mlp import SwiGLU
from m2rnn.layers.packing import Packing
from m2rnn.layers.projection import OutputProjection
from m2rnn.layers.rnn import RNN
from m2rnn.layers.short_conv import ShortConv
from m2rnn.layers.state import M2RNNState
from m2rnn.layers.state_weight import bound_state_weights

__all__ = [
    "GRU",
    "M2RNN",
    "RNN",
    "Attention",
    "DecayGate",
    "GatedDeltaNet",
    "M2RNNState",
    "Mamba2",
    "OutputProjection",
    "Packing",
    "ShortConv",
    "SwiGLU",
    "bound_state_weights",
]
