"""lm-engine's forward pass from its equations, in float64, one token and one head at a time; and checkpoints for it.

Knows nothing of the converter or of the library's layers.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

VOCAB, HIDDEN = 19, 24
M2RNN_BLOCK = {
    "sequence_mixer_type": "m2rnn",
    "k_head_dim": 5,
    "v_head_dim": 4,
    "num_q_heads": 1,
    "num_k_heads": 2,
    "num_v_heads": 6,
    "num_f_heads": 6,
    "num_g_heads": 6,
    "num_weight_heads": 3,
    "use_residual": True,
    "activation_function": "silu",
    "normalization_function": "rmsnorm",
    "kernel_size": 4,
    "add_bias": False,
    "gradient_clipping": 1,
    "A_init_min": 0,
    "A_init_max": 16,
    "dt_init_min": 0.001,
    "dt_init_max": 0.1,
    "dt_init_floor": 0.0001,
}
ATTENTION_BLOCK = {
    "sequence_mixer_type": "softmax_attention",
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "add_bias": False,
    "head_dim": None,
    "softmax_dropout": 0,
    "dropout": 0,
    "attention_gate": False,
    "exclusive_self_attention": False,
    "sliding_window": None,
    "attention_multiplier": None,
    "attention_multiplier_method": "1 / sqrt(head_dim)",
}
MLP_BLOCK = {
    "mlp_type": "MLP",
    "activation_function": "swiglu",
    "intermediate_size": 14,
    "add_bias": False,
    "dropout": 0,
}
MOE_BLOCK = {
    "mlp_type": "MoE",
    "activation_function": "swiglu",
    "intermediate_size": 6,
    "shared_intermediate_size": 10,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "shared_expert_gating": False,
    "normalized_topk": True,
    "add_bias": False,
    "dropout": 0,
}


def config(pattern: str = "MAM", mlp: dict[str, Any] = MLP_BLOCK, **overrides: Any) -> dict[str, Any]:
    """config.json of the newer format; M is an M2RNN layer, A attention."""
    mixers = {"M": M2RNN_BLOCK, "A": ATTENTION_BLOCK}
    return {
        "model_type": "gpt_base",
        "architectures": ["GPTBaseForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_layers": len(pattern),
        "max_position_embeddings": 64,
        "normalization_function": "rmsnorm",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "init_method": "normal",
        "embedding_init_method": "normal",
        "use_depth_scaled_init": True,
        "position_embedding_type": "nope",
        "rope_theta": 10000,
        "rope_scaling": None,
        "rope_dim": None,
        "embedding_dropout": 0,
        "m_emb": None,
        "m_width": None,
        "m_residual": None,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "use_cache": True,
        "transformers_version": "4.57.0",
        "sequence_mixer_blocks": [dict(mixers[letter]) for letter in pattern],
        "mlp_blocks": [dict(mlp) for _ in pattern],
        **overrides,
    }


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of lm-engine's file, by name."""
    hidden = config["hidden_size"]
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (config["vocab_size"], hidden)}
    for layer, (mixer, mlp) in enumerate(zip(config["sequence_mixer_blocks"], config["mlp_blocks"], strict=True)):
        at = f"transformer.h.{layer}."
        found |= {at + "ln_1.weight": (hidden,), at + "ln_2.weight": (hidden,)}
        if mixer["sequence_mixer_type"] == "m2rnn":
            K, V = mixer["k_head_dim"], mixer["v_head_dim"]
            qkv = (mixer["num_q_heads"] + mixer["num_k_heads"]) * K + mixer["num_v_heads"] * V
            N = max(mixer[f"num_{x}_heads"] for x in ("q", "k", "v", "f", "weight"))
            m = at + "sequence_mixer."
            found |= {
                m + "input_projection.weight": (qkv + mixer["num_f_heads"] + mixer["num_g_heads"] * V, hidden),
                m + "decay_gate.A_log": (N,),
                m + "decay_gate.dt_bias": (N,),
                m + "state_weight": (mixer["num_weight_heads"], V, V),
                m + "output_projection.weight": (hidden, N * V),
            }
            if mixer["kernel_size"] is not None:
                found[m + "conv1d.weight"] = (qkv, 1, mixer["kernel_size"])
            if mixer["use_residual"]:
                found[m + "D"] = (N, V)
            if mixer["normalization_function"] is not None:
                found[m + "g_norm.weight"] = (N * V,)
        else:
            heads, kv = mixer["num_attention_heads"], mixer["num_key_value_heads"]
            d = mixer["head_dim"] or hidden // heads
            found[at + "sequence_mixer.c_attn.weight"] = ((heads + 2 * kv) * d, hidden)
            found[at + "sequence_mixer.c_proj.weight"] = (hidden, heads * d)
        width = mlp["intermediate_size"]
        b = at + "mlp_block."
        if mlp["mlp_type"] == "MLP":
            found |= {b + "c_fc.weight": (2 * width, hidden), b + "c_proj.weight": (hidden, width)}
        else:
            experts, shared = mlp["num_experts"], mlp["shared_intermediate_size"]
            found |= {
                b + "gate.weight": (experts, hidden),
                b + "c_fc.weight": (experts, 2 * width, hidden),
                b + "c_proj.weight": (experts, hidden, width),
            }
            if shared is not None:
                found |= {b + "c_fc_shared.weight": (2 * shared, hidden), b + "c_proj_shared.weight": (hidden, shared)}
    found["transformer.ln_f.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    return found


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights under which every part of the model matters; the decay gate's in at least float32, as lm-engine keeps."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, shape in shapes(config).items():
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) > 1:
            x = x * (0.7 if "conv1d" in name else shape[-1] ** -0.5 if "wte" not in name else 1)
        narrow = dtype if "decay_gate" not in name else torch.promote_types(dtype, torch.float32)
        tensors[name] = x.to(narrow)
    return tensors


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    weight_map = {}
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[n::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor, halves: bool = False) -> Tensor:
    """[B, T] to [B, T, vocabulary]; ``halves``: gate and up rows lie in two halves, up first, not interleaved."""
    weights = {name: x.double() for name, x in tensors.items()}
    eps = config["layer_norm_epsilon"]
    x = weights["transformer.wte.weight"][ids]
    for layer, (mixer, mlp) in enumerate(zip(config["sequence_mixer_blocks"], config["mlp_blocks"], strict=True)):
        prefix = f"transformer.h.{layer}."
        w = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
        mix = _m2rnn if mixer["sequence_mixer_type"] == "m2rnn" else _attention
        theta = config["rope_theta"] if config["position_embedding_type"] == "rope" else None
        normed = _rms(x, w["ln_1.weight"], eps)
        x = x + torch.stack([mix(row, w, mixer, theta) for row in normed])
        normed = _rms(x, w["ln_2.weight"], eps)
        x = x + (_mlp if mlp["mlp_type"] == "MLP" else _moe)(normed, w, mlp, halves)
    x = _rms(x, weights["transformer.ln_f.weight"], eps)
    return x @ weights["transformer.wte.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _m2rnn(x: Tensor, w: dict[str, Tensor], block: dict[str, Any], theta: float | None) -> Tensor:
    """[T, hidden] to the same."""
    w = {name.removeprefix("sequence_mixer."): v for name, v in w.items()}
    K, V = block["k_head_dim"], block["v_head_dim"]
    counts = [block[f"num_{name}_heads"] for name in ("q", "k", "v", "f", "g", "weight")]
    Nq, Nk, Nv, Nf, Ng, Nw = counts
    N = max(Nq, Nk, Nv, Nf, Nw)
    T = x.shape[0]
    qkv, f, g = (x @ w["input_projection.weight"].T).split((Nq * K + Nk * K + Nv * V, Nf, Ng * V), -1)
    if block["kernel_size"] is not None:
        taps = w["conv1d.weight"][:, 0]
        past = torch.cat([qkv.new_zeros(taps.shape[1] - 1, qkv.shape[1]), qkv])
        qkv = torch.stack([(past[t : t + taps.shape[1]].T * taps).sum(1) for t in range(T)])
    if block["activation_function"] is not None:
        qkv = qkv * torch.sigmoid(qkv)
    q, k, v = qkv.split((Nq * K, Nk * K, Nv * V), -1)
    q, k, v, g = q.view(T, Nq, K), k.view(T, Nk, K), v.view(T, Nv, V), g.view(T, Ng, V)
    f = torch.exp(-w["decay_gate.A_log"].exp() * F.softplus(f + w["decay_gate.dt_bias"]))
    y = x.new_zeros(T, N, V)
    for n in range(N):
        H = x.new_zeros(K, V)
        for t in range(T):
            kt, vt, ft = k[t, n // (N // Nk)], v[t, n // (N // Nv)], f[t, n]
            Z = torch.tanh(H @ w["state_weight"][n // (N // Nw)] + torch.outer(kt, vt))
            H = ft * H + (1 - ft) * Z
            y[t, n] = H.T @ q[t, n // (N // Nq)]
            if block["use_residual"]:
                y[t, n] += w["D"][n] * vt
    y = (y * g * torch.sigmoid(g)).flatten(1)
    if block["normalization_function"] is not None:
        y = _rms(y, w["g_norm.weight"], 1e-5)
    return y @ w["output_projection.weight"].T


def _attention(x: Tensor, w: dict[str, Tensor], block: dict[str, Any], theta: float | None) -> Tensor:
    """[T, hidden] to the same; c_attn holds, for each key-value head, its query heads, its key and its value."""
    heads, kv = block["num_attention_heads"], block["num_key_value_heads"]
    d = block["head_dim"] or x.shape[1] // heads
    rows = w["sequence_mixer.c_attn.weight"].split(d)
    shared, T = heads // kv, x.shape[0]
    out = []
    for group in range(kv):
        first = group * (shared + 2)
        key, value = x @ rows[first + shared].T, x @ rows[first + shared + 1].T
        for head in range(shared):
            query = x @ rows[first + head].T
            q, k = (query, key) if theta is None else (_rope(query, theta), _rope(key, theta))
            out += [torch.softmax(k[: t + 1] @ q[t] / d**0.5, 0) @ value[: t + 1] for t in range(T)]
    y = torch.stack(out).view(heads, T, d).transpose(0, 1).flatten(1)
    return y @ w["sequence_mixer.c_proj.weight"].T


def _rope(x: Tensor, theta: float) -> Tensor:
    T, d = x.shape
    turned = torch.empty_like(x)
    for i in range(d // 2):
        angle = torch.arange(T, dtype=x.dtype) / theta ** (2 * i / d)
        a, b = x[:, i], x[:, i + d // 2]
        turned[:, i] = a * angle.cos() - b * angle.sin()
        turned[:, i + d // 2] = b * angle.cos() + a * angle.sin()
    return turned


def _glu(x: Tensor, c_fc: Tensor, c_proj: Tensor, halves: bool) -> Tensor:
    width = c_fc.shape[0] // 2
    gate, up = (c_fc[width:], c_fc[:width]) if halves else (c_fc[0::2], c_fc[1::2])
    g = x @ gate.T
    return (g * torch.sigmoid(g) * (x @ up.T)) @ c_proj.T


def _mlp(x: Tensor, w: dict[str, Tensor], block: dict[str, Any], halves: bool) -> Tensor:
    return _glu(x, w["mlp_block.c_fc.weight"], w["mlp_block.c_proj.weight"], halves)


def _moe(x: Tensor, w: dict[str, Tensor], block: dict[str, Any], halves: bool) -> Tensor:
    routed = halves and not block.get("use_interleaved_weights", False)
    y = torch.zeros_like(x)
    for index in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
        token = x[tuple(index)]
        top, chosen = (w["mlp_block.gate.weight"] @ token).topk(block["num_experts_per_tok"])
        for weight, e in zip(torch.softmax(top, 0), chosen.tolist(), strict=True):
            y[tuple(index)] += weight * _glu(
                token, w["mlp_block.c_fc.weight"][e], w["mlp_block.c_proj.weight"][e], routed
            )
    if block["shared_intermediate_size"] is not None:
        y = y + _glu(x, w["mlp_block.c_fc_shared.weight"], w["mlp_block.c_proj_shared.weight"], halves)
    return y
