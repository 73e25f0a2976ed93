"""The configuration of a model: which mixer and which MLP each layer has, and their options."""

import inspect
from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig

from m2rnn.layers import GRU, M2RNN, RNN, Attention, GatedDeltaNet, Mamba2, SwiGLU
from m2rnn.layers.moe import MoE

MIXERS: dict[str, type[nn.Module]] = {
    "m2rnn": M2RNN,
    "attention": Attention,
    "gru": GRU,
    "rnn": RNN,
    "gated_deltanet": GatedDeltaNet,
    "mamba2": Mamba2,
}
MLPS: dict[str, type[nn.Module] | None] = {"swiglu": SwiGLU, "moe": MoE, "none": None}


@strict
class M2RNNConfig(PreTrainedConfig):
    r"""A stack of layers, each ``x + mixer(norm(x))`` and then ``x + mlp(norm(x))``.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        mixers: one name per layer: a key of ``MIXERS``, such as ``"m2rnn"`` or ``"attention"``.
        mlps: one name per layer, ``"swiglu"``, ``"moe"`` or ``"none"``; default ``"swiglu"`` everywhere.
        mixer_options: for a mixer's name, the arguments of its class besides ``hidden_size``, e.g.
            ``{"m2rnn": {"num_heads": 84}, "attention": {"num_heads": 16, "rope_theta": 10000.0}}``.
        mlp_options: likewise, e.g. ``{"swiglu": {"intermediate_size": 2752}}``.
        rms_norm_eps: epsilon of the blocks' and the final RMSNorm.
        initializer_range: standard deviation of the embedding and of linear layers at the start; output
            projections take it divided by √(2 · layers).
        embedding_range: standard deviation of the embedding at the start; default ``initializer_range``.
        router_aux_loss_coef: weight of the mixtures of experts' auxiliary losses, summed over layers, in the loss of
            training.
        output_router_logits: whether the model returns the routers' logits by default.
        tie_word_embeddings: one matrix for embedding and head.
        use_cache: whether the model returns its states by default when not training.

    Raises:
        ValueError: for an unknown name or option, naming it and the known ones.
    """

    model_type = "m2rnn"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 256
    mixers: list[str] = field(default_factory=lambda: ["m2rnn"] * 4)
    mlps: list[str] = field(default_factory=list)
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    mlp_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    rms_norm_eps: float = 1e-5
    initializer_range: int | float = 0.02  # an int too: JSON and people write 0 and 1
    embedding_range: int | float | None = None
    router_aux_loss_coef: int | float = 0.001
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.mlps = self.mlps or ["swiglu"] * len(self.mixers)
        self.check_layers()
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def check_layers(self) -> None:
        """Raise the ValueErrors of the class for what the fields say now: they may have been changed since."""
        if not self.mixers or len(self.mixers) != len(self.mlps):
            raise ValueError(
                f"mixers and mlps must name the same layers, got {len(self.mixers)} mixers and {len(self.mlps)} mlps"
            )
        _check_layers("mixer", self.mixers, self.mixer_options, MIXERS)
        _check_layers("mlp", self.mlps, self.mlp_options, MLPS)

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers, which is the length of ``mixers``."""
        return len(self.mixers)

    @num_hidden_layers.setter
    def num_hidden_layers(self, layers: int) -> None:  # as other models' configurations name it
        if layers != len(self.mixers):
            raise ValueError(
                f"num_hidden_layers follows from mixers, which names {len(self.mixers)} layers, got {layers}: "
                'name the mixer of each layer, such as mixers=["m2rnn"] * 12'
            )


def _check_layers(kind: str, names: list[str], options: dict[str, dict[str, Any]], classes: dict[str, Any]) -> None:
    for name in [*names, *options]:
        if name not in classes:
            raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(classes)}")
    for name, given in options.items():
        known = [] if classes[name] is None else list(inspect.signature(classes[name]).parameters)[1:]
        for option in given:
            if option not in known:
                raise ValueError(f"{kind} {name!r} has no option {option!r}; known: {', '.join(known)}")
