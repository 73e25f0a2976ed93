"""Compiled blocks are compiled for a new kind of call, not for a new length; and no kind is left uncompiled."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from m2rnn.models import M2RNNForCausalLM
from tests.models.small import OPTIONS, VOCAB, make
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of dynamo's own
#: kinds of blocks: mixers, MLPs
HYBRIDS = {
    "two kinds": (["m2rnn", "attention", "m2rnn", "attention"], ["swiglu"] * 4),
    "three kinds": (["m2rnn", "attention", "gru"], ["swiglu", "none", "swiglu"]),
    "six kinds": (list(OPTIONS), ["swiglu"] * 6),
}


@pytest.fixture(autouse=True)
def the_limit_is_dynamos_and_an_error() -> Iterator[None]:
    from torch._dynamo import config

    torch.compiler.reset()
    with config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        yield


def compiled_hybrid(name: str) -> tuple[M2RNNForCausalLM, Any]:
    from torch._dynamo.testing import CompileCounterWithBackend

    mixers, mlps = HYBRIDS[name]
    options = {mixer: dict(OPTIONS[mixer]) for mixer in mixers}
    options["attention"] |= {"rope_theta": 100.0}
    model, counter = make("m2rnn", mixers=mixers, mlps=mlps, mixer_options=options), CompileCounterWithBackend("eager")
    for block in model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    return model, counter


def call(model: M2RNNForCausalLM, steps: int) -> None:
    """A step of training, or of evaluation; compared with the uncompiled model."""
    ids = torch.randint(VOCAB, (2, steps))
    with torch.set_grad_enabled(model.training):
        y = model.model(ids, use_cache=False).last_hidden_state
        with torch.compiler.set_stance("force_eager"):
            assert_close(y, model.model(ids, use_cache=False).last_hidden_state, torch.float64, "output")
        if model.training:
            y.square().sum().backward()


@pytest.mark.parametrize("name", ["two kinds", "three kinds"])
def test_each_kind_of_block_is_compiled_for_a_length_for_any_and_for_one_token(name: str) -> None:
    model, counter = compiled_hybrid(name)
    kinds = len(set(zip(*HYBRIDS[name], strict=True)))
    found = {}
    for training in (True, False):
        model.train(training)
        for steps in (7, 12, 1, 5, 16, 9, 1):
            call(model, steps)
            found[training, steps] = counter.frame_count
    assert found == {
        **{(True, 7): kinds, (True, 12): 2 * kinds, (True, 1): 3 * kinds},
        **{(True, steps): 3 * kinds for steps in (5, 16, 9, 1)},
        # Without gradients; dynamo knows by now that lengths change
        **{(False, steps): 4 * kinds for steps in (7, 12)},
        **{(False, steps): 5 * kinds for steps in (1, 5, 16, 9)},
    }


def test_all_six_mixers_in_one_model_stay_within_the_limit() -> None:
    """Even those whose plain recurrences are compiled for each length anew."""
    model, counter = compiled_hybrid("six kinds")
    for calls, steps in enumerate((7, 12, 1), 1):
        call(model.train(), steps)
        assert counter.frame_count == 6 * calls
    call(model, 7)
    assert counter.frame_count == 6 * 3


def test_a_limit_of_the_callers_is_kept() -> None:
    from torch._dynamo import config

    model, _ = compiled_hybrid("three kinds")
    limits: list[Any] = []
    with config.patch(recompile_limit=50), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda *_, **options: limits.append(options))
        model.model.layers[0].compile()
        assert config.recompile_limit == 50
        assert limits.pop().get("recompile_limit", 50) == 50
        model.model.layers[0].compile(recompile_limit=3)
        assert limits.pop()["recompile_limit"] == 3
        assert config.recompile_limit == 50


def test_compiled_blocks_generate_with_either_cache_and_new_lengths_need_nothing_new() -> None:
    model, counter = compiled_hybrid("six kinds")
    compiled: dict[Any, list[int]] = {}
    for cache in (None, "static"):
        for steps in (5, 9, 9, 5):
            options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
            ids = torch.randint(3, VOCAB, (2, steps))
            found = model.generate(ids, **options)
            compiled.setdefault(cache, []).append(counter.frame_count)
            with torch.compiler.set_stance("force_eager"):
                assert torch.equal(found, model.generate(ids, **options))
    for counts in compiled.values():
        assert counts[1:] == [counts[1]] * 3
    assert counter.frame_count <= 6 * 6
