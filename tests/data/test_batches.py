"""Batches hold every token once an epoch, never mix documents, and come in an order that nobody's number changes."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from m2rnn.data.batches import IGNORED, PackedBatches, only_batch
from m2rnn.data.sources import DataError
from m2rnn.data.token_files import PIECE, TokenDataset
from m2rnn.models import M2RNNConfig, M2RNNForCausalLM
from tests.data.text import prepared

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def documents(folder, lengths) -> TokenDataset:
    """Documents whose tokens say where they lie: the text counts up, so that neighbours differ."""
    letters = "".join(map(chr, range(33, 127)))
    starts = np.cumsum([0, *lengths])
    return prepared(folder, [(letters * 9)[s % 94 : s % 94 + n] for s, n in zip(starts, lengths, strict=False)])


@settings(max_examples=40)
@given(lengths, st.integers(1, 50), st.integers(1, 4), st.sampled_from([None, 0, 7]))
def test_an_epoch_holds_every_token_and_every_prediction_once(tmp_path_factory, lengths, context, rows, seed):
    data = documents(tmp_path_factory.mktemp("data"), lengths)
    batches = PackedBatches(data, context, rows, seed)
    seen, predicted = np.zeros(data.num_tokens, int), np.zeros(data.num_tokens, int)
    for number in range(len(batches)):
        batch = batches[number]
        ids, labels, bounds = batch["input_ids"][0], batch["shift_labels"][0], batch["cu_seq_lens_q"].tolist()
        where = batches.describe(number)
        assert ids.shape == labels.shape == (len(where) * context,)
        assert bounds[0] == 0
        assert bounds[-1] == len(ids)
        assert all(a < b for a, b in pairwise(bounds))
        place = np.concatenate([np.arange(r["window"] * context, (r["window"] + 1) * context) for r in where])
        real = place < data.num_tokens
        seen[place[real]] += 1
        np.testing.assert_array_equal(ids[real], data.tokens[place[real]])
        assert (labels[~real] == IGNORED).all()
        for n, label in enumerate(labels.tolist()):
            if label != IGNORED:
                assert label == data.tokens[place[n] + 1]
                assert data.document_at(place[n]) == data.document_at(place[n] + 1)
                predicted[place[n] + 1] += 1
        for start, stop in pairwise(bounds):
            one = place[start:stop]
            assert (np.diff(one) == 1).all()
            inside = one[one < data.num_tokens]
            assert len(inside) in (0, len(one))
            assert len({data.document_at(p) for p in inside}) <= 1
        torch.testing.assert_close(batch["labels"], batch["shift_labels"])
    assert (seen == 1).all()
    firsts = np.concatenate([[0], data.ends[:-1]])
    expected = np.ones(data.num_tokens, int)
    expected[firsts] = 0
    np.testing.assert_array_equal(predicted, expected)
    assert (len(batches) - 1) * rows < batches.windows <= len(batches) * rows


@settings(max_examples=20)
@given(lengths, st.integers(1, 20), st.integers(0, 3))
def test_a_step_reads_the_same_for_any_number_of_processes_and_rows(tmp_path_factory, lengths, context, seed):
    data = documents(tmp_path_factory.mktemp("data"), lengths)
    steps, samples = 7, 12
    read = []
    for rows, accumulation, processes in ((12, 1, 1), (1, 12, 1), (1, 4, 3), (2, 3, 2), (3, 1, 4)):
        a_step = accumulation * processes
        assert rows * a_step == samples
        batches = PackedBatches(data, context, rows, seed, batches=steps * a_step)
        assert len(batches) == steps * a_step
        step_windows = []
        for step in range(steps):
            # As accelerate deals: batch b goes to process b mod processes, which accumulates its next few.
            numbers = [
                step * a_step + turn * processes + process
                for process in range(processes)
                for turn in range(accumulation)
            ]
            step_windows.append(sorted((r["epoch"], r["window"]) for n in numbers for r in batches.describe(n)))
        read.append(step_windows)
    assert all(steps_read == read[0] for steps_read in read)
    windows = -(-data.num_tokens // context)
    order = [window for step in read[0] for window in step]
    for epoch in range(steps * samples // windows):
        assert sorted(window for e, window in order if e == epoch) == list(range(windows))


def test_epochs_and_seeds_differ_and_no_seed_is_the_order_of_the_file(tmp_path):
    data = documents(tmp_path, [40] * 50)
    orders = {}
    for seed in (0, 1, None):
        batches = PackedBatches(data, 10, 1, seed, batches=410)
        windows = [batches.describe(number)[0]["window"] for number in range(410)]
        orders[seed] = windows
        assert (windows[:205] == windows[205:]) == (seed is None)
    assert orders[None][:205] == list(range(205))
    assert orders[0] != orders[1]


def test_the_last_batch_of_one_epoch_is_short_and_there_is_none_after_it(tmp_path):
    data = documents(tmp_path, [9, 9, 9])  # 30 tokens
    batches = PackedBatches(data, 8, 3, None)
    assert [batch["input_ids"].shape[1] for batch in (batches[0], batches[1])] == [24, 8]
    assert batches[1]["input_ids"][0, 6:].tolist() == [data.pad_token_id] * 2
    assert batches[1]["cu_seq_lens_q"].tolist() == [0, 6, 8]
    described = [tuple(row.values()) for number in (0, 1) for row in batches.describe(number)]
    # epoch, window, first and last token, first and last document
    assert described == [(0, 0, 0, 7, 0, 0), (0, 1, 8, 15, 0, 1), (0, 2, 16, 23, 1, 2), (0, 3, 24, 29, 2, 2)]
    for number in (2, -1):
        with pytest.raises(IndexError, match=f"batch {number} of 2"):
            batches[number]
    for options, message in {(0, 1): "context 0", (1, 0): "rows 0"}.items():
        with pytest.raises(ValueError, match=message):
            PackedBatches(data, *options)


def test_a_loader_in_other_processes_gives_the_same(tmp_path):
    data = documents(tmp_path, [20] * 20)
    batches = PackedBatches(data, 16, 2, seed=1)
    options = {"batch_size": 1, "collate_fn": only_batch, "shuffle": False}
    loaded = list(torch.utils.data.DataLoader(batches, num_workers=2, multiprocessing_context="fork", **options))
    assert len(loaded) == len(batches)
    for number, batch in enumerate(loaded):
        for name, tensor in batches[number].items():
            assert torch.equal(batch[name], tensor)


def test_a_changed_token_is_an_error_where_it_is_read(tmp_path):
    data = documents(tmp_path, [999] * 100)
    content = bytearray(data.tokens_path.read_bytes())
    assert len(content) > PIECE + 1000
    content[-1000] ^= 1
    data.tokens_path.write_bytes(content)
    batches = PackedBatches(TokenDataset(data.folder), 100, 1, None)
    assert batches[0]["input_ids"].shape == (1, 100)
    with pytest.raises(DataError, match=r"train\.tokens\.bin is not what m2rnn prepare wrote"):
        batches[len(batches) - 1]


def small_model() -> M2RNNForCausalLM:
    torch.manual_seed(0)
    config = M2RNNConfig(
        vocab_size=256,
        hidden_size=16,
        mixers=["m2rnn", "attention"],
        mixer_options={"m2rnn": {"num_heads": 2}, "attention": {"num_heads": 2}},
        mlp_options={"swiglu": {"intermediate_size": 32}},
    )
    return M2RNNForCausalLM(config)


def test_the_loss_of_a_batch_is_that_of_its_pieces_of_documents_alone(tmp_path):
    data = documents(tmp_path, [5, 30, 1, 12, 20, 3])
    model = small_model().double()
    batches = PackedBatches(data, 16, 2, seed=0)
    for number in range(len(batches)):
        batch = batches[number]
        total = 0.0
        for start, stop in pairwise(batch["cu_seq_lens_q"].tolist()):
            alone = model(batch["input_ids"][:, start:stop]).logits[0]
            total += F.cross_entropy(alone, batch["shift_labels"][0, start:stop], ignore_index=IGNORED, reduction="sum")
        count = (batch["shift_labels"] != IGNORED).sum()
        torch.testing.assert_close(model(**batch).loss, total / count)


class Recorded(PackedBatches):
    """Remembers which batches were asked for."""

    asked: list[int]

    def __getitem__(self, batch: int) -> dict[str, torch.Tensor]:
        self.asked.append(batch)
        return super().__getitem__(batch)


def test_trainer_reads_in_order_and_resumes_without_reading_what_it_skips(tmp_path):
    data = documents(tmp_path, [40] * 8)
    losses = {}
    for resumed in (False, True):
        batches = Recorded(data, 16, 2, seed=0, batches=8)
        batches.asked = []
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=4,
            train_sampling_strategy="sequential",
            save_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(small_model(), arguments, train_dataset=batches, data_collator=only_batch)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2") if resumed else None)
        losses[resumed] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert batches.asked == list(range(4 if resumed else 0, 8))
    assert len(losses[False]) == 4
    assert losses[True] == losses[False]
