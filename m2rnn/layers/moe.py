"""Mixture of experts: each token takes the few of many small MLPs that a router chooses for it."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from m2rnn.layers.initialize import initialize
from m2rnn.layers.mlp import SwiGLU
from m2rnn.layers.sizes import check_sizes


class Routing(NamedTuple):
    """What a mixture of experts decided, in float32 (float64 for float64 tokens).

    Attributes:
        logits: of every token and expert ``[tokens, experts]``.
        loss: the auxiliary loss, one number.
    """

    logits: Tensor
    loss: Tensor


class MoE(nn.Module):
    """``Σ_e w_e SwiGLU_e(x) + SwiGLU_shared(x)``: e the k experts with the largest logits, w their softmax.

    The router works in float32 and drops no token, however many choose the same expert: what a token gets does not
    depend on the others. The auxiliary loss is ``load_balancing_loss + z_loss · mean(logsumexp(logits)²)``.

    The experts run through transformers' experts interface: ``model.set_experts_implementation(name)`` or
    ``from_pretrained(..., experts_implementation=name)`` with "grouped_mm" (the default), "batched_mm", "eager" or
    what transformers adds. On a CPU, in float64 and for rows that are no multiple of 16 bytes, which PyTorch's grouped
    product does not take, "grouped_mm" is replaced by the plain loop, "eager".

    Args:
        hidden_size: width of the input and the output.
        num_experts: number of experts E.
        num_experts_per_tok: how many of them a token takes, k.
        intermediate_size: width of each expert's gate and up.
        shared_intermediate_size: width of the expert that every token takes besides; None for none.
        z_loss: weight of the second term of the auxiliary loss, which keeps the logits small.

    Raises:
        ValueError: for a size that is not positive, or more experts per token than there are.

    Source: M²RNN (arXiv 2603.14360), the 7B models; the loss is that of Switch Transformers (arXiv 2101.03961), the
    z-loss that of ST-MoE (arXiv 2202.08906).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 128,
        num_experts_per_tok: int = 8,
        intermediate_size: int = 256,
        shared_intermediate_size: int | None = 1024,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(
            hidden_size=hidden_size,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            intermediate_size=intermediate_size,
            shared_intermediate_size=shared_intermediate_size,
        )
        if num_experts_per_tok > num_experts:
            raise ValueError(f"num_experts_per_tok must be 1 to {num_experts} (num_experts), got {num_experts_per_tok}")
        self.num_experts_per_tok, self.z_loss = num_experts_per_tok, z_loss
        self.router = Router(hidden_size, num_experts, bias=False)
        self.experts = Experts(
            SimpleNamespace(_experts_implementation="grouped_mm"), num_experts, hidden_size, intermediate_size
        )
        self.shared_expert = None
        if shared_intermediate_size is not None:
            self.shared_expert = SwiGLU(hidden_size, shared_intermediate_size)

    def forward(self, hidden: Tensor, output_routing: bool = False) -> tuple[Tensor, Routing | None]:
        """The output, of ``hidden``'s shape ``[..., hidden_size]`` and dtype, and the routing if wanted."""
        tokens = hidden.flatten(0, -2)
        logits = self.router(tokens)
        top, chosen = logits.topk(self.num_experts_per_tok, dim=-1)
        y = self._run_experts(tokens, chosen, top.softmax(-1)).view(hidden.shape)
        if self.shared_expert is not None:
            y = y + self.shared_expert(hidden)
        if not output_routing:
            return y, None
        loss = load_balancing_loss(logits, chosen)
        if self.z_loss:
            loss = loss + self.z_loss * logits.logsumexp(-1).square().sum() / max(1, logits.shape[0])
        return y, Routing(logits, loss)

    def _run_experts(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        experts, device = self.experts, tokens.device.type
        if not torch.is_autocast_enabled(device) or experts.takes_loop(tokens):
            y: Tensor = experts(tokens, chosen, weights)
            return y
        # Autocast does not know the products of the other implementations.
        narrow = torch.get_autocast_dtype(device)
        parameters = {name: parameter.to(narrow) for name, parameter in experts.named_parameters()}
        y = torch.func.functional_call(experts, parameters, (tokens.to(narrow), chosen, weights))
        return y.to(tokens.dtype)

    def extra_repr(self) -> str:
        return f"num_experts_per_tok={self.num_experts_per_tok}"


class Router(nn.Linear):
    """A linear layer in float32 (float64 for float64 input), under autocast too."""

    def forward(self, tokens: Tensor) -> Tensor:
        dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.to(dtype), self.weight.to(dtype))


@use_experts_implementation
class _Experts(nn.Module):
    """E SwiGLUs without biases, in the layout of transformers' experts interface.

    Args:
        config: holds ``_experts_implementation``; a model's own configuration takes its place there.
        num_experts: E.
        hidden_size: D.
        intermediate_size: I; ``gate_up_proj`` is ``[E, 2I, D]``, gate first, and ``down_proj`` ``[E, D, I]``.
    """

    config: Any  # kept by the decorator

    def __init__(self, config: Any, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.act_fn = nn.SiLU()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.gate_up_proj, self.down_proj):  # as torch's linear layers start
            initialize(parameter, lambda weight: weight.uniform_(-(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[tokens, D]`` by the experts ``top_k_index`` ``[tokens, k]``, added up with ``top_k_weights``."""
        return self.loop(hidden_states, top_k_index, top_k_weights)

    def loop(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """One expert after the other, each for all tokens that chose it."""
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.num_experts).tolist()
        inputs = tokens.index_select(0, order // chosen.shape[1]).split(counts)
        # unbind: indexing would make a gradient of all experts' size for each expert.
        experts = zip(inputs, self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        outputs = []
        for x, gate_up, down in experts:
            if x.shape[0]:
                gate, up = F.linear(x, gate_up).chunk(2, -1)
                outputs.append(F.linear(self.act_fn(gate) * up, down))
        if not outputs:
            return tokens
        y = torch.cat(outputs).index_select(0, order.argsort()).unflatten(0, chosen.shape)
        weighted: Tensor = (y * weights[..., None]).sum(1)
        return weighted.to(tokens.dtype)


class Experts(_Experts):
    """``_Experts``, by the loop where PyTorch has no grouped product."""

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if self.takes_loop(tokens):
            return self.loop(tokens, chosen, weights)
        y: Tensor = super().forward(tokens, chosen, weights)
        return y

    def takes_loop(self, tokens: Tensor) -> bool:
        """Whether that is so for these tokens, or the loop is what the configuration wants."""
        implementation, device = self.config._experts_implementation, tokens.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        alignment = 16 // narrow.itemsize
        no_grouped_mm = device == "cpu" or narrow.itemsize > 4 or any(n % alignment for n in self.down_proj.shape[1:])
        return bool(implementation == "eager" or (implementation == "grouped_mm" and no_grouped_mm))


def load_balancing_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """``E Σ_e F_e P_e``: 1 if all experts are chosen equally often, up to E / k if k experts take all tokens.

    F_e is expert e's share of all choices and P_e its probability (softmax over all experts), averaged over tokens.
    Only P has a gradient.

    Args:
        logits: ``[tokens, E]``.
        chosen: int64 ``[tokens, k]``.

    Source: Switch Transformers (arXiv 2101.03961), equations 4 to 6, for k choices a token.
    """
    tokens, num_experts = logits.shape
    share = torch.zeros_like(logits).scatter(1, chosen, 1.0).sum(0) / max(1, chosen.numel())
    probability = logits.softmax(-1).sum(0) / max(1, tokens)
    return num_experts * (share * probability).sum()
