"""Mixture of experts: exact against a loop over experts, and what a token gets does not depend on the others."""

import pytest
import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from m2rnn.layers.moe import MoE, load_balancing_loss
from tests.tolerances import assert_close

HIDDEN, EXPERTS, TOP = 16, 7, 3


def make(dtype: torch.dtype = torch.float64, **options) -> MoE:
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": TOP, "intermediate_size": 8}
    moe = MoE(HIDDEN, **sizes | {"shared_intermediate_size": 9} | options).to(dtype)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    return moe


def naive(moe: MoE, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Output and auxiliary loss, token by token, expert by expert."""
    experts, rows, logits, choices = moe.experts, [], [], []
    for x in hidden.reshape(-1, HIDDEN):
        scores = moe.router.weight @ x
        chosen = sorted(range(len(scores)), key=lambda e: -scores[e].item())[: moe.num_experts_per_tok]
        total = sum(scores[e].exp() for e in chosen)
        y = 0
        for e in chosen:
            gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
            y = y + scores[e].exp() / total * (experts.down_proj[e] @ (gate * gate.sigmoid() * up))
        if moe.shared_expert is not None:
            gate, up = (moe.shared_expert.in_proj.weight @ x).chunk(2)
            y = y + moe.shared_expert.out_proj.weight @ (gate * gate.sigmoid() * up)
        rows.append(y)
        logits.append(scores)
        choices += chosen
    probabilities = torch.stack([s.exp() / s.exp().sum() for s in logits]).mean(0)
    shares = [choices.count(e) / len(choices) for e in range(len(probabilities))]
    loss = len(shares) * sum(p * share for p, share in zip(probabilities, shares, strict=True))
    z = sum(s.exp().sum().log() ** 2 for s in logits) / len(logits)
    return torch.stack(rows).view(hidden.shape), loss + moe.z_loss * z


@pytest.mark.parametrize(
    "options",
    [{}, {"shared_intermediate_size": None}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": EXPERTS}],
    ids=["shared", "alone", "top-1", "all"],
)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_output_loss_and_gradients_are_those_of_a_loop_over_experts(options: dict, implementation: str) -> None:
    moe = make(z_loss=0.1, **options)
    moe.experts.config._experts_implementation = implementation
    hidden = torch.randn(2, 6, HIDDEN, dtype=torch.float64, requires_grad=True)
    y, routing = moe(hidden, output_routing=True)
    expected, loss = naive(moe, hidden)
    assert_close(y, expected, torch.float64, "output")
    assert_close(routing.loss, loss, torch.float64, "output")
    assert_close(routing.logits, hidden.detach().flatten(0, 1) @ moe.router.weight.T, torch.float64, "output")
    assert torch.equal(moe(hidden)[0], y)
    assert moe(hidden)[1] is None
    cotangent, weight = torch.randn_like(y), torch.randn((), dtype=torch.float64)
    names, parameters = zip(*[("hidden", hidden), *moe.named_parameters()], strict=True)
    ours = torch.autograd.grad((y * cotangent).sum() + weight * routing.loss, parameters)
    theirs = torch.autograd.grad((expected * cotangent).sum() + weight * loss, parameters)
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert_close(one, other, torch.float64, "gradient", name)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_implementations_of_transformers_agree(implementation: str, dtype: torch.dtype) -> None:
    """Each is called as on a GPU, with what the router decided in float32."""
    moe = make(dtype)
    moe.experts.config._experts_implementation = implementation
    tokens = torch.randn(40, HIDDEN).to(dtype)
    top, chosen = moe.router(tokens).topk(TOP)
    assert top.dtype == torch.float32
    y = moe.experts(tokens, chosen, top.softmax(-1))
    exact = make().experts
    exact.load_state_dict(moe.experts.state_dict())
    expected = exact.loop(tokens.double(), chosen, top.double().softmax(-1))
    assert y.dtype == dtype
    assert_close(y, expected, dtype, "output")


def test_a_model_switches_the_implementation() -> None:
    moe = make(torch.float32)
    moe.experts.config._experts_implementation = "batched_mm"
    calls = []

    def spy(self, *arguments):
        calls.append(1)
        return batched_mm(self, *arguments)

    batched_mm = ALL_EXPERTS_FUNCTIONS["batched_mm"]
    ALL_EXPERTS_FUNCTIONS["batched_mm"] = spy
    try:
        moe(torch.randn(3, HIDDEN))
    finally:
        del ALL_EXPERTS_FUNCTIONS["batched_mm"]
    assert calls == [1]


def test_a_token_gets_the_same_in_any_company() -> None:
    """No capacity: also where all tokens want the same experts."""
    moe = make()
    hidden = torch.randn(1, 30, HIDDEN, dtype=torch.float64)
    for batch in (hidden, hidden[:, :1].expand(-1, 500, -1), torch.cat([hidden, 100 * torch.randn_like(hidden)], 1)):
        together = moe(batch)[0]
        for t in (0, batch.shape[1] // 2, batch.shape[1] - 1):
            assert_close(together[:, t : t + 1], moe(batch[:, t : t + 1])[0], torch.float64, "output")


def test_no_tokens_at_all() -> None:
    moe = make(z_loss=0.1)
    y, routing = moe(torch.randn(1, 0, HIDDEN, dtype=torch.float64), output_routing=True)
    assert y.shape == (1, 0, HIDDEN)
    assert routing.loss.item() == 0


def test_router_is_float32_in_16_bits_and_under_autocast() -> None:
    """Logits rounded to bfloat16 would tie and choose other experts."""
    moe, tokens = make(torch.float32), torch.randn(200, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(tokens, output_routing=True)
    assert y.dtype == torch.float32
    assert torch.equal(routing.logits, moe.router(tokens))
    half = make(torch.bfloat16)
    exact = tokens.bfloat16().double() @ half.router.weight.double().T
    assert_close(half(tokens.bfloat16(), output_routing=True)[1].logits, exact, torch.float32, "output")


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_autocast_follows_float32(implementation: str) -> None:
    moe, tokens = make(torch.float32), torch.randn(9, HIDDEN)
    moe.experts.config._experts_implementation = implementation
    expected = moe(tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(tokens)[0]
    error = (y - expected).norm() / expected.norm()
    assert 1e-4 < error < 3e-2


def test_balanced_choices_cost_one_and_collapsed_ones_the_most() -> None:
    tokens = 840
    even = torch.stack([torch.arange(TOP) + t for t in range(tokens)]) % EXPERTS
    assert load_balancing_loss(torch.zeros(tokens, EXPERTS), even).item() == pytest.approx(1)
    sure = torch.full((tokens, EXPERTS), -100.0)
    sure[:, :TOP] = 0
    same = torch.arange(TOP).expand(tokens, TOP)
    assert load_balancing_loss(sure, same).item() == pytest.approx(EXPERTS / TOP)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_experts_per_tok must be 1 to 4 \(num_experts\), got 5"):
        MoE(8, num_experts=4, num_experts_per_tok=5)
    with pytest.raises(ValueError, match="intermediate_size must be at least 1, got 0"):
        MoE(8, intermediate_size=0)
    with pytest.raises(ValueError, match="intermediate_size must be at least 1, got 0"):
        MoE(8, shared_intermediate_size=0)
