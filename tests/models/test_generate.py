"""generate() with the cache gives what it gives without, in every mode."""

import copy

import pytest
import torch
from torch import Tensor

from m2rnn.models import M2RNNCache
from m2rnn.models.cache import CACHE_NAME
from tests.models.small import CONFIGS, VOCAB, make
from tests.tolerances import assert_close

PROMPT = 5


def prompts(rows: int) -> Tensor:
    return torch.randint(3, VOCAB, (rows, PROMPT))


def generate(model, ids: Tensor, **arguments) -> Tensor:
    torch.manual_seed(7)
    return model.generate(ids, max_new_tokens=12, **arguments)


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 8},
        {"num_beams": 4, "do_sample": False, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True},
    ],
    ids=["greedy", "sample", "several samples", "beams", "beam sample"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_generation_equals_uncached(name: str, mode: dict) -> None:
    model, ids = make(name), prompts(2)
    with_cache = generate(model, ids, **mode)
    assert torch.equal(with_cache, generate(model, ids, use_cache=False, **mode))
    assert with_cache.unique().numel() > 4, "a model that repeats itself shows nothing"


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("name", CONFIGS)
def test_left_padded_rows_generate_what_each_alone_does(name: str, mode: dict, use_cache: bool) -> None:
    model, ids = make(name), prompts(3)
    kept = [5, 2, 4]
    mask = torch.arange(PROMPT) >= PROMPT - torch.tensor(kept)[:, None]
    batch = model.generate(
        ids, attention_mask=mask.long(), max_new_tokens=8, min_new_tokens=8, use_cache=use_cache, **mode
    )
    for row, prompt, length in zip(batch, ids, kept, strict=True):
        alone = model.generate(prompt[None, -length:], max_new_tokens=8, min_new_tokens=8, **mode)
        assert torch.equal(row[PROMPT:], alone[0, length:])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_goes_on_from_a_returned_cache(name: str, padded: bool) -> None:
    model, ids = make(name), prompts(2)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    arguments = {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=9, min_new_tokens=9, **arguments).sequences
    first = model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, **arguments)
    assert isinstance(first.past_key_values, M2RNNCache)
    assert first.past_key_values.get_seq_length() == PROMPT + 3
    rest = model.generate(
        first.sequences,
        attention_mask=torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1),
        max_new_tokens=5,
        min_new_tokens=5,
        **arguments,
        **{CACHE_NAME: copy.deepcopy(first[CACHE_NAME])},
    )
    assert torch.equal(rest.sequences, whole)


def test_chunked_prefill_and_embeddings_as_prompt() -> None:
    model, ids = make(), prompts(2)
    expected = generate(model, ids, do_sample=False)
    assert torch.equal(generate(model, ids, do_sample=False, prefill_chunk_size=2), expected)
    embedded = generate(model, None, inputs_embeds=model.model.embed_tokens(ids), do_sample=False)
    assert torch.equal(embedded, expected[:, PROMPT:])


def test_scores_are_the_logits_of_the_whole_sequence() -> None:
    model, ids = make(), prompts(2)
    outputs = model.generate(
        ids,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = model(outputs.sequences).logits[:, PROMPT - 1 : -1]
    assert_close(torch.stack(outputs.logits, 1), whole, torch.float32, "output")


@torch.no_grad()
def test_cache_rows_can_be_selected_and_repeated() -> None:
    model, ids = make(), prompts(3)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    assert cache.batch_size == 3
    following = torch.randint(VOCAB, (3, 2))
    expected = model(following, past_key_values=copy.deepcopy(cache)).logits
    order = torch.tensor([2, 0, 0])
    for change, rows in (
        (lambda c: c.reorder_cache(order), order),
        (lambda c: c.batch_select_indices(order), order),
        (lambda c: c.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        changed = copy.deepcopy(cache)
        change(changed)
        assert changed.batch_size == len(rows)
        logits = model(following[rows], past_key_values=changed).logits
        assert_close(logits, expected[rows], torch.float64, "output")
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size) == (0, -1)
    assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, torch.float64, "output")


def test_attention_caches_can_be_cropped_and_recurrent_ones_say_that_they_cannot() -> None:
    model, ids = make("rope"), prompts(2)
    for crop in (-2, PROMPT - 2):
        cache = model(ids).past_key_values
        assert cache.is_croppable
        cache.crop(crop)
        assert cache.get_seq_length() == PROMPT - 2
        again = model(ids[:, -2:], past_key_values=cache).logits
        assert_close(again, model(ids).logits[:, -2:], torch.float64, "output")
    cache.crop(-99)
    assert cache.get_seq_length() == 0
    cache = make()(ids).past_key_values
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(ValueError, match="recurrent layers cannot be cropped"):
        cache.crop(-1)


def test_assisted_generation_where_the_states_allow_it() -> None:
    ids = prompts(1)
    model, assistant = make("rope"), make("rope", initializer_range=0.31)
    expected = generate(model, ids, do_sample=False)
    assert torch.equal(generate(model, ids, do_sample=False, assistant_model=assistant), expected)
    with pytest.raises(ValueError, match="stateful"):
        generate(make("hybrid"), ids, do_sample=False, assistant_model=assistant)


def test_other_cache_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="cache_implementation must be None or 'static', got 'quantized'"):
        generate(make(), prompts(1), cache_implementation="quantized")
    with pytest.raises(ValueError, match="prefill_chunk_size must be at least 2"):
        generate(make(), prompts(1), cache_implementation="static", prefill_chunk_size=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_generation_runs_and_keeps_recurrent_states_in_float32(dtype: torch.dtype) -> None:
    model = make(dtype=dtype)
    outputs = model.generate(prompts(2), max_new_tokens=6, return_dict_in_generate=True)
    m2rnn, attention, _ = (layer.state for layer in outputs.past_key_values.layers)
    assert m2rnn.recurrent.dtype == torch.float32
    assert m2rnn.conv.dtype == attention.keys.dtype == dtype


@torch.no_grad()
def test_the_cache_has_two_names() -> None:
    """transformers' own until 5.23 and since."""
    model, ids = make("hybrid"), torch.randint(VOCAB, (2, 7))
    whole, first = model(ids).logits[:, 5:], model(ids[:, :5])
    for name in ("past_key_values", "cache"):
        rest = model(ids[:, 5:], **{name: copy.deepcopy(first[CACHE_NAME])})
        assert_close(rest.logits, whole, torch.float64, "output")
    with pytest.raises(ValueError, match="past_key_values or cache, which are two names of the same thing, not both"):
        model(ids, cache=first[CACHE_NAME], past_key_values=first[CACHE_NAME])
