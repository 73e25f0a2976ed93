"""The chunked loss is the plain loss, with Hugging Face's shift inside each sequence."""

import pytest
import torch
import torch.nn.functional as F

from m2rnn.models.loss import LanguageModelHead, chunked_cross_entropy, chunked_token_losses
from tests.models.small import VOCAB, make
from tests.tolerances import assert_close


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(7)])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 5])
def test_chunked_loss_and_gradients_are_the_plain_ones(chunk_size: int | None, num_items) -> None:
    hidden = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (3, 5))
    labels[1, 2:] = -100

    loss = chunked_cross_entropy(hidden, labels, lambda h: h @ weight.T, 11, num_items, chunk_size)
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    plain = plain / ((labels != -100).sum() if num_items is None else num_items)
    assert_close(loss, plain, torch.float64, "output")
    for ours, theirs in zip(
        torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(plain, [hidden, weight]), strict=True
    ):
        assert_close(ours, theirs, torch.float64, "gradient")


def test_logits_of_the_whole_batch_never_exist_at_once() -> None:
    sizes = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden.shape[0])
        return hidden

    hidden = torch.randn(10, 4, requires_grad=True)
    chunked_cross_entropy(hidden, torch.randint(4, (10,)), head, 4, chunk_size=3).backward()
    assert max(sizes) == 3
    assert sum(sizes) == 20  # once forward, once again backward


def test_a_sharded_head_is_called_once() -> None:
    """FSDP gathers its weight for that call, and for the backward pass of that call."""

    class Sharded(LanguageModelHead):
        def unshard(self) -> None: ...

    head = Sharded(8, 11).double()
    calls = []
    head.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs)))
    hidden, labels = torch.randn(10, 8, dtype=torch.float64, requires_grad=True), torch.randint(11, (10,))
    loss = chunked_cross_entropy(hidden, labels, head, 11, chunk_size=3)
    found = torch.autograd.grad(loss, [hidden, head.weight])
    assert len(calls) == 1
    plain = F.cross_entropy(hidden @ head.weight.T, labels)
    assert_close(loss, plain, torch.float64, "output")
    for ours, theirs in zip(found, torch.autograd.grad(plain, [hidden, head.weight]), strict=True):
        assert_close(ours, theirs, torch.float64, "gradient")


def test_hooks_on_the_head_see_logits() -> None:
    model, seen = make().train(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    model(torch.randint(VOCAB, (2, 6)), labels=torch.randint(VOCAB, (2, 6))).loss.backward()
    assert set(seen) == {VOCAB}


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    logits, labels = torch.randn(50, 30).bfloat16(), torch.randint(30, (50,))
    loss = chunked_cross_entropy(logits, labels, lambda h: h, 30, chunk_size=7)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(logits.float(), labels).item(), rel=1e-6)


def test_the_losses_of_tokens_from_bfloat16_logits_are_float32_without_gradients() -> None:
    head, hidden = torch.nn.Linear(16, 50, bias=False).bfloat16(), torch.randn(9, 16).bfloat16()
    labels = torch.randint(50, (9,))
    losses = chunked_token_losses(hidden, labels, head, 50, chunk_size=4)
    expected = F.cross_entropy(head(hidden).double(), labels, reduction="none").detach()
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    assert_close(losses, expected, torch.float32, "output")


def test_labels_are_shifted_by_one() -> None:
    model = make()
    ids = torch.randint(VOCAB, (2, 6))
    outputs = model(ids, labels=ids)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(outputs.loss, expected, torch.float64, "output")
    assert_close(
        model(ids, shift_labels=ids).loss,
        F.cross_entropy(outputs.logits.flatten(0, 1), ids.flatten()),
        torch.float64,
        "output",
    )
    counted = model(ids, labels=ids, num_items_in_batch=40).loss
    assert_close(counted * 40, expected * 10, torch.float64, "output")


def test_training_with_labels_returns_no_logits() -> None:
    model = make().train()
    ids = torch.randint(VOCAB, (2, 6))
    outputs = model(ids, labels=ids)
    assert outputs.logits is None
    assert outputs.past_key_values is None
    assert model(ids).logits.shape == (2, 6, VOCAB)


@pytest.mark.parametrize("how", ["left", "right", "interior", "packed"])
def test_no_label_crosses_padding_or_a_boundary(how: str) -> None:
    model = make()
    rows = [torch.randint(VOCAB, (1, n)) for n in (4, 1, 6)]
    total = sum(model(row, labels=row).loss * (row.shape[1] - 1) for row in rows if row.shape[1] > 1)
    if how == "packed":
        ids = torch.cat(rows, 1)
        loss = model(ids, labels=ids, cu_seq_lens_q=torch.tensor([0, 4, 5, 11])).loss
    else:
        mask = torch.zeros(3, 8, dtype=torch.bool)
        for n, row in enumerate(rows):
            length = row.shape[1]
            mask[
                n,
                {"left": range(8 - length, 8), "right": range(length), "interior": range(1, 1 + length)}[how],
            ] = 1
        mask[2] = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]) if how == "interior" else mask[2]
        ids = torch.randint(VOCAB, (3, 8)).masked_scatter(mask, torch.cat(rows, 1))
        loss = model(ids, labels=ids, attention_mask=mask).loss
    assert_close(loss, total / 8, torch.float64, "output")


@pytest.mark.parametrize("name", ["hybrid", "moe"])
def test_batches_without_a_token_have_no_loss(name: str) -> None:
    model, ids = make(name).train(), torch.randint(VOCAB, (2, 6))
    for arguments in (
        {"input_ids": ids[:, :0], "labels": ids[:, :0]},
        {"input_ids": ids, "labels": ids, "attention_mask": torch.zeros_like(ids)},
        {"input_ids": ids, "labels": torch.full_like(ids, -100)},
    ):
        loss = model(**arguments, num_items_in_batch=5).loss
        loss.backward()
        assert loss == 0
        assert model(**arguments).loss.isnan()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_logits_to_keep() -> None:
    model = make()
    ids = torch.randint(VOCAB, (2, 6))
    logits = model(ids).logits
    assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:], torch.float64, "output")
    kept = torch.tensor([0, 3])
    assert_close(model(ids, logits_to_keep=kept).logits, logits[:, kept], torch.float64, "output")
