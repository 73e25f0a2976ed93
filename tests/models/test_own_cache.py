"""Caches of transformers: an empty one is taken over, and its owner sees the states in it."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from m2rnn.models import M2RNNCache
from m2rnn.models.cache import CACHE_NAME
from tests.models.small import CONFIGS, VOCAB, make
from tests.tolerances import assert_close


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_an_empty_dynamic_cache_becomes_one_of_ours_in_the_hands_of_its_owner(name: str, with_config: bool) -> None:
    model, ids = make(name), torch.randint(3, VOCAB, (2, 7))
    whole = model(ids).logits
    for model_or_base in (model, model.model):
        cache = DynamicCache(config=model.config) if with_config else DynamicCache()
        outputs = model_or_base(ids[:, :4], **{CACHE_NAME: cache}, use_cache=True)
        assert outputs[CACHE_NAME] is cache
        assert (type(cache), cache.get_seq_length(), len(cache.layers)) == (M2RNNCache, 4, len(model.config.mixers))
    again = model(ids[:, 4:], **{CACHE_NAME: cache})
    assert_close(again.logits, whole[:, 4:], torch.float64, "output")


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_takes_an_empty_dynamic_cache(name: str) -> None:
    model, ids = make(name), torch.randint(3, VOCAB, (2, 4))
    cache = DynamicCache(config=model.config)
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **{CACHE_NAME: cache}, **arguments), model.generate(ids, **arguments))
    assert cache.get_seq_length() == 8


def test_a_cache_with_something_in_it_and_another_kind_are_refused() -> None:
    model, ids = make("hybrid"), torch.randint(3, VOCAB, (2, 4))
    filled = DynamicCache()
    filled.update(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4), 0)
    with pytest.raises(ValueError, match=r"got a DynamicCache with keys and values: .*In place of prefix tuning"):
        model(ids, **{CACHE_NAME: filled})
    with pytest.raises(ValueError, match="or an empty DynamicCache, got StaticCache"):
        model(ids, **{CACHE_NAME: StaticCache(model.config, 8)})
