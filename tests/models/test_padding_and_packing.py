"""Padding and packing give each sequence's own hidden states, loss and gradients, whatever their pattern."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2rnn.models import M2RNNCache, M2RNNForCausalLM
from tests.models.small import CONFIGS, VOCAB, make
from tests.tolerances import assert_close

LENGTHS = [5, 1, 3, 7]


def sequences() -> list[Tensor]:
    return [torch.randint(VOCAB, (1, length)) for length in LENGTHS]


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """A batch with junk in the padding, and its mask; ``interior`` puts holes anywhere, ends included."""
    width = max(LENGTHS) + 2
    ids = torch.randint(VOCAB, (len(rows), width))
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        places = {
            "right": torch.arange(row.shape[1]),
            "left": torch.arange(width - row.shape[1], width),
            "interior": torch.randperm(width)[: row.shape[1]].sort().values,
        }[side]
        ids[n, places] = row[0]
        mask[n, places] = 1
    return ids, mask


def gradients(model: M2RNNForCausalLM, output: Tensor) -> dict[str, Tensor]:
    cotangent = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(0))
    names, parameters = zip(*model.model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(output, parameters, cotangent), strict=True))


def assert_same(model: M2RNNForCausalLM, output: Tensor, expected: Tensor) -> None:
    assert_close(output, expected, torch.float64, "output")
    reference = gradients(model, expected)
    for name, gradient in gradients(model, output).items():
        assert_close(gradient, reference[name], torch.float64, "gradient", name)


@pytest.mark.parametrize("side", ["left", "right", "interior"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padded_rows_equal_each_sequence_alone(name: str, side: str) -> None:
    model, rows = make(name), sequences()
    expected = torch.cat([model.model(row).last_hidden_state[0] for row in rows])
    ids, mask = padded(rows, side)
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    assert hidden[mask == 0].abs().max() == 0
    assert_same(model, hidden[mask == 1], expected)


PACKINGS = ["cu_seq_lens_q", "position_ids", "position_ids and an empty cache", "cu_seq_lens_q beside a mask"]


@pytest.mark.parametrize("how", PACKINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_row_equals_each_sequence_alone(name: str, how: str) -> None:
    model, rows = make(name), sequences()
    expected = torch.cat([model.model(row).last_hidden_state[0] for row in rows])
    packed = torch.cat(rows, 1)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    arguments = {
        "cu_seq_lens_q": {"cu_seq_lens_q": cu_seqlens.int(), "cu_seq_lens_k": cu_seqlens, "max_length_q": 7},
        "position_ids": {"position_ids": positions},
        "position_ids and an empty cache": {
            "position_ids": positions,
            "past_key_values": M2RNNCache(model.config.num_hidden_layers),
        },
        "cu_seq_lens_q beside a mask": {
            "cu_seq_lens_q": cu_seqlens,
            "attention_mask": torch.zeros_like(packed),
        },
    }[how]
    assert_same(model, model.model(packed, **arguments).last_hidden_state[0], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_mask_of_ones_and_given_positions_change_nothing(name: str) -> None:
    model = make(name)
    ids = torch.randint(VOCAB, (2, 6))
    expected = model.model(ids).last_hidden_state
    mask = torch.ones_like(ids)
    assert torch.equal(model.model(ids, attention_mask=mask).last_hidden_state, expected)
    positions = torch.arange(6)[None]
    assert_close(model.model(ids, position_ids=positions).last_hidden_state, expected, torch.float64, "output")


def test_given_positions_go_with_their_tokens_through_padding() -> None:
    model, rows = make("rope"), sequences()
    # The mask says that positions two apart do not start new sequences.
    whole = model.model(rows[3], position_ids=2 * torch.arange(7)[None], attention_mask=torch.ones(1, 7))
    ids, mask = padded(rows, "left")
    hidden = model.model(ids, attention_mask=mask, position_ids=2 * (mask.cumsum(1) - 1)).last_hidden_state
    assert_close(hidden[3, mask[3] == 1], whole.last_hidden_state[0], torch.float64, "output")
    assert (whole.last_hidden_state - model.model(rows[3]).last_hidden_state).norm() > 1e-3


@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_hidden_states_of_every_layer_are_padded_alike(side: str) -> None:
    model, rows = make("hybrid"), sequences()
    ids, mask = padded(rows, side)
    layers = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    expected = [model(row, output_hidden_states=True).hidden_states for row in rows]
    assert len(layers) == model.config.num_hidden_layers + 1
    for layer, hidden in enumerate(layers):
        alone = torch.cat([states[layer][0] for states in expected])
        assert_close(hidden[mask == 1], alone, torch.float64, "output")
    assert torch.equal(layers[-1], model.model(ids, attention_mask=mask).last_hidden_state)


def test_rows_that_are_all_padding_give_finite_gradients() -> None:
    model = make("hybrid")
    ids = torch.randint(VOCAB, (3, 4))
    for mask in (torch.zeros_like(ids), torch.tensor([[0] * 4, [0, 1, 1, 0], [0] * 4])):
        model.zero_grad()
        model.model(ids, attention_mask=mask).last_hidden_state.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8)
@given(st.data())
def test_cached_calls_with_holes_equal_the_whole(name: str, data: st.DataObject) -> None:
    """Prefill, then any number of pieces, each with its own padding anywhere, against each sequence alone."""
    model = make(name)
    batch = 3
    widths = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=5))
    holes = st.lists(st.booleans(), min_size=batch * sum(widths), max_size=batch * sum(widths))
    mask = torch.tensor(data.draw(holes)).view(batch, -1)
    ids = torch.randint(VOCAB, mask.shape)
    whole_mask = data.draw(st.booleans())
    cache, pieces, start = None, [], 0
    with torch.no_grad():
        for width in widths:
            now = slice(0 if whole_mask else start, start + width)
            outputs = model.model(
                ids[:, start : start + width],
                attention_mask=mask[:, now],
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs.past_key_values
            pieces.append(outputs.last_hidden_state)
            start += width
        hidden = torch.cat(pieces, 1)
        assert cache.get_seq_length() == start
        for n in range(batch):
            if mask[n].any():
                alone = model.model(ids[n, mask[n]][None]).last_hidden_state[0]
                assert_close(hidden[n, mask[n]], alone, torch.float64, "output")


def test_contradictory_inputs_are_refused() -> None:
    model = make("hybrid")
    ids = torch.randint(VOCAB, (2, 4))
    with pytest.raises(ValueError, match="packs the sequences of one row, got a batch of 2"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 4\]"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 4\]"):
        model(ids, attention_mask=torch.ones(2, 1, 4, 4))
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, 4, 16)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)
    for arguments in ({"input_ids": ids[0]}, {"input_ids": ids[None]}, {"inputs_embeds": torch.zeros(4, 16)}):
        for part in (model, model.model):
            with pytest.raises(ValueError, match=r"input_ids must be \[B, T\], or inputs_embeds \[B, T, hidden_size\]"):
                part(**arguments)
    for layers in (2, 4):
        with pytest.raises(ValueError, match=f"past_key_values is for {layers} layers, but the model has 3"):
            model(ids, past_key_values=M2RNNCache(layers))
    with pytest.raises(ValueError, match="must be an M2RNNCache or an empty DynamicCache, got tuple"):
        model(ids, past_key_values=())
    with pytest.raises(ValueError, match=r"position_ids must be \[2, 4\] or \[1, 4\], got \(4,\)"):
        model(ids, position_ids=torch.arange(4))
    for positions in ([[0, 1, 2, 3], [0, 1, 0, 1]], [[0, 1, 0, 1]]):
        with pytest.raises(ValueError, match="start new sequences inside the rows of a batch of 2"):
            model(ids, position_ids=torch.tensor(positions))
    cache = model(ids[:1]).past_key_values
    for arguments in ({"input_ids": ids}, {"input_ids": ids[:1], "cu_seq_lens_q": torch.tensor([0, 1, 4])}):
        with pytest.raises(ValueError, match="past_key_values holds 1 sequences, but the new tokens are of 2"):
            model(**arguments, past_key_values=cache)


def state_gradients(model, ids: Tensor, cotangent: Tensor, **arguments) -> list[Tensor]:
    """Of Σ logits · cotangent with respect to each of the returned hidden states."""
    outputs = model(ids, output_hidden_states=True, **arguments)
    for state in outputs.hidden_states:
        state.retain_grad()
    (outputs.logits * cotangent).sum().backward()
    return [state.grad for state in outputs.hidden_states]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_returned_hidden_states_have_the_gradients_of_each_sequence_alone(name: str, checkpointed: bool) -> None:
    model, ids = make(name), torch.randint(VOCAB, (3, 6))
    if checkpointed:
        model.train()
        newest = hasattr(model, "activation_checkpointing_enable")
        enable = model.activation_checkpointing_enable if newest else model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    cotangent = torch.randn(3, 6, VOCAB, dtype=torch.float64) * mask[..., None]
    found = state_gradients(model, ids, cotangent, attention_mask=mask.long())
    assert len(found) == len(model.model.layers) + 1
    assert all((gradient[~mask] == 0).all() for gradient in found)
    bounds = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    packed = state_gradients(model, ids[mask][None], cotangent[mask][None], cu_seq_lens_q=bounds)
    alone = [
        state_gradients(model, row[real][None], cotangent[n, real][None])
        for n, (row, real) in enumerate(zip(ids, mask, strict=True))
    ]
    for layer, gradient in enumerate(found):
        expected = torch.cat([row[layer][0] for row in alone])
        assert expected.abs().max() > 0
        assert_close(gradient[mask], expected, torch.float64, "gradient")
        assert_close(packed[layer][0], expected, torch.float64, "gradient")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_of_padded_rows_have_gradients_after_a_cache_and_from_a_loss(name: str, training: bool) -> None:
    model, ids = make(name).train(training), torch.randint(VOCAB, (2, 5))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    for arguments in ({"past_key_values": cache}, {"labels": ids}):
        outputs = model(ids, attention_mask=mask, output_hidden_states=True, **arguments)
        for state in outputs.hidden_states:
            state.retain_grad()
        (outputs.logits.square().sum() if "labels" not in arguments else outputs.loss).backward()
        assert all(state.grad is not None and state.grad.abs().max() > 0 for state in outputs.hidden_states)


@pytest.mark.parametrize("name", CONFIGS)
def test_asking_for_hidden_states_changes_no_bit(name: str) -> None:
    model, ids = make(name), torch.randint(VOCAB, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]])
    for real, arguments in ((mask, {"attention_mask": mask}), (torch.ones_like(mask), {})):
        asked, plain = (model(ids, output_hidden_states=asks, **arguments) for asks in (True, False))
        assert torch.equal(asked.logits, plain.logits)
        assert plain.hidden_states is None
        assert torch.equal(asked.hidden_states[0], model.model.embed_tokens(ids) * real[..., None])
