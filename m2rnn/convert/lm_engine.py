"""lm-engine's configuration (model_type ``gpt_base``) and this library's, each from the other.

What the fields mean: open-lm-engine/lm-engine on GitHub.
"""

import inspect
import math
from typing import Any

import torch

from m2rnn.layers import M2RNN, Attention, SwiGLU
from m2rnn.models import M2RNNConfig
from m2rnn.models.config import MLPS

MODEL_TYPE = "gpt_base"
INVERSE_SQRT = "1 / sqrt(head_dim)"
MIXER_NORM_EPS = 1e-5  # lm-engine's mixers do not take the configuration's epsilon
LARGEST_PAPER_CONTEXT = 4096

#: Fields of ``M2RNNConfig`` that say what the model is, under both names where they are the same thing.
SAME_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layer_norm_epsilon": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
OUR_FIELDS = (*SAME_FIELDS.values(), "mixers", "mixer_options", "mlps", "mlp_options")
M2RNN_FIELDS = {
    "k_head_dim": "key_dim",
    "v_head_dim": "value_dim",
    "num_q_heads": "num_q_heads",
    "num_k_heads": "num_k_heads",
    "num_v_heads": "num_v_heads",
    "num_f_heads": "num_f_heads",
    "num_weight_heads": "num_weight_heads",
    "num_g_heads": "num_g_heads",
    "use_residual": "residual",
    "kernel_size": "conv_size",
    "gradient_clipping": "state_clip",
}
MOE_FIELDS = ("num_experts", "num_experts_per_tok", "intermediate_size", "shared_intermediate_size")


class ConversionError(ValueError):
    """The checkpoint cannot be converted: the message names the field or tensor, and what to do."""


class _Fields:
    """A part of lm-engine's configuration that must be understood whole: reads fields and reports those left over."""

    def __init__(self, where: str, fields: dict[str, Any]) -> None:
        if not isinstance(fields, dict):
            raise ConversionError(f"{where} must be an object in config.json, got {fields!r}")
        self.where, self.fields, self.left = where, fields, set(fields)

    def get(self, name: str, *default: Any) -> Any:
        self.left.discard(name)
        if name not in self.fields and not default:
            raise ConversionError(f"{self.where} has no {name!r} in config.json")
        return self.fields.get(name, *default)

    def number(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConversionError(f"{self.where}: {name} must be a positive whole number, got {value!r}")
        return value

    def real(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConversionError(f"{self.where}: {name} must be a number, got {value!r}")
        return float(value)

    def only(self, name: str, *known: Any, default: Any = None) -> Any:
        value = self.get(name, default)
        if value not in known:
            raise ConversionError(
                f"{self.where}: {name} = {value!r} has no counterpart in this library, "
                f"which knows {' and '.join(map(repr, known))}"
            )
        return value

    def finish(self) -> None:
        for name in sorted(self.left):
            if self.fields[name] not in (None, False, 0):
                raise ConversionError(
                    f"{self.where}: unknown field {name!r} = {self.fields[name]!r} in config.json; "
                    "it may change what the model computes"
                )


def config_to_ours(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``M2RNNConfig`` for lm-engine's config.json.

    Raises:
        ConversionError: for a field that is missing or means something that this library's layers do not compute,
            naming it and, where there is one, its layer.
    """
    top = _Fields("the model", config)
    top.only("model_type", MODEL_TYPE)
    top.only("normalization_function", "rmsnorm", default="layernorm")
    for name in ("m_emb", "m_width", "m_residual"):
        top.only(name, None, 1)
    top.only("embedding_dropout", 0, default=0)
    top.only("rope_scaling", None)
    rotary = top.only("position_embedding_type", "nope", "rope", default="learned_absolute") == "rope"
    rope_theta = top.real("rope_theta", 10000) if rotary else None
    rope_dim = top.get("rope_dim", None) if rotary else None

    mixer_blocks, mlp_blocks = top.get("sequence_mixer_blocks"), top.get("mlp_blocks")
    layers = top.number("num_layers")
    for name, blocks in (("sequence_mixer_blocks", mixer_blocks), ("mlp_blocks", mlp_blocks)):
        if not isinstance(blocks, list) or len(blocks) != layers:
            got = f"{len(blocks)} entries" if isinstance(blocks, list) else repr(blocks)
            raise ConversionError(f"config.json: {name} must list num_layers = {layers} blocks, got {got}")

    hidden_size = top.number("hidden_size")
    top.number("vocab_size")  # taken as it is below
    mixers: list[tuple[str, dict[str, Any]]] = []
    mlps: list[tuple[str, dict[str, Any]]] = []
    for layer, (mixer, mlp) in enumerate(zip(mixer_blocks, mlp_blocks, strict=True)):
        block = _Fields(f"layer {layer}, sequence_mixer_blocks", mixer)
        match kind := block.get("sequence_mixer_type"):
            case "m2rnn":
                mixers.append((kind, _m2rnn_to_ours(block)))
            case "softmax_attention":
                mixers.append(("attention", _attention_to_ours(block, hidden_size, rope_theta, rope_dim)))
            case _:
                raise ConversionError(
                    f"layer {layer}: sequence_mixer_type {kind!r} cannot be converted, only 'm2rnn' and "
                    "'softmax_attention': the tensor layout of the others is not known here"
                )
        block.finish()
        block = _Fields(f"layer {layer}, mlp_blocks", mlp)
        mlps.append(_mlp_to_ours(block))
        block.finish()
    fields = {ours: config[theirs] for theirs, ours in SAME_FIELDS.items() if theirs in config}
    fields["tie_word_embeddings"] = config.get("tie_word_embeddings", True)
    fields["rms_norm_eps"] = top.real("layer_norm_epsilon", 1e-5)
    fields |= {"mixers": [name for name, _ in mixers], "mixer_options": _one_set_each("sequence_mixer", mixers)}
    return fields | {"mlps": [name for name, _ in mlps], "mlp_options": _one_set_each("mlp", mlps)}


def _m2rnn_to_ours(block: _Fields) -> dict[str, Any]:
    options = {ours: block.get(theirs) for theirs, ours in M2RNN_FIELDS.items()}
    for name in ("k_head_dim", "v_head_dim", *(f"num_{name}_heads" for name in ("q", "k", "v", "f", "weight"))):
        block.number(name)
    if options["conv_size"] is not None:
        block.number("kernel_size")
    heads = max(options[f"num_{name}_heads"] for name in ("q", "k", "v", "f", "weight"))
    for name in ("num_f_heads", "num_g_heads"):
        if options[name] != heads:
            raise ConversionError(
                f"{block.where}: {name} = {options[name]} where the layer has {heads} heads; lm-engine shares "
                "these between heads in another way than this library, only equal counts can be converted"
            )
    block.only("add_bias", False, default=False)
    norm = block.only("normalization_function", "rmsnorm", None) is not None
    activation = "silu" if block.only("activation_function", "silu", "swish", None) else None
    ranges = {
        "A_range": [block.real("A_init_min", 0), block.real("A_init_max", 16)],
        "dt_range": [block.real("dt_init_min", 0.001), block.real("dt_init_max", 0.1)],
        "dt_floor": block.real("dt_init_floor", 1e-4),
    }
    return {"num_heads": heads, **options, "activation": activation, "norm": norm, **ranges}


def _attention_to_ours(
    block: _Fields, hidden_size: int, rope_theta: float | None, rope_dim: int | None
) -> dict[str, Any]:
    heads, kv_heads = block.number("num_attention_heads"), block.number("num_key_value_heads")
    head_dim = hidden_size // heads if block.get("head_dim", None) is None else block.number("head_dim")
    if head_dim * heads != hidden_size and block.fields.get("head_dim") is None:
        raise ConversionError(f"{block.where}: num_attention_heads = {heads} must divide hidden_size = {hidden_size}")
    if rope_dim not in (None, head_dim):
        raise ConversionError(f"{block.where}: rope_dim = {rope_dim} must be the head dimension ({head_dim}) or null")
    scale = block.get("attention_multiplier", None)
    if scale is None:
        block.only("attention_multiplier_method", None, INVERSE_SQRT)
    elif block.get("attention_multiplier_method", None) or not math.isclose(scale, head_dim**-0.5, rel_tol=1e-7):
        raise ConversionError(
            f"{block.where}: attention_multiplier = {scale!r} must be null or 1/√head_dim = {head_dim**-0.5:.9g}"
        )
    for name in ("softmax_dropout", "dropout"):
        block.only(name, 0, default=0)
    for name in ("add_bias", "qkv_bias", "attention_gate", "exclusive_self_attention", "use_qk_norm"):
        block.only(name, False, None)
    block.only("sliding_window", None)
    return {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "rope_theta": rope_theta}


def _mlp_to_ours(block: _Fields) -> tuple[str, dict[str, Any]]:
    block.only("activation_function", "swiglu", default="gelu_pytorch_tanh")
    block.only("add_bias", False, default=False)
    block.only("dropout", 0, default=0)
    block.get("use_interleaved_weights", None)  # read by layouts()
    block.get("use_interleaved_weights_for_shared_experts", None)
    if block.only("mlp_type", "MLP", "MoE", default="MLP") == "MLP":
        return "swiglu", {"intermediate_size": block.number("intermediate_size")}
    block.only("shared_expert_gating", False, default=False)
    block.only("normalized_topk", True, default=True)
    return "moe", {name: block.get(name) for name in MOE_FIELDS}


def _one_set_each(kind: str, layers: list[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The options of each name, which must be the same in all of its layers, as ``M2RNNConfig`` has them."""
    sets: dict[str, dict[str, Any]] = {}
    first: dict[str, int] = {}
    for layer, (name, options) in enumerate(layers):
        known = sets.setdefault(name, options)
        first.setdefault(name, layer)
        for option, value in options.items():
            if value != known[option]:
                raise ConversionError(
                    f"layer {layer}, {kind}_blocks: {name} with {option} = {value!r}, but {known[option]!r} in layer "
                    f"{first[name]}; this library's models give all layers of one kind the same options"
                )
    return sets


def config_to_theirs(config: M2RNNConfig, older: bool = False) -> dict[str, Any]:
    """lm-engine's config.json for a model of this library; an ``older`` one says that MLPs are stored in halves.

    Raises:
        ConversionError: for a mixer, MLP or option that lm-engine has no counterpart for, naming it.
    """
    attention = attention_of(config) if "attention" in config.mixers else None
    rotary = attention is not None and attention.rope_theta is not None
    blocks = {"m2rnn": _m2rnn_to_theirs, "attention": _attention_to_theirs}
    for layer, (mixer, mlp) in enumerate(zip(config.mixers, config.mlps, strict=True)):
        if mixer not in blocks:
            raise ConversionError(f"layer {layer}: mixer {mixer!r} cannot be converted, only {', '.join(blocks)}")
        if mlp not in ("swiglu", "moe"):
            raise ConversionError(f"layer {layer}: mlp {mlp!r} has no counterpart in lm-engine, only swiglu and moe")
    mixers = {name: blocks[name](config) for name in set(config.mixers)}
    mlps = {name: _mlp_to_theirs(config, name) for name in set(config.mlps)}
    theirs = {
        "model_type": MODEL_TYPE,
        "architectures": ["GPTBaseForCausalLM"],
        "num_layers": len(config.mixers),
        "normalization_function": "rmsnorm",
        "position_embedding_type": "rope" if rotary else "nope",
        "rope_theta": attention.rope_theta if attention is not None and rotary else 10000,
        "rope_dim": attention.head_dim if attention is not None and rotary else None,
        "rope_scaling": None,
        "max_position_embeddings": LARGEST_PAPER_CONTEXT,
        "embedding_dropout": 0,
        "embedding_init_method": "normal",
        "init_method": "normal",
        "use_depth_scaled_init": True,
        "m_emb": None,
        "m_width": None,
        "m_residual": None,
        **{theirs: getattr(config, ours) for theirs, ours in SAME_FIELDS.items() if hasattr(config, ours)},
        "sequence_mixer_blocks": [dict(mixers[name]) for name in config.mixers],
        "mlp_blocks": [dict(mlps[name]) for name in config.mlps],
    }
    if older:
        del theirs["embedding_init_method"], theirs["use_depth_scaled_init"]
    return theirs


def _m2rnn_to_theirs(config: M2RNNConfig) -> dict[str, Any]:
    options = _defaults(M2RNN) | config.mixer_options.get("m2rnn", {})
    heads = options["num_heads"] or max(1, config.hidden_size // options["value_dim"])
    for name in ("v", "f", "weight", "g"):
        options[f"num_{name}_heads"] = options[f"num_{name}_heads"] or heads
    for name, known, why in (
        ("gate", True, "its layer always has the output gate"),
        ("norm_before_gate", False, "its layer gates before it norms"),
        ("norm_eps", MIXER_NORM_EPS, "its mixers' norm has this epsilon"),
    ):
        if options[name] != known:
            raise ConversionError(f"m2rnn with {name} = {options[name]!r} has no counterpart in lm-engine: {why}")
    if options["conv_size"] is None and options["activation"] is not None:
        raise ConversionError("m2rnn with an activation but no convolution has no counterpart in lm-engine")
    block = {theirs: options[ours] for theirs, ours in M2RNN_FIELDS.items()}
    block |= {
        "sequence_mixer_type": "m2rnn",
        "activation_function": options["activation"],
        "normalization_function": "rmsnorm" if options["norm"] else None,
        "add_bias": False,
        "A_init_min": options["A_range"][0],
        "A_init_max": options["A_range"][1],
        "dt_init_min": options["dt_range"][0],
        "dt_init_max": options["dt_range"][1],
        "dt_init_floor": options["dt_floor"],
    }
    _m2rnn_to_ours(_Fields("m2rnn", block))  # refuses what lm-engine computes in another way
    return block


def attention_of(config: M2RNNConfig) -> Attention:
    """An attention layer of the model, without memory for its weights."""
    with torch.device("meta"):
        return Attention(config.hidden_size, **config.mixer_options.get("attention", {}))


def _attention_to_theirs(config: M2RNNConfig) -> dict[str, Any]:
    options = _defaults(Attention) | config.mixer_options.get("attention", {})
    for name, known, why in (
        ("qk_norm", False, "its attention has no norm of queries and keys"),
        ("window", None, "only attention to all earlier tokens can be converted"),
    ):
        if options[name] != known:
            raise ConversionError(f"attention with {name} = {options[name]!r} has no counterpart in lm-engine: {why}")
    attention = attention_of(config)
    return {
        "sequence_mixer_type": "softmax_attention",
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "add_bias": False,
        "softmax_dropout": 0,
        "dropout": 0,
        "attention_gate": False,
        "exclusive_self_attention": False,
        "sliding_window": None,
        "attention_multiplier": None,
        "attention_multiplier_method": INVERSE_SQRT,
    }


def _mlp_to_theirs(config: M2RNNConfig, name: str) -> dict[str, Any]:
    options = mlp_options_of(config, name)
    block = {"activation_function": "swiglu", "add_bias": False, "dropout": 0}
    if name == "swiglu":
        return {"mlp_type": "MLP", **block, "intermediate_size": options["intermediate_size"]}
    block |= {key: options[key] for key in MOE_FIELDS}
    return {"mlp_type": "MoE", **block, "shared_expert_gating": False, "normalized_topk": True}


def mlp_options_of(config: M2RNNConfig, name: str) -> dict[str, Any]:
    """The options of an MLP with its defaults filled in."""
    mlp_class = MLPS[name]
    assert mlp_class is not None
    options = _defaults(mlp_class) | config.mlp_options.get(name, {})
    if name == "swiglu" and options["intermediate_size"] is None:
        with torch.device("meta"):
            options["intermediate_size"] = SwiGLU(config.hidden_size).out_proj.in_features
    return options


def _defaults(layer: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(layer).parameters.items()}
