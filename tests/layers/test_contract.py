"""What every mixer promises: any split into calls and any packing give each sequence's own results."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m2rnn.layers import GRU, M2RNN, RNN, Attention, GatedDeltaNet, Mamba2, Packing
from tests.tolerances import assert_close

HIDDEN = 12
MIXERS = {
    "m2rnn": lambda: M2RNN(HIDDEN, 4, key_dim=3, value_dim=5, num_k_heads=2, num_g_heads=2),
    "m2rnn-plain": lambda: M2RNN(
        HIDDEN,
        2,
        3,
        5,
        conv_size=None,
        activation=None,
        norm=False,
        residual=False,
        gate=False,
        num_v_heads=1,
    ),
    "m2rnn-conv-2": lambda: M2RNN(HIDDEN, 2, 3, 5, conv_size=2, activation=None, weight_init="normal", norm_eps=0.5),
    "m2rnn-norm-first": lambda: M2RNN(HIDDEN, 4, 3, 5, num_g_heads=2, norm_before_gate=True),
    "attention": lambda: Attention(HIDDEN, 2),
    "attention-qk-norm": lambda: Attention(HIDDEN, 3, rope_theta=100.0, qk_norm=True, norm_eps=0.3),
    "attention-window": lambda: Attention(HIDDEN, 4, 2, head_dim=6, rope_theta=100.0, window=3),
    "attention-window-1": lambda: Attention(HIDDEN, 2, window=1),
    "attention-rope-grouped": lambda: Attention(HIDDEN, 4, 2, head_dim=6, rope_theta=100.0),
    "gru": lambda: GRU(HIDDEN, 2, 5),
    "gru-plain": lambda: GRU(HIDDEN, 1, 7, conv_size=None, activation=None, norm=False, gate=False),
    "rnn": lambda: RNN(HIDDEN, 3, 4, conv_size=3),
    "rnn-plain": lambda: RNN(HIDDEN, 2, 3, conv_size=None, norm=False, gate=False),
    "gated-deltanet": lambda: GatedDeltaNet(HIDDEN, 2, key_dim=3, value_dim=5),
    "gated-deltanet-norm-first": lambda: GatedDeltaNet(HIDDEN, 2, 3, 5, norm_before_gate=True),
    "gated-deltanet-plain": lambda: GatedDeltaNet(
        HIDDEN, 2, 4, 3, conv_size=None, activation=None, norm=False, gate=False
    ),
    "gated-deltaproduct": lambda: GatedDeltaNet(HIDDEN, 2, 8, 5, num_householder=2, negative_eigenvalues=True),
    "mamba2": lambda: Mamba2(HIDDEN, 3, state_size=5, inner_size=12),
    "mamba2-norm-first": lambda: Mamba2(HIDDEN, 3, 5, 12, norm_before_gate=True),
    "mamba2-plain": lambda: Mamba2(
        HIDDEN, 2, 3, 10, conv_size=None, activation=None, norm=False, residual=False, gate=False
    ),
}


def make(name: str) -> nn.Module:
    """The mixer in float64 with every parameter random, so that none can be left out unnoticed."""
    torch.manual_seed(len(name))
    mixer = MIXERS[name]().double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    return mixer


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN, dtype=torch.float64)


@torch.no_grad()
def random_state(mixer: nn.Module, batch: int):
    """The state that some sequences of two tokens leave behind."""
    return mixer(tokens(batch, 2))[1]


def select(state, index: slice):
    return type(state)(*(None if x is None else x[index] for x in state))


def gradients(outputs: list[Tensor], inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of the outputs, laid end to end, against one random cotangent."""
    flat = torch.cat([output.reshape(-1) for output in outputs])
    cotangent = torch.randn(flat.shape, dtype=flat.dtype, generator=torch.Generator().manual_seed(seed))
    return list(torch.autograd.grad(flat, inputs, cotangent))


def assert_all_close(actual: list[Tensor], expected: list[Tensor], kind: str, names: list[str]) -> None:
    for one, other, name in zip(actual, expected, names, strict=True):
        assert_close(one, other, torch.float64, kind, name)


@pytest.mark.parametrize("name", MIXERS)
@settings(max_examples=15)
@given(pieces=st.lists(st.integers(0, 5), min_size=1, max_size=6), grad=st.booleans())
def test_decode_matches_prefill_in_any_split(name: str, pieces: list[int], grad: bool) -> None:
    mixer = make(name)
    hidden = tokens(2, sum(pieces) + 1)
    whole, final = mixer(hidden)
    state, parts = None, []
    with torch.set_grad_enabled(grad):
        for piece in hidden.split([*pieces, 1], 1):
            part, state = mixer(piece, state)
            parts.append(part)
    assert_close(torch.cat(parts, 1), whole, torch.float64, "output")
    for ours, theirs in zip(state, final, strict=True):
        if theirs is not None:
            assert_close(ours, theirs, torch.float64, "state")


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("name", MIXERS)
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_packed_sequences_equal_each_alone(name: str, with_state: bool, lengths: list[int]) -> None:
    mixer = make(name)
    hidden = tokens(1, sum(lengths)).requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packing = Packing.from_cu_seqlens(cu_seqlens, sum(lengths))
    state = random_state(mixer, len(lengths)) if with_state else None
    state_leaves = [x.requires_grad_() for x in state or () if x is not None and x.is_floating_point()]

    packed, packed_state = mixer(hidden, state, packing)
    alone = [
        mixer(part, None if state is None else select(state, slice(n, n + 1)))
        for n, part in enumerate(hidden.split(lengths, 1))
    ]
    expected = torch.cat([y for y, _ in alone], 1)
    assert_close(packed, expected, torch.float64, "output")

    following = tokens(len(lengths), 1)  # the states are equal if what follows is
    after, _ = mixer(following, packed_state)
    after_alone = [mixer(following[n : n + 1], s)[0] for n, (_, s) in enumerate(alone)]
    assert_close(after, torch.cat(after_alone), torch.float64, "output")

    names, parameters = zip(*mixer.named_parameters(), strict=True)
    inputs = [hidden, *state_leaves, *parameters]
    if sum(lengths):
        ours = gradients([packed, after], inputs)
        theirs = gradients([expected, torch.cat(after_alone)], inputs)
        assert_all_close(ours, theirs, "gradient", ["hidden", *["state"] * len(state_leaves), *names])


@pytest.mark.parametrize("name", MIXERS)
def test_state_is_batch_first(name: str) -> None:
    mixer = make(name)
    state = random_state(mixer, 3)
    following = tokens(3, 2)
    swapped = mixer(following[[2, 0]], select(state, [2, 0]))[0]
    assert_close(swapped, mixer(following, state)[0][[2, 0]], torch.float64, "output")


@pytest.mark.parametrize("name", MIXERS)
def test_inputs_that_do_not_go_together_are_refused(name: str) -> None:
    mixer, packing = make(name), Packing.from_cu_seqlens(torch.tensor([0, 2, 5]), 5)
    _, state = mixer(tokens(3, 4))
    for x, arguments, message in (
        (tokens(4), (), rf"hidden must be \[B, T, hidden_size\], got shape \(4, {HIDDEN}\)"),
        (
            tokens(1, 6)[..., 1:],
            (),
            rf"hidden must be \[B, T, {HIDDEN}\], the width .* got shape \(1, 6, {HIDDEN - 1}\)",
        ),
        (
            tokens(1, 6),
            (None, packing),
            rf"with packing, hidden must be \[1, 5, hidden_size\], got shape \(1, 6, {HIDDEN}\)",
        ),
        (tokens(2, 5), (None, packing), r"with packing, hidden must be \[1, 5, hidden_size\], got shape \(2, 5"),
        (tokens(2, 4), (state,), "state is of 3 sequences, but hidden is of 2"),
        (tokens(1, 1), (state,), "state is of 3 sequences, but hidden is of 1"),
        (tokens(1, 5), (state, packing), "state is of 3 sequences, but hidden is of 2"),
    ):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
                mixer(x, *arguments)


@pytest.mark.parametrize("name", MIXERS)
def test_no_state_is_made_when_none_is_wanted(name: str) -> None:
    mixer = make(name)
    hidden = tokens(2, 3)
    y, state = mixer(hidden, output_state=False)
    assert state is None
    assert torch.equal(y, mixer(hidden)[0])


@pytest.mark.parametrize("name", MIXERS)
def test_no_token_sees_the_future(name: str) -> None:
    mixer = make(name)
    hidden = tokens(1, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(hidden)[0][0, 3].square().sum(), hidden)
    assert gradient[0, 4:].abs().max() == 0
    assert gradient[0, 3].abs().max() > 0


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_follows_float64(name: str, dtype: torch.dtype) -> None:
    mixer, hidden = make(name).to(dtype), tokens(2, 9).to(dtype)
    reference = make(name)
    reference.load_state_dict(mixer.state_dict())
    y, state = mixer(hidden)
    assert y.dtype == dtype
    expected, _ = reference(hidden.double())
    error = (y.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    y, _ = mixer(hidden[:, :1], state)
    assert y.dtype == dtype


@pytest.mark.parametrize("name", MIXERS)
def test_autocast_follows_float32(name: str) -> None:
    mixer, hidden = make(name).float(), tokens(2, 9).float()
    expected, _ = mixer(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(hidden[:, :8])
        last, _ = mixer(hidden[:, 8:], state)
    error = (torch.cat([y, last], 1).float() - expected).norm() / expected.norm()
    assert 1e-6 < error < 3e-2


@pytest.mark.parametrize("name", ["gru", "rnn", "gated-deltanet", "mamba2"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo's own
def test_compiles_without_graph_breaks_at_any_length(name: str) -> None:
    torch.compiler.reset()
    mixer = make(name)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for length in (6, 9):
        hidden = tokens(2, length).requires_grad_()
        names, parameters = zip(*mixer.named_parameters(), strict=True)
        inputs = [hidden, *parameters]
        (y, state), (expected, expected_state) = compiled(hidden), mixer(hidden)
        assert_close(y, expected, torch.float64, "output")
        assert_close(state.recurrent, expected_state.recurrent, torch.float64, "state")
        assert_all_close(gradients([y], inputs), gradients([expected], inputs), "gradient", ["hidden", *names])
