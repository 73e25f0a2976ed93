"""The configuration of a model: which mixer and which MLP each layer has, and their options."""

import functools
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig

from m2rnn.layers import GRU, M2RNN, RNN, Attention, GatedDeltaNet, Mamba2, SwiGLU
from m2rnn.layers.moe import MoE
from m2rnn.models.shim import with_own_entries, write_shim

MIXERS: dict[str, type[nn.Module]] = {
    "m2rnn": M2RNN,
    "attention": Attention,
    "gru": GRU,
    "rnn": RNN,
    "gated_deltanet": GatedDeltaNet,
    "mamba2": Mamba2,
}
MLPS: dict[str, type[nn.Module] | None] = {"swiglu": SwiGLU, "moe": MoE, "none": None}


@functools.cache
def _layer(kind: str, name: str, hidden_size: int, options: str) -> Any:
    """A layer with these options, as JSON, without memory for its weights; None if it refuses them."""
    layers: dict[str, Any] = MIXERS if kind == "mixer" else MLPS
    try:
        with torch.device("meta"):
            return layers[name](hidden_size, **json.loads(options))
    except (KeyError, TypeError, ValueError):  # building the model says why
        return None


def _derived(name: str, find: Callable[["M2RNNConfig"], Any], doc: str) -> Any:
    """A field that follows from the others: absent where ``find`` gives None, and never another value."""

    def get(config: "M2RNNConfig") -> Any:
        value = find(config)
        if value is None:
            raise AttributeError(f"this M2RNNConfig has no {name}: its layers have nothing that it could truly name")
        return value

    def set_(config: "M2RNNConfig", value: Any) -> None:
        if value != find(config):
            raise ValueError(
                f"{name} follows from mixers, mlps and their options, which make it {find(config)}, got {value!r}: "
                "change those and leave this out"
            )

    return property(get, set_, doc=doc)


def _attention(attribute: str) -> Callable[["M2RNNConfig"], Any]:
    return lambda config: getattr(config.layer_of("mixer", "attention"), attribute, None)


def _experts(attribute: str) -> Callable[["M2RNNConfig"], Any]:
    def find(config: "M2RNNConfig") -> Any:
        layer = config.layer_of("mlp", "moe")
        return getattr(layer, attribute, getattr(getattr(layer, "experts", None), attribute, None))

    return find


def _layer_types(config: "M2RNNConfig") -> list[str]:
    attention = "full_attention" if _attention("window")(config) is None else "sliding_attention"
    return [attention if mixer == "attention" else "linear_attention" for mixer in config.mixers]


def _num_heads(config: "M2RNNConfig") -> int | None:
    counts = {getattr(config.layer_of("mixer", name), "num_heads", None) for name in config.mixers}
    return counts.pop() if len(counts) == 1 else None


def _intermediate_size(config: "M2RNNConfig") -> int | None:
    layer = config.layer_of("mlp", "swiglu")
    return None if layer is None else layer.out_proj.in_features


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
            training; 0 without experts.
        output_router_logits: whether the model returns the routers' logits by default; None without experts.
        tie_word_embeddings: one matrix for embedding and head.
        use_cache: whether the model returns its states by default when not training.

    Other libraries read some facts by names of their own. ``DERIVED`` lists those that follow from the layers: they are
    in ``to_dict()`` and config.json, cannot be set to anything else, and are absent where a model has no such thing.
    There is no ``max_position_embeddings``, since no layer limits the length. ``auto_map`` names the file that
    ``save_pretrained`` writes beside config.json, through which ``trust_remote_code=True`` loads the model.

    Raises:
        ValueError: for an unknown name or option, naming it and the known ones; for a derived field with a value that
            is not the layers'.
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
    output_router_logits: bool | None = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    auto_map: dict[str, Any] | None = None

    DERIVED: ClassVar[tuple[str, ...]] = (
        "layer_types",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "num_heads",
        "intermediate_size",
        "num_experts",
        "num_experts_per_tok",
    )
    layer_types = _derived("layer_types", _layer_types, "Each layer's mixer in transformers' words.")
    num_attention_heads = _derived("num_attention_heads", _attention("num_heads"), "Query heads of attention layers.")
    num_key_value_heads = _derived("num_key_value_heads", _attention("num_kv_heads"), "Their key and value heads.")
    head_dim = _derived("head_dim", _attention("head_dim"), "Their heads' dimension.")
    sliding_window = _derived("sliding_window", _attention("window"), "The window of attention layers.")
    num_heads = _derived("num_heads", _num_heads, "Heads of every mixer, where all have the same number.")
    intermediate_size = _derived("intermediate_size", _intermediate_size, "Width of the SwiGLU layers.")
    num_experts = _derived("num_experts", _experts("num_experts"), "Experts of a mixture.")
    num_experts_per_tok = _derived("num_experts_per_tok", _experts("num_experts_per_tok"), "How many a token takes.")

    def __post_init__(self, **kwargs: Any) -> None:
        self.mlps = self.mlps or ["swiglu"] * len(self.mixers)
        self.check_layers()
        if "moe" in self.mlps:
            self.output_router_logits = bool(self.output_router_logits)
        else:  # otherwise other libraries take the model for a mixture and look for its experts
            self.output_router_logits, self.router_aux_loss_coef = None, 0.0
        self.auto_map = with_own_entries(self.auto_map)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def check_layers(self) -> None:
        """Raise the ValueErrors of the class for what the fields say now: they may have been changed since."""
        if not self.mixers or len(self.mixers) != len(self.mlps):
            raise ValueError(
                f"mixers and mlps must name the same layers, got {len(self.mixers)} mixers and {len(self.mlps)} mlps"
            )
        _check_layers("mixer", self.mixers, self.mixer_options, MIXERS)
        _check_layers("mlp", self.mlps, self.mlp_options, MLPS)

    def layer_of(self, kind: str, name: str) -> Any:
        """A layer of the model without memory for its weights, to ask for sizes: None if it has none of this name.

        Args:
            kind: "mixer" or "mlp".
            name: as in ``mixers`` or ``mlps``.
        """
        names, options = (self.mixers, self.mixer_options) if kind == "mixer" else (self.mlps, self.mlp_options)
        if name not in names:
            return None
        return _layer(kind, name, self.hidden_size, json.dumps(options.get(name, {}), sort_keys=True, default=repr))

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with the derived fields."""
        fields: dict[str, Any] = super().to_dict()
        return fields | {name: getattr(self, name) for name in self.DERIVED if hasattr(self, name)}

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """As in transformers, and beside the file the one that ``auto_map`` names."""
        super().to_json_file(json_file_path, use_diff)
        write_shim(Path(json_file_path).parent, self.auto_map)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing for this class, which ``auto_map`` names already: transformers would copy our files when it saves."""
        if cls is not M2RNNConfig:
            super().register_for_auto_class(auto_class)  # type: ignore[no-untyped-call]

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
