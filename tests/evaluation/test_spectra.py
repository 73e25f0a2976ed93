"""Spectra of W are numpy's, and the size of the states is that of layers run one after the other by hand."""

import numpy as np
import pytest
import torch

from m2rnn.evaluation.language_model import in_memory
from m2rnn.evaluation.losses import losses_and_states, losses_by_window, losses_of, state_rms
from m2rnn.evaluation.spectra import recurrent_layers, spectra, summary_of_states
from m2rnn.evaluation.text import Text
from m2rnn.evaluation.windows import sliding, whole
from tests.models.small import VOCAB, make


def some_text(lengths=(40, 7, 61)):
    tokens = np.random.default_rng(3).integers(3, VOCAB, sum(lengths))
    return Text(tokens, np.cumsum(lengths), VOCAB, (2,), len(tokens), np.ones(VOCAB, np.int64))


def foreign():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=64, vocab_size=VOCAB))


def test_spectra_are_the_largest_and_the_median_over_heads():
    model = make("m2rnn", mixers=["attention", "m2rnn", "gru", "m2rnn"])
    weights = {}
    for layer in (1, 3):
        weight = model.model.layers[layer].mixer.state_weight
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(layer))
        weights[layer] = weight.detach().numpy()
    found = spectra(model)
    assert [row["layer"] for row in found] == [1, 3]
    for row, weight in zip(found, weights.values(), strict=True):
        eigenvalues = [np.abs(np.linalg.eigvals(head)).max() for head in weight]
        singular_values = [np.linalg.svd(head, compute_uv=False)[0] for head in weight]
        assert row["heads"] == len(weight) == 2
        assert row["largest_eigenvalue"] == pytest.approx(max(eigenvalues), rel=1e-12)
        assert row["median_eigenvalue"] == pytest.approx(np.median(eigenvalues), rel=1e-12)
        assert row["largest_singular_value"] == pytest.approx(max(singular_values), rel=1e-12)
        assert row["median_singular_value"] == pytest.approx(np.median(singular_values), rel=1e-12)


def test_a_16_bit_model_has_spectra_too_and_one_without_m2rnn_none():
    model = make("m2rnn", torch.bfloat16)
    assert [row["largest_eigenvalue"] for row in spectra(model)] == [1, 1]  # W starts as the identity
    assert spectra(model.model.layers[1])[0]["layer"] == 0
    assert spectra(make("rnn")) == spectra(foreign()) == []


@pytest.mark.parametrize("name", ["hybrid", "linear", "rnn"])
@pytest.mark.parametrize(("batch", "segment"), [(1, 4), (3, 7), (None, None)])
def test_the_size_of_a_state_is_that_of_the_layer_run_by_hand(name, batch, segment):
    model, text = make(name), some_text()
    windows, positions = whole(text.ends, 18), (6, 12, 18)
    found = state_rms(in_memory(model), text, windows, positions, batch=batch, segment=segment)
    layers = recurrent_layers(model)
    assert layers == {n: mixer for n, mixer in enumerate(model.config.mixers) if mixer != "attention"}
    assert found.shape == (5, 3, len(layers))
    for window, start in enumerate(windows.start):
        for number, position in enumerate(positions):
            ids = torch.from_numpy(text.tokens[start : start + position])[None]
            hidden, states = model.model.embed_tokens(ids), []
            with torch.no_grad():
                for block in model.model.layers:
                    _, state = block.mixer(block.mixer_norm(hidden))
                    hidden = block(hidden)[0]
                    states.append(state)
            expected = [np.sqrt(np.mean(states[layer].recurrent.numpy() ** 2)) for layer in layers]
            np.testing.assert_allclose(found[window, number], expected, rtol=1e-6)
    rows = summary_of_states(found, layers, positions)
    assert [(row["layer"], row["mixer"]) for row in rows] == list(layers.items())
    np.testing.assert_allclose([row["rms"] for row in rows], found.mean(0).T, rtol=1e-6)
    assert all(row["positions"] == [6, 12, 18] for row in rows)


def test_measuring_states_leaves_the_losses_alone():
    model, text = in_memory(make("hybrid")), some_text()
    windows = whole(text.ends, 18)
    losses, states = losses_and_states(model, text, windows, (9, 18), batch=2)
    np.testing.assert_allclose(losses, losses_of(model, text, windows), rtol=1e-6)
    np.testing.assert_array_equal(states, state_rms(model, text, windows, (9, 18), batch=2))
    scored = np.zeros(len(losses), bool)
    for first in windows.first:
        scored[first : first + 18] = True
    np.testing.assert_array_equal(losses >= 0, scored)
    np.testing.assert_array_equal(losses[~scored], -1)


def test_windows_of_different_lengths_are_measured_up_to_the_end_of_the_shortest():
    model, text = in_memory(make("m2rnn")), some_text()
    windows = sliding(text.ends, 30, 30)
    shortest = int((windows.stop - windows.start).min()) - 1
    alone = [state_rms(model, text, windows, (p,), batch=1) for p in (1, shortest)]
    together = state_rms(model, text, windows, (1, shortest), batch=4)
    np.testing.assert_allclose(together, np.concatenate(alone, 1), rtol=1e-6)
    for positions in ((), (0,), (shortest + 1,), (2, 1), (2, 2)):
        with pytest.raises(ValueError, match=f"expected increasing numbers from 1 to {shortest}"):
            state_rms(model, text, windows, positions)


def test_a_foreign_model_has_losses_and_no_states():
    model, text = in_memory(foreign()), some_text()
    windows = whole(text.ends, 18)
    assert (losses_of(model, text, windows)[windows.first[0]] > 0).all()
    assert recurrent_layers(model.model) == {}
    with pytest.raises(ValueError, match="no layers of this library with a recurrent state: use losses_of"):
        state_rms(model, text, windows, (9,))


def test_losses_that_are_not_finite_are_an_error_in_memory():
    model, text = make("m2rnn"), some_text()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="a loss is not finite"):
        losses_of(in_memory(model), text, whole(text.ends, 18))


def test_losses_by_window_pair_models_window_by_window():
    text = some_text()
    windows = whole(text.ends, 18)
    losses = losses_of(in_memory(make("hybrid")), text, windows)
    found = losses_by_window(losses, windows, 6)
    assert found.shape == (5, 3)
    for row, first in zip(found, windows.first, strict=True):
        for part in range(3):
            begin = first + 6 * part
            assert row[part] == pytest.approx(sum(map(float, losses[begin : begin + 6])) / 6, rel=1e-12)
    assert losses_by_window(losses, windows, 7)[0, 2] == pytest.approx(losses[15:19].mean(), rel=1e-6)


def test_a_model_in_memory_is_put_into_evaluation_mode():
    model = make("hybrid").train()
    assert not in_memory(model).model.training
