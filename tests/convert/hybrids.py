"""Small random models of the hybrid families, in float64 so that comparisons are tight."""

from typing import Any

import pytest
import torch
import transformers
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.cache_utils import Cache

needs_swap = pytest.mark.skipif(
    not hasattr(Cache, "get_recurrent_state"),
    reason=f"swap needs transformers 5.23 or newer, this is {transformers.__version__}",
)
VOCAB, HIDDEN = 29, 32
R, A = "linear_attention", "full_attention"
SAME = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
DELTA_NET = {
    "head_dim": 8,
    "intermediate_size": 48,
    "layer_types": [R, R, A, R, A],
    "num_hidden_layers": 5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}


def config(family: str, **overrides: Any) -> Any:
    match family:
        case "qwen3_next":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            experts |= {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 2}
            return Qwen3NextConfig(**SAME | DELTA_NET | experts | overrides)
        case "qwen3_5":
            return Qwen3_5TextConfig(**SAME | DELTA_NET | overrides)
        case "granite":
            fields = {"layer_types": [R, R, A, R, A], "num_hidden_layers": 5, "intermediate_size": 24}
            fields |= {"shared_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
            fields |= {"position_embedding_type": "nope", "attention_multiplier": 0.35, "residual_multiplier": 0.8}
            return GraniteMoeHybridConfig(**SAME | MAMBA | fields | overrides)
        case "bamba":
            fields = {"attn_layer_indices": [2, 4], "num_hidden_layers": 5, "intermediate_size": 48}
            return BambaConfig(**SAME | MAMBA | fields | overrides)
        case "nemotron_h":
            fields = {"layers_block_type": [R, R, A, "mlp", A, R], "intermediate_size": 48, "head_dim": 8}
            fields |= {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8}
            return NemotronHConfig(**SAME | fields | overrides)
    raise AssertionError(family)


CLASSES = {
    "qwen3_next": Qwen3NextForCausalLM,
    "qwen3_5": Qwen3_5ForCausalLM,
    "granite": GraniteMoeHybridForCausalLM,
    "bamba": BambaForCausalLM,
    "nemotron_h": NemotronHForCausalLM,
}


WITH_EXPERTS = ("qwen3_next", "granite")


def make(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> PreTrainedModel:
    """An evaluation-mode model with the same weights on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CLASSES[family](config(family, **overrides)).to(dtype).eval()
    if family in WITH_EXPERTS:
        model.set_experts_implementation("eager")  # the default takes no float64
    return model
