"""Repeated n-grams are those that a loop finds; copying is scored by definition; attention that is off adds nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2rnn.evaluation import recall
from m2rnn.evaluation.language_model import in_memory
from m2rnn.evaluation.recall import attention_off, copying, repeated, split_losses, text_ids
from m2rnn.evaluation.text import Text
from m2rnn.layers import Attention
from tests.evaluation.models import naive_loss
from tests.models.small import VOCAB, make


def repeated_slowly(tokens, ends, ngram):
    """By a set of what each document had before, token after token."""
    found, begin = [], 0
    for end in ends:
        document, seen = [int(token) for token in tokens[begin:end]], set()
        for place in range(len(document)):
            gram = tuple(document[place - ngram : place + 1]) if place >= ngram else None
            found.append(gram is not None and gram in seen)
            seen.add(gram)
        begin = end
    return found


@given(
    documents=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=6),
    ngram=st.integers(1, 5),
    scale=st.sampled_from([1, 100_000]),
    part=st.sampled_from([1, 30, 2**22]),
    codes=st.sampled_from([10, 2**63]),
)
def test_repeated_is_what_a_loop_finds(documents, ngram, scale, part, codes):
    tokens = np.concatenate(documents).astype(np.uint32) * scale
    ends = np.cumsum([len(document) for document in documents])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "TOKENS_PER_PART", part)
        patch.setattr(recall, "CODES", codes)
        found = repeated(tokens, ends, ngram)
    assert found.dtype == bool
    assert found.tolist() == repeated_slowly(tokens, ends, ngram)


def test_no_ngram_reaches_over_the_end_of_a_document():
    one = np.array([5, 6, 7, 8, 5, 6, 7, 8])
    assert repeated(one, np.array([8])).nonzero()[0].tolist() == [7]
    assert not repeated(one, np.array([4, 8])).any()
    assert not repeated(one, np.array([6, 8])).any()
    assert repeated(np.array([3] * 6), np.array([6]), 2).tolist() == [False] * 3 + [True] * 3  # they may overlap
    assert not repeated(np.array([], np.uint16), np.array([], np.int64)).size


def test_large_vocabularies_and_long_ngrams_fit_in_the_codes():
    rng = np.random.default_rng(0)
    tokens = rng.choice([0, 2**31 - 1, 2**31 - 2], 500).astype(np.uint32)
    ends = np.array([100, 101, 500])
    for ngram in (1, 2, 3, 8):
        assert repeated(tokens, ends, ngram).tolist() == repeated_slowly(tokens, ends, ngram)


def test_an_ngram_has_at_least_one_token():
    with pytest.raises(ValueError, match="ngram 0: expected at least 1"):
        repeated(np.arange(4), np.array([4]), 0)


def test_losses_are_split_into_repeated_tokens_and_others():
    losses = np.array([-1, 2, 4, -1, 1, 3], np.float32)
    found = split_losses(losses, np.array([True, True, False, False, False, False]))
    assert found["repeated"] == {"tokens": 1, "loss": 2.0, "perplexity": pytest.approx(np.exp(2))}
    assert found["others"] == {"tokens": 3, "loss": pytest.approx(8 / 3), "perplexity": pytest.approx(np.exp(8 / 3))}
    assert split_losses(losses, np.zeros(6, bool))["repeated"] == {"tokens": 0, "loss": None, "perplexity": None}


@pytest.mark.parametrize(("batch", "segment"), [(None, None), (2, 3), (1, 5)])
@pytest.mark.parametrize("name", ["hybrid", "linear"])
def test_copying_scores_the_second_half_of_a_sequence_read_twice(name, batch, segment):
    model, ids = make(name), [3, 5, 8, 13, 21]
    found = copying(in_memory(model), ids, 6, sequences=5, seed=7, batch=batch, segment=segment)
    half = np.random.default_rng(7).choice(ids, (5, 6))
    for row in range(5):
        sequence = [*half[row], *half[row]]
        for place in range(6):
            seen = [*map(int, sequence[: 6 + place + 1])]
            assert found.losses[row, place] == pytest.approx(naive_loss(model, seen), rel=1e-6)
            with torch.no_grad():
                guess = int(model(input_ids=torch.tensor([seen[:-1]])).logits[0, -1].argmax())
            assert found.right[row, place] == (guess == seen[-1])
    assert found.loss == pytest.approx(found.losses.mean())
    assert found.accuracy == found.right.mean()


def test_copying_draws_the_same_for_every_model_and_uses_the_given_ids_alone():
    seen = []

    class Watching(type(make("m2rnn").model)):
        def forward(self, input_ids=None, **kwargs):
            seen.append(input_ids.clone())
            return super().forward(input_ids=input_ids, **kwargs)

    for name in ("m2rnn", "rope"):
        model = in_memory(make(name))
        model.model.model.__class__ = Watching
        copying(model, np.array([4, 9]), 10, sequences=64, batch=64)
    assert torch.equal(seen[0], seen[1])
    assert set(seen[0].unique().tolist()) == {4, 9}
    assert torch.equal(seen[0][:, :9], seen[0][:, 10:])


def test_a_model_that_copies_is_all_right():
    """A mock that knows the length: it predicts what stood ``length`` tokens ago."""
    model = in_memory(make("m2rnn"))
    length = 8

    class Shifted(type(model.model.model)):
        def forward(self, input_ids=None, use_cache=None, **kwargs):
            outputs = super().forward(input_ids=input_ids, use_cache=use_cache, **kwargs)
            before = torch.nn.functional.pad(input_ids, (length - 1, 0))[:, : input_ids.shape[1]]
            outputs.last_hidden_state = 50.0 * torch.nn.functional.one_hot(before, VOCAB).double()
            return outputs

    model.model.model.__class__ = Shifted
    model.head = torch.nn.Identity()
    found = copying(model, [3, 4, 5, 6], length)
    assert found.accuracy == 1
    assert found.loss == pytest.approx(0, abs=1e-15)


def test_what_cannot_be_copied_is_an_error():
    model = in_memory(make("m2rnn"))
    with pytest.raises(ValueError, match="64 sequences of 0 tokens"):
        copying(model, [1], 0)
    for ids in ([], [VOCAB], [-1]):
        with pytest.raises(ValueError, match=f"from 0 to {VOCAB - 1}"):
            copying(model, ids, 3)


def test_ids_of_text_leave_marks_and_special_tokens_out():
    sizes = np.array([1, 2, 0, 3, 1])
    text = Text(np.array([0]), np.array([1]), 5, (4,), 1, sizes)
    assert text_ids(text).tolist() == [0, 1, 3]


def test_attention_that_is_off_is_attention_whose_projection_is_zero():
    model = make("m2rnn", mixers=["m2rnn", "attention", "attention"])
    ids = torch.arange(3, 17)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with attention_off(model):
            off = model(input_ids=ids).logits
            cached = model(input_ids=ids[:, :6], use_cache=True)
            rest = model(input_ids=ids[:, 6:], past_key_values=cached.past_key_values).logits
        assert torch.equal(model(input_ids=ids).logits, before)
        for block in model.model.layers:
            if isinstance(block.mixer, Attention):
                block.mixer.out_proj.weight.zero_()
        expected = model(input_ids=ids).logits
    assert torch.equal(off, expected)
    assert not torch.allclose(off, before)
    torch.testing.assert_close(torch.cat([cached.logits, rest], 1), expected)


def test_attention_is_on_again_after_an_error():
    model = make("hybrid")
    with pytest.raises(KeyError), attention_off(model):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())
