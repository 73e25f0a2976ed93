"""A static cache generates what a dynamic one does, in place; on a GPU in a CUDA graph."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

from m2rnn.models import M2RNNCache, M2RNNForCausalLM
from m2rnn.models.cache import CACHE_NAME
from m2rnn.models.capture import CapturedDecoding
from tests.models.small import CONFIGS, VOCAB, make
from tests.tolerances import assert_close

PROMPT = 5
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
LEFT_PADDED = torch.arange(PROMPT) >= PROMPT - torch.tensor([5, 2, 4])[:, None]


def make_on(device: str, *arguments, **options) -> M2RNNForCausalLM:
    """In float64, or float32 on a GPU, whose fastest kernels know no float64."""
    return make(*arguments, dtype=torch.float64 if device == "cpu" else torch.float32, **options).to(device)


def prompts(rows: int, device: str = "cpu") -> Tensor:
    return torch.randint(3, VOCAB, (rows, PROMPT)).to(device)


def generate(model: M2RNNForCausalLM, ids: Tensor, **arguments) -> Tensor:
    torch.manual_seed(7)
    arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False} | arguments
    return model.generate(ids, **arguments)


def assert_same(model: M2RNNForCausalLM, ids: Tensor, **arguments) -> None:
    expected = generate(model, ids, **arguments)
    assert torch.equal(generate(model, ids, cache_implementation="static", **arguments), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 8},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"prefill_chunk_size": 2},
    ],
    ids=["greedy", "sample", "beams", "beam sample", "chunked prefill"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_static_generation_equals_dynamic(name: str, mode: dict, device: str) -> None:
    model = make_on(device, name)
    for rows in (2, 1, 2):  # with the tensors of the call before, where they fit
        assert_same(model, prompts(rows, device), **mode)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_of_one_token(name: str, device: str) -> None:
    model = make_on(device, name)
    for mask in ([[1], [1]], [[1], [0]]):  # the first prompt of a new cache, then of one that is kept
        assert_same(model, prompts(2, device)[:, :1], attention_mask=torch.tensor(mask, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("name", CONFIGS)
def test_left_padded_rows(name: str, mode: dict, device: str) -> None:
    model, mask = make_on(device, name), LEFT_PADDED.long().to(device)
    assert_same(model, prompts(3, device), attention_mask=mask, **mode)
    assert_same(model, prompts(3, device), attention_mask=mask.flip(0), **mode)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_goes_on_from_a_static_cache(name: str, device: str) -> None:
    model, ids, mask = make_on(device, name), prompts(3, device), LEFT_PADDED.long().to(device)
    whole = generate(model, ids, attention_mask=mask, max_new_tokens=9, min_new_tokens=9)
    first = generate(
        model, ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True,
        **{CACHE_NAME: static_cache(model, 20)},
    )  # fmt: skip
    assert first.past_key_values.get_seq_length() == PROMPT + 3
    rest = generate(
        model, torch.cat([first.sequences, whole[:, PROMPT + 4 : PROMPT + 6]], 1),  # three tokens, then one at a time
        attention_mask=torch.cat([mask, torch.ones(3, 6, dtype=torch.long, device=device)], 1),
        max_new_tokens=3, min_new_tokens=3, **{CACHE_NAME: first[CACHE_NAME]},
    )  # fmt: skip
    assert torch.equal(rest, whole)


def static_cache(model: M2RNNForCausalLM, length: int) -> M2RNNCache:
    return M2RNNCache(model.config.num_hidden_layers, length)


def test_returned_caches_are_the_callers() -> None:
    model, ids = make(), prompts(2)
    arguments = {"cache_implementation": "static", "return_dict_in_generate": True}
    cache = generate(model, ids, **arguments).past_key_values
    kept = [x.clone() for layer in cache.layers for x in layer.state if x is not None]
    generate(model, prompts(2), **arguments)
    generate(model, prompts(2), cache_implementation="static")
    states = [x for layer in cache.layers for x in layer.state if x is not None]
    assert all(torch.equal(x, y) for x, y in zip(states, kept, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_single_tokens_stay_in_place(name: str) -> None:
    model, cache = make(name), static_cache(make(name), PROMPT + 3)
    model(prompts(2), past_key_values=cache)
    places = [x.data_ptr() for layer in cache.layers for x in layer.state if x is not None]
    for _ in range(3):
        model(prompts(2)[:, :1], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert [x.data_ptr() for layer in cache.layers for x in layer.state if x is not None] == places
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = prompts(2)
    assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, torch.float64, "output")
    assert [x.data_ptr() for layer in cache.layers for x in layer.state if x is not None] == places
    assert cache.allocations == len(cache.layers)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_call_without_use_cache_leaves_the_cache_as_it_was(name: str) -> None:
    model, ids = make(name), prompts(2)
    cache = static_cache(model, PROMPT)  # no room for more is needed
    model(ids, past_key_values=cache)
    for token in (ids[:, :1], ids[:, 1:2]):
        logits = model(token, past_key_values=cache, use_cache=False).logits
        assert_close(logits, model(torch.cat([ids, token], 1)).logits[:, -1:], torch.float64, "output")
        assert cache.get_seq_length() == PROMPT


def test_a_prompt_beyond_the_cache_is_an_error() -> None:
    model = make("rope")
    with pytest.raises(ValueError, match="a static cache of 3 tokens cannot hold 5"):
        model(prompts(1), past_key_values=static_cache(model, 3))


@torch.no_grad()
def test_a_token_beyond_the_cache_is_an_error_where_states_grow() -> None:
    for name in ("rope", "hybrid", "m2rnn"):
        model = make(name)
        cache = static_cache(model, PROMPT + 1)
        model(prompts(2), past_key_values=cache)
        model(prompts(2)[:, :1], past_key_values=cache)
        if name == "m2rnn":
            model(prompts(2)[:, :1], past_key_values=cache)
            continue
        with pytest.raises(ValueError, match="a static cache of 6 tokens is full"):
            model(prompts(2)[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="a static cache of 6 tokens is full"):
        generate(model := make("hybrid"), prompts(1), **{CACHE_NAME: static_cache(model, 6)})


def test_inference_mode_may_come_and_go() -> None:
    """Its tensors cannot be written to outside of it."""
    model, ids = make(), prompts(2)
    expected = generate(model, ids)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert torch.equal(generate(model, ids, cache_implementation="static"), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_kept_cache_grows_and_follows_the_models_dtype(name: str) -> None:
    model, ids = make(name, torch.float32), prompts(2)
    for tokens in (3, 12):
        assert_same(model, ids, max_new_tokens=tokens, min_new_tokens=tokens)
    assert_same(model.double(), ids)
    states = [x for layer in model._captured._cache.layers for x in layer.state if x is not None]
    assert all(x.dtype == torch.float64 for x in states if x.is_floating_point())


def test_copies_and_pickles_of_a_model_generate() -> None:
    model, ids = make(), prompts(1)
    expected = generate(model, ids, cache_implementation="static")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generate(other, ids, cache_implementation="static"), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_decoding_compiles_without_graph_breaks(device: str) -> None:
    torch.compiler.reset()
    mixers = ["m2rnn", "attention", "gru", "gated_deltanet", "mamba2"]
    model, ids = make_on(device, "m2rnn", mixers=mixers), prompts(2, device)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    expected = generate(model, ids, max_new_tokens=5, min_new_tokens=5)
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "cache_implementation": "static"}
    assert torch.equal(generate(model, ids, compile_config=config, **arguments), expected)


def test_a_graph_is_dropped_where_its_surroundings_change(monkeypatch: pytest.MonkeyPatch) -> None:
    captured, model = CapturedDecoding(), make()

    def is_kept() -> bool:
        captured.start(model)
        return captured._graph is not None

    def move() -> None:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())

    changes = [
        move,
        model.train,
        lambda: monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True),  # in float16
        lambda: monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16),
        lambda: monkeypatch.setattr(torch, "is_inference_mode_enabled", lambda: True),
    ]
    is_kept()
    for change in changes:
        captured._graph = captured._captured_for = "of these surroundings"
        assert is_kept()
        change()
        assert not is_kept()
        assert captured._captured_for is None


@needs_gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_come_from_one_graph(name: str) -> None:
    """Captured once, for all calls that fit; captured anew where the weights have moved."""
    model = make(name, torch.float32).to("cuda")
    generate(model, prompts(2, "cuda"), cache_implementation="static")
    graph = model._captured._graph
    assert graph is not None
    assert_same(model, prompts(2, "cuda"))
    assert_same(model, prompts(2, "cuda"), max_new_tokens=7, min_new_tokens=7)
    assert model._captured._graph is graph
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert_same(model, prompts(2, "cuda"))
    assert model._captured._graph is graph
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    assert_same(model, prompts(2, "cuda"))
    assert model._captured._graph is not graph
    assert_same(model, prompts(2, "cuda"), disable_compile=True)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_the_graph_repeats_eager_logits(rows: int, dtype: torch.dtype) -> None:
    options = {"m2rnn": {"num_heads": 6, "key_dim": 16, "value_dim": 16}, "attention": {"num_heads": 4}}
    model = make("m2rnn", dtype, mixers=["m2rnn", "attention", "m2rnn"], mixer_options=options).to("cuda")
    arguments = {"cache_implementation": "static", "output_logits": True, "return_dict_in_generate": True}
    ids = prompts(rows, "cuda")
    captured = generate(model, ids, **arguments)
    eager = generate(model, ids, disable_compile=True, **arguments)
    assert torch.equal(captured.sequences, eager.sequences)
    assert torch.equal(torch.stack(captured.logits), torch.stack(eager.logits))


def test_a_model_over_several_gpus_generates_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    places = [SimpleNamespace(device=torch.device("cuda", n)) for n in range(2)]
    monkeypatch.setattr(model, "parameters", lambda: iter(places))
    assert model.get_compiled_call(None) == model.__call__


@pytest.mark.parametrize("device", DEVICES)
def test_experts_that_no_graph_can_hold_generate_without_one(device: str) -> None:
    model = make_on(device, "moe")
    model.set_experts_implementation("eager")
    assert_same(model, prompts(2, device))
    assert model._captured._graph is None
