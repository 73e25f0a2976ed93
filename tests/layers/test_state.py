"""The rule of decoding is one: layers, model, cache and graphs write a static state in place in the same calls."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import m2rnn
from m2rnn.layers import GRU, M2RNN, RNN, Attention, GatedDeltaNet, Mamba2, Packing, attention, state
from m2rnn.layers import m2rnn as m2rnn_layer
from m2rnn.models import M2RNNCache
from m2rnn.models.cache import CACHE_NAME
from m2rnn.models.capture import CapturedDecoding
from tests.models.small import OPTIONS, VOCAB, make
from tests.tolerances import assert_close

ROWS, PAST = 2, 3
MIXERS = {
    "m2rnn": lambda: M2RNN(8, 2, 3, 4),
    "m2rnn, the modules": lambda: M2RNN(8, 2, 3, 4, norm_before_gate=True),  # not by the operator for one token
    "m2rnn, no convolution": lambda: M2RNN(8, 2, 3, 4, conv_size=None),
    "rnn": lambda: RNN(8, 2, 4),
    "gru": lambda: GRU(8, 2, 4),
    "gated deltanet": lambda: GatedDeltaNet(8, 2, 3, 4),
    "mamba2": lambda: Mamba2(8, 2, 3, 8),
    "attention": lambda: Attention(8, 2, rope_theta=100.0),
    "window": lambda: Attention(8, 2, window=2),
}
#: tokens of each row, packed, gradients, a state wanted; only the first of these calls decodes
CALLS = {
    "a token": (1, False, False, True),
    "two tokens": (2, False, False, True),
    "no token": (0, False, False, True),
    "packed tokens": (1, True, False, True),
    "one packed token": (1, True, False, True),
    "with gradients": (1, False, True, True),
    "two with gradients": (2, False, True, True),
    "no state wanted": (1, False, False, False),
}
DECODES = "a token"


def places(mixer_state: Any) -> list[int]:
    return [x.data_ptr() for x in mixer_state if x is not None]


def values(mixer_state: Any) -> list[Tensor]:
    return [x.detach().clone() for x in mixer_state if x is not None]


def rows_of(call: str) -> int:
    return 1 if call == "one packed token" else ROWS


def are_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("tokens", "packed", "grad", "expected"),
    [
        *((tokens, packed, grad, False) for tokens in (0, 2, 7) for packed in (False, True) for grad in (False, True)),
        (1, True, False, False),
        (1, True, True, False),
        (1, False, True, False),
        (1, False, False, True),
    ],
)
def test_one_token_without_packing_and_gradients_decodes(tokens: int, packed: bool, grad: bool, expected: bool) -> None:
    packing = Packing.from_cu_seqlens(torch.tensor([0, tokens]), tokens) if packed else None
    with torch.set_grad_enabled(grad):
        for shape, dtype in (((1, tokens), torch.long), ((1, tokens, 8), torch.float32)):  # ids or hidden vectors
            assert state.decodes(torch.zeros(shape, dtype=dtype), packing) is expected
    with torch.inference_mode():
        assert state.decodes(torch.zeros(1, tokens), packing) is (tokens == 1 and not packed)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MIXERS)
def test_a_static_state_is_written_by_a_step_of_decoding_and_by_no_other_call(name: str, call: str) -> None:
    tokens, packed, grad, wanted = CALLS[call]
    layer, rows = MIXERS[name]().double(), rows_of(call)
    with torch.no_grad():
        _, plain = layer(torch.randn(rows, PAST, 8, dtype=torch.float64))
    static = plain.static(PAST + 4)
    hidden = torch.randn(rows, tokens, 8, dtype=torch.float64)
    packing = None
    if packed:
        hidden, packing = hidden.view(1, -1, 8), Packing.from_cu_seqlens(torch.arange(rows + 1), rows)
    addresses, before, plain_before = places(static), values(static), values(plain)
    with torch.set_grad_enabled(grad):
        y, after = layer(hidden, static, packing, output_state=wanted)
        expected, plain_after = layer(hidden, plain, packing, output_state=wanted)
    assert_close(y, expected, torch.float64, "output")
    assert y.requires_grad is grad
    assert places(static) == addresses
    assert are_equal(values(plain), plain_before), "a plain state never changes"
    if call == DECODES:
        assert after is static
        assert not are_equal(values(static), before)
        after = static.dynamic()
    else:
        assert are_equal(values(static), before)
    if not wanted:
        assert after is plain_after is None
        return
    assert type(after) is type(plain_after) is type(plain)
    following = torch.randn(rows, 2, 8, dtype=torch.float64)  # the states are equal if what follows is
    assert_close(layer(following, after)[0], layer(following, plain_after)[0], torch.float64, "output")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mixer", OPTIONS)
def test_a_model_writes_its_static_cache_in_the_calls_in_which_a_layer_would(
    mixer: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hands the state itself to the layer in a step of decoding, and otherwise one of which the layer keeps none."""
    tokens, packed, grad, wanted = CALLS[call]
    model = make("m2rnn", mixers=[mixer, mixer])
    cache, plain = M2RNNCache(2, PAST + 4), M2RNNCache(2)
    ids = torch.randint(3, VOCAB, (rows_of(call), PAST + tokens))
    with torch.no_grad():
        for kept in (cache, plain):
            model(ids[:, :PAST], past_key_values=kept)
    statics = [layer.state for layer in cache.layers]
    before = [values(each) for each in statics]
    addresses = [places(each) for each in statics]
    given = []
    forward = type(model.model.layers[0].mixer).forward

    def spy(layer: Any, hidden: Tensor, mixer_state: Any, *arguments: Any, **options: Any) -> Any:
        given.append(any(mixer_state is static for static in statics))
        return forward(layer, hidden, mixer_state, *arguments, **options)

    monkeypatch.setattr(type(model.model.layers[0].mixer), "forward", spy)
    options: dict[str, Any] = {"use_cache": wanted}
    new = ids[:, PAST:]
    if packed:
        new, options["cu_seq_lens_q"] = new.reshape(1, -1), torch.arange(rows_of(call) + 1)
    with torch.set_grad_enabled(grad):
        logits = model(new, past_key_values=cache, **options).logits
        assert given == [call == DECODES] * 2
        assert_close(logits, model(new, past_key_values=plain, **options).logits, torch.float64, "output")
    assert cache.get_seq_length() == plain.get_seq_length() == PAST + (tokens if wanted else 0)
    assert [places(layer.state) for layer in cache.layers] == addresses
    changed = [not are_equal(values(each), old) for each, old in zip(statics, before, strict=True)]
    assert changed == [wanted and tokens > 0] * 2


def test_a_graph_is_asked_for_steps_of_decoding_alone() -> None:
    """The second such call would capture one; here, without a GPU, the first only remembers for what."""

    class Model:
        config = type("Config", (), {"output_hidden_states": False})()
        calls = 0

        def __call__(self, **inputs: Any) -> None:
            self.calls += 1

    cache = M2RNNCache(1, 8)
    cache.steps = PAST
    for tokens, grad in ((0, False), (1, False), (1, True), (2, False), (2, True)):
        captured, model, ids = CapturedDecoding(), Model(), torch.zeros(ROWS, tokens, dtype=torch.long)
        with torch.set_grad_enabled(grad):
            captured(model, **{CACHE_NAME: cache, "input_ids": ids})  # type: ignore[arg-type]
            assert (captured._captured_for is not None) is state.decodes(ids)
        assert model.calls == 1


def test_the_rule_is_written_once() -> None:
    """A second copy of it, somewhere in the layers or the models, would drift from the first."""
    folder = Path(m2rnn.__file__).parent
    asks = re.compile(r"is_grad_enabled")
    files = [path for part in ("layers", "models") for path in sorted((folder / part).rglob("*.py"))]
    found = {path.name: len(asks.findall(path.read_text(encoding="utf-8"))) for path in files}
    found = {name: count for name, count in found.items() if count}
    assert found == {"state.py": 1, "loss.py": 1}, "ask decodes() instead; loss.py asks whether to keep gradients"
    assert "is_grad_enabled" in inspect.getsource(state.decodes)


def test_states_are_found_where_they_were_before() -> None:
    assert m2rnn_layer.M2RNNState is state.M2RNNState is m2rnn.layers.M2RNNState
    assert m2rnn_layer.StaticM2RNNState is state.StaticM2RNNState
    assert m2rnn_layer.next_state is state.next_state
    assert attention.AttentionState is state.AttentionState
    assert attention.StaticAttentionState is state.StaticAttentionState
