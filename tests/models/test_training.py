"""What training wraps around the model leaves its results as they are."""

from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad
from transformers import Trainer, TrainingArguments

from tests.models.small import CONFIGS, VOCAB, make
from tests.tolerances import assert_close


def gradients(model, ids: torch.Tensor, **arguments) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **arguments).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    model = make(name).train()
    ids = torch.randint(VOCAB, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = gradients(model, ids, attention_mask=mask)
    calls = []
    model.model.layers[0].mixer_norm.register_forward_hook(lambda *_: calls.append(1))
    newest = hasattr(model, "activation_checkpointing_enable")  # transformers renamed it on the way to version 6
    enable = model.activation_checkpointing_enable if newest else model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    for key, gradient in gradients(model, ids, attention_mask=mask, use_cache=True).items():
        assert_close(gradient, expected[key], torch.float64, "gradient", key)
    assert len(calls) == 2, "the block ran once forward and once again backward"


@pytest.mark.parametrize("name", CONFIGS)
def test_functional_call_gives_the_same_gradients(name: str) -> None:
    model = make(name)
    ids = torch.randint(VOCAB, (2, 5))
    expected = gradients(model, ids)
    parameters = {key: value.detach().clone().requires_grad_() for key, value in model.named_parameters()}
    loss = functional_call(model, parameters, (ids,), {"labels": ids}).loss
    for key, gradient in zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True):
        assert_close(gradient, expected[key], torch.float64, "gradient", key)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo's own
def test_model_compiles_without_graph_breaks() -> None:
    model = make("m2rnn", mixers=["m2rnn", "attention", "gru", "rnn", "gated_deltanet", "mamba2"]).train()
    ids = torch.randint(VOCAB, (2, 5))
    expected = gradients(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[key], torch.float64, "gradient", key)


def test_every_parameter_gets_a_gradient() -> None:
    ids = torch.randint(VOCAB, (2, 5))
    for name in CONFIGS:
        for key, gradient in gradients(make(name), ids).items():
            assert gradient.abs().max() > 0, key


def test_bfloat16_and_autocast_follow_float64() -> None:
    ids = torch.randint(VOCAB, (2, 9))
    expected = make()(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        autocast = make(dtype=torch.float32)(ids).logits
    for logits in (make(dtype=torch.bfloat16)(ids).logits, autocast):
        error = (logits.double() - expected).norm() / expected.norm()
        assert 1e-4 < error < 0.05


def test_a_step_with_a_state_trains_through_the_state() -> None:
    """Truncated back-propagation without the truncation: two calls joined by the cache, one gradient."""
    model = make()
    ids = torch.randint(VOCAB, (2, 6))
    whole = model.model(ids).last_hidden_state
    cotangent = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, model.model.embed_tokens.weight, cotangent)
    first = model.model(ids[:, :3], use_cache=True)
    second = model.model(ids[:, 3:], past_key_values=first.past_key_values)
    joined = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
    ours = torch.autograd.grad(joined, model.model.embed_tokens.weight, cotangent)
    assert_close(ours[0], expected[0], torch.float64, "gradient")


def test_grad_transform_gives_the_same_gradients() -> None:
    model = make("rope")
    ids = torch.randint(VOCAB, (1, 4))
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return functional_call(model, parameters, (ids,), {"labels": ids}).loss

    expected = gradients(model, ids)
    for key, gradient in grad(loss)(parameters).items():
        assert_close(gradient, expected[key], torch.float64, "gradient", key)


@pytest.mark.parametrize("name", ["hybrid", "moe"])
def test_trainer_evaluates_the_loss_and_metrics_of_plain_labels(name: str, tmp_path: Path) -> None:
    batch = torch.randint(VOCAB, (4, 6))
    labels = batch.clone()
    labels[:, 0] = -100  # nothing predicts it, but transformers 5.6 would count it
    rows = [{"input_ids": row, "labels": row_labels} for row, row_labels in zip(batch, labels, strict=True)]
    model, seen = make(name), []
    expected = model(batch, labels=labels)
    arguments = TrainingArguments(tmp_path, use_cpu=True, per_device_eval_batch_size=2, report_to=[])
    trainer = Trainer(model, arguments, eval_dataset=rows, compute_metrics=lambda found: seen.append(found) or {})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item())
    assert_close(torch.as_tensor(seen[0].predictions), expected.logits, torch.float64, "output")
    assert (seen[0].label_ids == labels.numpy()).all()
