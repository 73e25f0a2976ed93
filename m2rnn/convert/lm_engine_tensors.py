"""lm-engine's tensors and this library's: names, and the order of their rows.

lm-engine's checkpoints from before its configuration named ``embedding_init_method``, ``use_depth_scaled_init`` and
``tie_word_embeddings`` ("older" below) hold a gated MLP's rows in halves, up and then gate, unless flags in
``mlp_blocks`` say otherwise; newer ones interleave them, gate first (open-lm-engine/lm-engine on GitHub).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m2rnn.convert.lm_engine import attention_of, mlp_options_of
from m2rnn.layers import Attention
from m2rnn.models import M2RNNConfig

LAYOUTS = ("auto", "interleaved", "halves")
NEWER_KEYS = ("embedding_init_method", "use_depth_scaled_init", "tie_word_embeddings")


class Layout(NamedTuple):
    """Whether gate and up rows alternate (gate first), or lie in two halves, up and then gate.

    Attributes:
        mlp: of an MLP, or of the routed experts.
        shared: of the shared expert.
    """

    mlp: bool
    shared: bool


class TensorRule(NamedTuple):
    """One tensor under both names: ``ours = theirs.index_select(dim, rows)``, or the same where rows is None."""

    theirs: str
    ours: str
    rows: Tensor | None = None
    dim: int = 0

    def to_ours(self, theirs: Tensor) -> Tensor:
        return theirs if self.rows is None else theirs.index_select(self.dim, self.rows)

    def to_theirs(self, ours: Tensor) -> Tensor:
        return ours if self.rows is None else ours.index_select(self.dim, self.rows.argsort())


def layouts(config: dict[str, Any], mlp_layout: str = "auto") -> list[Layout]:
    """How each layer's gated MLPs are stored: as ``mlp_layout`` says, or else as lm-engine's config.json tells."""
    blocks = config["mlp_blocks"]
    if mlp_layout != "auto":
        return [Layout(mlp_layout == "interleaved", mlp_layout == "interleaved")] * len(blocks)
    older = any(key not in config for key in NEWER_KEYS)
    flags = ("use_interleaved_weights", "use_interleaved_weights_for_shared_experts")
    return [Layout(*(bool(block.get(flag, not older)) for flag in flags)) for block in blocks]


def tensor_rules(config: M2RNNConfig, layouts: Iterable[Layout]) -> list[TensorRule]:
    """Every tensor of the model under both names, in the order of the layers."""
    rules = [TensorRule("transformer.wte.weight", "model.embed_tokens.weight")]
    for layer, (mixer, mlp, layout) in enumerate(zip(config.mixers, config.mlps, layouts, strict=True)):
        block = [TensorRule("ln_1.weight", "mixer_norm.weight"), TensorRule("ln_2.weight", "mlp_norm.weight")]
        if mixer == "m2rnn":
            block += _m2rnn_rules(config.mixer_options.get("m2rnn", {}))
        else:
            block += _attention_rules(attention_of(config))
        options = mlp_options_of(config, mlp)
        block += _mlp_rules(options, layout) if mlp == "swiglu" else _moe_rules(options, layout)
        rules += [
            TensorRule(f"transformer.h.{layer}.{rule.theirs}", f"model.layers.{layer}.{rule.ours}", rule.rows, rule.dim)
            for rule in block
        ]
    rules.append(TensorRule("transformer.ln_f.weight", "model.norm.weight"))
    if not config.tie_word_embeddings:
        rules.append(TensorRule("lm_head.weight", "lm_head.weight"))
    return rules


def _m2rnn_rules(options: dict[str, Any]) -> list[TensorRule]:
    names = {
        "input_projection.weight": "in_proj.weight",
        "decay_gate.A_log": "decay_gate.A_log",
        "decay_gate.dt_bias": "decay_gate.dt_bias",
        "state_weight": "state_weight",
        "output_projection.weight": "out_proj.weight",
    }
    if options.get("conv_size", 4) is not None:
        names["conv1d.weight"] = "conv.weight"
    if options.get("residual", True):
        names["D"] = "D"
    if options.get("norm", True):
        names["g_norm.weight"] = "norm.weight"
    return [TensorRule(f"sequence_mixer.{theirs}", f"mixer.{ours}") for theirs, ours in names.items()]


def _attention_rules(attention: Attention) -> list[TensorRule]:
    shared = attention.num_heads // attention.num_kv_heads
    # Theirs holds for each key-value head its query heads, its key and its value; ours all queries, keys and values.
    rows = torch.arange(attention.num_kv_heads * (shared + 2) * attention.head_dim)
    q, k, v = rows.view(attention.num_kv_heads, shared + 2, attention.head_dim).split((shared, 1, 1), 1)
    order = torch.cat([x.flatten() for x in (q, k, v)])
    return [
        TensorRule("sequence_mixer.c_attn.weight", "mixer.in_proj.weight", order),
        TensorRule("sequence_mixer.c_proj.weight", "mixer.out_proj.weight"),
    ]


def _gate_up(width: int, interleaved: bool) -> Tensor:
    """The rows of lm-engine's ``c_fc`` in the order gate, up."""
    rows = torch.arange(2 * width)
    return torch.cat([rows[0::2], rows[1::2]] if interleaved else [rows[width:], rows[:width]])


def _mlp_rules(options: dict[str, Any], layout: Layout) -> list[TensorRule]:
    return [
        TensorRule("mlp_block.c_fc.weight", "mlp.in_proj.weight", _gate_up(options["intermediate_size"], layout.mlp)),
        TensorRule("mlp_block.c_proj.weight", "mlp.out_proj.weight"),
    ]


def _moe_rules(options: dict[str, Any], layout: Layout) -> list[TensorRule]:
    rules = [
        TensorRule("mlp_block.gate.weight", "mlp.router.weight"),
        TensorRule(
            "mlp_block.c_fc.weight", "mlp.experts.gate_up_proj", _gate_up(options["intermediate_size"], layout.mlp), 1
        ),
        TensorRule("mlp_block.c_proj.weight", "mlp.experts.down_proj"),
    ]
    width = options["shared_intermediate_size"]
    if width is not None:
        rows = _gate_up(width, layout.shared)
        rules += [
            TensorRule("mlp_block.c_fc_shared.weight", "mlp.shared_expert.in_proj.weight", rows),
            TensorRule("mlp_block.c_proj_shared.weight", "mlp.shared_expert.out_proj.weight"),
        ]
    return rules
