"""m2rnn.swap on small random models of each family: the start, decoding, padding, training, saving, errors."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import m2rnn
from m2rnn.convert.families import SwappedMixer, decoder_layers, mixer_of
from m2rnn.models.cache import CACHE_NAME
from tests.convert.hybrids import CLASSES, VOCAB, WITH_EXPERTS, make, needs_swap
from tests.tolerances import assert_close

pytestmark = needs_swap
OPTIONS: dict[str, Any] = {"num_heads": 6, "key_dim": 8, "value_dim": 8}
ATTENTION, LAST_ATTENTION = 2, 4
RECURRENT = {family: [0, 1, 5] if family == "nemotron_h" else [0, 1, 3] for family in CLASSES}
FAMILIES = pytest.mark.parametrize("family", CLASSES)


def ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length))


def swapped(family: str, layers: list[int], dtype: torch.dtype = torch.float64, **options: Any) -> PreTrainedModel:
    """A swapped model whose new layers do something."""
    model = make(family, dtype)
    for name, parameter in m2rnn.swap(model, layers, **OPTIONS | options).items():
        if name.endswith("out_proj.weight"):
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model


def load(path: Path, family: str, **arguments: Any) -> PreTrainedModel:
    eager = {"experts_implementation": "eager"} if family in WITH_EXPERTS else {}
    return m2rnn.load_swapped(path, **eager, **arguments).eval()


@FAMILIES
@torch.no_grad()
def test_the_start_is_the_model_without_the_mixer(family: str) -> None:
    model, tokens = make(family), ids()
    whole = model(tokens).logits
    for layer in (0, ATTENTION):
        mixer = mixer_of(model, layer)

        def nothing(module: Any, args: Any, output: Any) -> Any:
            return (torch.zeros_like(output[0]), None) if isinstance(output, tuple) else torch.zeros_like(output)

        handle = mixer.register_forward_hook(nothing)
        without = model(tokens).logits
        handle.remove()
        changed = copy.deepcopy(model)
        m2rnn.swap(changed, [layer], **OPTIONS)
        assert torch.equal(changed(tokens).logits, without)
        assert (whole - without).norm() > 1e-3


@FAMILIES
@torch.no_grad()
def test_decoding_equals_the_full_forward(family: str) -> None:
    model, tokens = swapped(family, [*RECURRENT[family], ATTENTION]), ids(length=12)
    whole = model(tokens).logits
    outputs = model(tokens[:, :4], use_cache=True)
    cache, parts = outputs[CACHE_NAME], [outputs.logits]
    for start, end in ((4, 5), (5, 6), (6, 9), (9, 10), (10, 12)):
        piece = {"position_ids": torch.arange(start, end).expand(2, -1), CACHE_NAME: cache}
        parts.append(model(tokens[:, start:end], **piece, use_cache=True).logits)
    # The norms of all families, and the router of one, compute in float32.
    assert_close(torch.cat(parts, 1), whole, torch.float32, "output")


@FAMILIES
@torch.no_grad()
def test_the_new_layer_in_pieces_equals_the_whole(family: str) -> None:
    model = swapped(family, [0])
    mixer, x = mixer_of(model, 0), torch.randn(2, 12, 32, dtype=torch.float64)
    cache = model(ids(2, 3), use_cache=True)[CACHE_NAME]
    cache.reset()
    bounds = [0, 2, 3, 4, 8, 9, 12]
    pieces = [mixer(x[:, start:end], cache) for start, end in itertools.pairwise(bounds)]
    assert_close(torch.cat(pieces, 1), mixer(x), torch.float64, "output")


@FAMILIES
@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True}])
def test_generation_with_the_cache_equals_that_without(family: str, mode: dict[str, Any]) -> None:
    model, prompt = swapped(family, [0, ATTENTION]), ids(length=5)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        found.append(model.generate(prompt, max_new_tokens=10, eos_token_id=None, use_cache=use_cache, **mode))
    assert torch.equal(*found)
    assert found[0].unique().numel() > 4, "a model that repeats itself shows nothing"


@FAMILIES
@pytest.mark.parametrize("conv_size", [None, 1, 2, 7])
def test_any_width_of_the_convolution_decodes(family: str, conv_size: int | None) -> None:
    model, prompt = swapped(family, [0, ATTENTION], conv_size=conv_size), ids(length=5)
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, use_cache=False, **arguments)
    assert torch.equal(model.generate(prompt, **arguments), expected)


@FAMILIES
def test_left_padded_rows_generate_what_each_alone_does(family: str) -> None:
    model, prompts, kept = swapped(family, [*RECURRENT[family], ATTENTION]), ids(3, 6), [6, 2, 4]
    mask = (torch.arange(6) >= 6 - torch.tensor(kept)[:, None]).long()
    arguments = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False, "eos_token_id": None}
    batch = model.generate(prompts, attention_mask=mask, **arguments)
    for row, prompt, length in zip(batch, prompts, kept, strict=True):
        alone = model.generate(prompt[None, -length:], **arguments)
        assert torch.equal(row[6:], alone[0, length:])


def packings(lengths: list[int]) -> dict[str, dict[str, Tensor]]:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].int()
    return {"cu_seq_lens_q": {"cu_seq_lens_q": bounds.int()}, "seq_idx": {"seq_idx": rows}}


@pytest.mark.parametrize("how", ["cu_seq_lens_q", "seq_idx"])
@torch.no_grad()
def test_packed_sequences_see_nothing_of_one_another_and_the_last_one_goes_on(how: str) -> None:
    model = swapped("qwen3_next", [0])
    mixer, lengths = mixer_of(model, 0), [3, 5, 2]
    pieces = [torch.randn(1, n, 32, dtype=torch.float64) for n in lengths]
    alone = torch.cat([mixer(x) for x in pieces], 1)
    row = torch.cat(pieces, 1)
    cache = model(ids(1, 2), use_cache=True)[CACHE_NAME]
    cache.reset()
    assert_close(mixer(row, cache, **packings(lengths)[how]), alone, torch.float64, "output")
    more = torch.randn(1, 3, 32, dtype=torch.float64)
    expected = mixer(torch.cat([pieces[-1], more], 1))[:, lengths[-1] :]
    again = packings([2, 1])[how]  # the first of these two goes on with the sequence in the cache
    saved = copy.deepcopy(cache)
    assert_close(mixer(more, cache), expected, torch.float64, "output")
    both = torch.cat([mixer(more[:, :2], copy.deepcopy(saved)), mixer(more[:, 2:])], 1)
    assert_close(mixer(more, saved, **again), both, torch.float64, "output")
    with pytest.raises(ValueError, match="packs sequences in one row, got a batch of 2"):
        mixer(row.expand(2, -1, -1), cu_seq_lens_q=torch.tensor([0, 10]))


@torch.no_grad()
def test_masked_slots_are_skipped_and_give_zeros() -> None:
    mixer = mixer_of(swapped("qwen3_next", [0]), 0)
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1] * 6])
    y = mixer(x, attention_mask=mask)
    assert_close(y[0, mask[0] == 1], mixer(x[:1, mask[0] == 1])[0], torch.float64, "output")
    assert_close(y[1], mixer(x[1:])[0], torch.float64, "output")
    assert y[0, mask[0] == 0].abs().max() == 0


@FAMILIES
def test_training_with_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    tokens = ids()
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = swapped(family, [0, ATTENTION]).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in m2rnn.swapped_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0, name
        assert_close(gradients[1][name], gradient, torch.float64, "gradient", name)


@FAMILIES
@torch.no_grad()
def test_a_saved_model_loads_as_it_was(family: str, tmp_path: Path) -> None:
    model, tokens = swapped(family, [0]), ids()
    for name, parameter in m2rnn.swap(model, [ATTENTION], num_heads=4, conv_size=None).items():
        if name.endswith("out_proj.weight"):
            torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, family)
    assert type(loaded) is type(model)
    assert_close(loaded(tokens).logits, model(tokens).logits, torch.float32, "output")
    expected = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.double(), expected[name].double().to(parameter.dtype).double()), name
    assert m2rnn.swapped_parameters(loaded).keys() == m2rnn.swapped_parameters(model).keys()
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".py", ".safetensors"}

    again = tmp_path / "again"
    loaded.save_pretrained(again)
    narrow = load(again, family, dtype=torch.bfloat16)
    mixer = mixer_of(narrow, 0)
    assert (narrow.dtype, mixer.m2rnn.decay_gate.A_log.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(mixer.m2rnn.decay_gate.A_log, mixer_of(model, 0).m2rnn.decay_gate.A_log.float())
    assert narrow.generate(tokens, max_new_tokens=3).shape[1] > tokens.shape[1]


@FAMILIES
def test_the_new_parameters_are_named_as_in_the_model(family: str) -> None:
    model = make(family)
    before = {id(p) for p in model.parameters()}
    new = m2rnn.swap(model, [0], **OPTIONS)
    after = dict(model.named_parameters())
    assert {name for name, p in after.items() if id(p) not in before} == new.keys()
    assert all(after[name] is parameter for name, parameter in new.items())
    replaced = {id(p) for p in mixer_of(model, ATTENTION).parameters()}
    more = m2rnn.swap(model, [ATTENTION], **OPTIONS)
    assert not replaced & {id(p) for p in model.parameters()}
    assert not new.keys() & more.keys()
    assert m2rnn.swapped_parameters(model).keys() == new.keys() | more.keys()
    assert model.config.layer_types[ATTENTION] == "linear_attention"
    assert isinstance(mixer_of(model, ATTENTION), SwappedMixer)


def inputs_and_outputs(model: PreTrainedModel, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        seen.append((inputs, output[0] if isinstance(output, tuple) else output))

    handle = mixer_of(model, layer).register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0]


@FAMILIES
def test_fitting_brings_the_new_layer_to_the_old_one(family: str) -> None:
    batches = [ids(4, 16) for _ in range(3)]
    for layer in (0, ATTENTION) if family == "qwen3_5" else (0,):
        errors = []
        for arguments in ({}, {"calibration": batches, "steps": 0}, {"calibration": batches, "steps": 30}):
            model = make(family, torch.float32)
            x, y = inputs_and_outputs(model, layer, batches[0])
            torch.manual_seed(1)
            m2rnn.swap(model, [layer], **OPTIONS, **arguments)
            with torch.no_grad():
                errors.append(float((mixer_of(model, layer)(x) - y).norm() / y.norm()))
            assert all(p.grad is None for p in model.parameters())
            assert not model.training
        assert errors[0] == 1
        assert errors[1] < 0.99
        assert errors[2] < errors[1] - 0.01


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_keeps_its_mode_and_dtype(training: bool, calibrated: bool) -> None:
    model = make("bamba", torch.bfloat16).train(training)
    new = m2rnn.swap(model, [0], calibration=[ids()] if calibrated else None, steps=1)
    assert {module.training for module in model.modules()} == {training}
    assert {p.dtype for name, p in new.items() if "decay_gate" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
@torch.no_grad()
def test_projections_and_gate_of_a_gated_deltanet_are_taken_over(family: str) -> None:
    model, x = make(family), torch.randn(2, 5, 32, dtype=torch.float64)
    old = mixer_of(model, 0)
    if family == "qwen3_next":
        q, k, v, z, _, a = old.fix_query_key_value_ordering(old.in_proj_qkvz(x), old.in_proj_ba(x))
        qkv, g = torch.cat([y.flatten(2) for y in (q, k, v)], -1), z.flatten(2)
    else:
        qkv, a, g = old.in_proj_qkv(x), old.in_proj_a(x), old.in_proj_z(x)
    m2rnn.swap(model, [0], value_dim=4)
    new = mixer_of(model, 0).m2rnn
    assert (new.num_heads, new.value_dim, new.key_dim, new.num_q_heads) == (8, 4, 8, 2)
    for actual, expected in zip(new.in_proj(x).split(new.proj_sizes, -1), (qkv, a, g), strict=True):
        assert_close(actual, expected, torch.float64, "output")
    decay = torch.exp(-old.A_log.exp() * torch.nn.functional.softplus(a + old.dt_bias))
    assert_close(new.decay_gate(a)[0].exp(), decay, torch.float64, "output")
    assert torch.equal(new.conv.weight, old.conv1d.weight)
    assert new.state_weight.abs().max() == 0


@pytest.mark.parametrize("family", ["granite", "bamba", "nemotron_h"])
@torch.no_grad()
def test_a_mamba2_layer_of_slow_decay_and_small_inputs_is_the_same_up_to_the_norm(family: str) -> None:
    model, x = make(family), torch.randn(2, 12, 32, dtype=torch.float64)
    old = mixer_of(model, 0)
    old.conv1d.bias.zero_()
    old.in_proj.weight.mul_(0.05)  # tanh is nearly the identity
    old.A_log.copy_(torch.tensor([-5.0, -4.5, -4.0, -3.5]))  # 1 - f is nearly A dt
    old.D.copy_(torch.tensor([0.5, 0.0, -0.5, 0.1]))
    scale = old.A_log.exp().repeat_interleave(16)
    seen: list[Tensor] = []

    def gated(module: Any, args: Any, kwargs: Any) -> None:
        y, gate = (*args, *kwargs.values())[:2]
        seen.append(y * torch.nn.functional.silu(gate))

    old.norm.register_forward_pre_hook(gated, with_kwargs=True)
    old(x)
    m2rnn.swap(model, [0], value_dim=8)
    new = mixer_of(model, 0).m2rnn
    new.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0] / scale))
    new(x)
    assert_close(seen[1], seen[0].view_as(seen[1]), torch.bfloat16, "gradient")


@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
def test_sizes_of_the_replaced_mixer_are_the_default_and_sizes_given_win(family: str) -> None:
    model = make(family)
    m2rnn.swap(model, [0])
    wide = mixer_of(model, 0).m2rnn
    assert (wide.value_dim, wide.num_heads, wide.state_weight.abs().max()) == (
        (8, 4, 0) if family == "qwen3_next" else (16, 4, 0)
    )
    m2rnn.swap(model, [1], num_heads=3)
    given = mixer_of(model, 1).m2rnn
    assert (given.num_heads, given.key_dim, given.value_dim) == (3, 64, 16)
    assert torch.equal(given.state_weight[0], torch.eye(16, dtype=torch.float64))
    assert given.in_proj.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.05)
    with pytest.raises(ValueError, match="value_dim \\(3\\) must divide that of the replaced mixer"):
        m2rnn.swap(make(family), [0], value_dim=3)


def test_the_output_projection_is_the_ridge_solution_and_padding_does_not_count() -> None:
    rows = [ids(1, n) for n in (7, 4, 9)]
    padded = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros(3, 9, dtype=torch.long)
    for n, row in enumerate(rows):
        padded[n, : row.shape[1]], mask[n, : row.shape[1]] = row, 1
    weights = []
    for batches in (rows, [{"input_ids": padded, "attention_mask": mask}]):
        model = make("qwen3_next")
        torch.manual_seed(1)
        m2rnn.swap(model, [0], calibration=batches, steps=0, **OPTIONS)
        weights.append(mixer_of(model, 0).m2rnn.out_proj.weight.detach())
    assert_close(weights[1], weights[0], torch.float32, "output")

    model = make("qwen3_next")
    embedded = torch.cat(
        [decoder_layers(model)[0].input_layernorm(model.get_input_embeddings()(row))[0] for row in rows]
    )
    split = embedded.split([row.shape[1] for row in rows])
    outputs = torch.cat([mixer_of(model, 0)(x[None])[0] for x in split])
    new = m2rnn.M2RNN(32, **OPTIONS).double()
    torch.manual_seed(1)
    fresh = make("qwen3_next")
    m2rnn.swap(fresh, [0], **OPTIONS)
    new.load_state_dict(mixer_of(fresh, 0).m2rnn.state_dict())
    features: list[Tensor] = []
    new.out_proj.register_forward_pre_hook(lambda module, args: features.append(args[0][0]))
    for x in split:
        new(x[None])
    F = torch.cat(features).detach()
    ridge = (1e-3 * F.square().sum(0).mean()).sqrt() * torch.eye(F.shape[1], dtype=F.dtype)
    best = torch.linalg.lstsq(torch.cat([F, ridge]), torch.cat([outputs.detach(), outputs.new_zeros(F.shape[1], 32)]))
    assert_close(weights[0], best.solution.T, torch.float32, "output")


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.cache_utils.Cache.get_recurrent_state")
    with pytest.raises(ValueError, match=r"swap needs transformers 5\.23 or newer, this is"):
        m2rnn.swap(make("bamba"), [0])


def test_errors_name_what_is_wrong_and_change_nothing() -> None:
    model, tokens = make("nemotron_h"), ids()
    before = model(tokens).logits
    for layers, options, message in (
        ([6], {}, r"layers must be from 0 to 5 \(the model's last\), got 6"),
        ([-1], {}, "got -1"),
        (["0"], {}, "got '0'"),
        ([3], {}, r"layer 3 is of type 'mlp' and has no mixer to replace; those that do: \[0, 1, 2, 4, 5\]"),
        ([0, 0], {}, r"layers must name each layer once, and at least one, got \[0, 0\]"),
        ([], {}, r"at least one, got \[\]"),
        ([ATTENTION, LAST_ATTENTION], {}, "one attention layer must stay"),
        ([0], {"heads": 3}, "unexpected keyword argument 'heads'"),
        ([0], {"num_heads": 4, "num_q_heads": 3}, "num_q_heads must divide"),
        ([0], {"calibration": []}, "calibration has no batches"),
        ([0], {"calibration": tokens}, r"must be token ids \[B, T\] or keyword arguments .*, got a tensor \[9\]"),
        ([0], {"calibration": [[1, 2]]}, r"must be token ids \[B, T\] or keyword arguments .*, got \[1, 2\]"),
        ([0], {"calibration": {"input_ids": tokens}}, "calibration must be a list of batches, got one batch"),
        ([0], {"calibration": [tokens], "steps": -1}, "steps must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            m2rnn.swap(model, layers, **options)
    assert torch.equal(model(tokens).logits, before)
    assert not m2rnn.swapped_parameters(model)
    m2rnn.swap(model, [0])
    with pytest.raises(ValueError, match="layer 0 is an M2RNN layer already"):
        m2rnn.swap(model, [0])
    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ValueError, match=r"does not know models of type 'llama', only qwen3_next, .*nemotron_h"):
        m2rnn.swap(llama, [0])


def test_a_model_loads_from_a_subfolder(tmp_path: Path) -> None:
    model = swapped("qwen3_5", [0], torch.float32)
    model.save_pretrained(tmp_path / "inner")
    loaded, tokens = load(tmp_path, "qwen3_5", subfolder="inner"), ids()
    assert_close(loaded(tokens).logits, model(tokens).logits, torch.float32, "output")


def test_load_swapped_refuses_what_swap_did_not_write(tmp_path: Path) -> None:
    model = make("qwen3_5")
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="records no swapped layers"):
        m2rnn.load_swapped(tmp_path / "whole")
    m2rnn.swap(model, [0])
    model.save_pretrained(tmp_path / "swapped")
    text = (tmp_path / "swapped" / "config.json").read_text()
    (tmp_path / "swapped" / "config.json").write_text(text.replace("Qwen3_5ForCausalLM", "os"))
    with pytest.raises(ValueError, match="architecture 'os', which transformers does not have"):
        m2rnn.load_swapped(tmp_path / "swapped")
