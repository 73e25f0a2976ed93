"""Packed batches for training, as the model takes them.

The tokens of a split, end to end, are cut into windows of ``context`` tokens. A batch is some windows in one row
``[1, rows · context]`` with ``cu_seq_lens_q``: a sequence starts with every document and with every window, so that no
document sees another. A document that a window cuts goes on in its next window as a new sequence: from an empty state,
with positions from 0. The last token before the cut still predicts the first one after it, so that every token but the
first of a document is predicted once an epoch.

Order: sample number n of a training, from 0 on, is window ``permutation(seed, epoch)[n mod windows]`` of epoch
``n // windows``. It depends on nothing else: a step that takes G samples takes numbers step · G to step · G + G - 1,
however many processes share them. To resume is to go on counting.

For transformers' Trainer, which must not shuffle:

    data = PackedBatches(TokenDataset(folder), context, rows, seed, batches=steps * accumulation * processes)
    TrainingArguments(
        per_device_train_batch_size=1, gradient_accumulation_steps=accumulation, max_steps=steps,
        train_sampling_strategy="sequential",
    )
    Trainer(train_dataset=data, data_collator=only_batch)

accelerate gives batch number b to process b mod processes: a step's samples are the same for any number of processes
with the same ``rows · accumulation · processes``. A resumed training skips batches by number, without reading them.
``data.describe(b)`` says which windows and documents batch b holds, for reports of a spike in the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from m2rnn.data.permutation import mixed_key, permuted
from m2rnn.data.token_files import TokenDataset

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """Sequences side by side.

    Attributes:
        input_ids: int64 ``[length]``.
        shift_labels: int64 ``[length]``, the token that each one predicts, or -100.
        starts: where sequences start, int64, the first is 0.
    """

    input_ids: NDArray[np.int64]
    shift_labels: NDArray[np.int64]
    starts: NDArray[np.int64]


class PackedBatches(Dataset[dict[str, Tensor]]):
    """Batches of ``rows`` windows of ``context`` tokens, in a shuffled order that is known without reading.

    Args:
        data: the split to read.
        context: tokens of a window; the last window of an epoch is filled up with padding, a sequence of its own
            whose labels are -100.
        rows: windows of a batch.
        seed: of the order; None for the order of the file.
        batches: how many batches there are, over as many epochs as it takes; None for one epoch, whose last
            batch may have fewer rows.

    An item is what ``pack`` gives for its windows.
    """

    def __init__(
        self, data: TokenDataset, context: int, rows: int, seed: int | None = 0, batches: int | None = None
    ) -> None:
        for name, value in (("context", context), ("rows", rows)):
            if value < 1:
                raise ValueError(f"{name} {value}: expected at least 1")
        self.data, self.context, self.rows, self.seed = data, context, rows, seed
        self.windows = -(-data.num_tokens // context)
        self.samples = self.windows if batches is None else batches * rows
        self._batches = -(-self.windows // rows) if batches is None else batches

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, batch: int) -> dict[str, Tensor]:
        return pack([self.window(int(number)) for number in self.windows_of(batch)[1]])

    def windows_of(self, batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch and the window of each row of a batch."""
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        samples = np.arange(batch * self.rows, min((batch + 1) * self.rows, self.samples))
        epochs, places = np.divmod(samples, self.windows)
        if self.seed is None:
            return epochs, places
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            numbers[now] = permuted(places[now], self.windows, mixed_key(self.seed, int(epoch)))
        return epochs, numbers

    def window(self, number: int) -> Row:
        """Window number ``number`` of the file, filled up to ``context`` tokens; ``DataError`` if it was damaged."""
        data, start = self.data, number * self.context
        stop = min(start + self.context, data.num_tokens)
        ids = np.full(self.context + 1, data.pad_token_id, np.int64)
        read = data.read(start, min(stop + 1, data.num_tokens))
        ids[: len(read)] = read
        first = data.document_at(start)
        ends = data.ends[first : data.document_at(stop - 1) + 1] - start  # the last one may lie beyond the window
        labels = ids[1:].copy()
        labels[ends[ends <= self.context] - 1] = IGNORED
        labels[stop - start :] = IGNORED
        starts = np.concatenate([[0], ends[ends < self.context]])
        return Row(ids[:-1], labels, starts)

    def describe(self, batch: int) -> list[dict[str, int]]:
        """For each row of a batch: its epoch, window, tokens (first and last) and documents (first and last)."""
        rows = []
        for epoch, window in zip(*self.windows_of(batch), strict=True):
            first = int(window) * self.context
            last = min(first + self.context, self.data.num_tokens) - 1
            rows.append(
                {
                    "epoch": int(epoch),
                    "window": int(window),
                    "first_token": first,
                    "last_token": last,
                    "first_document": self.data.document_at(first),
                    "last_document": self.data.document_at(last),
                }
            )
        return rows


def only_batch(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The collator for ``PackedBatches``, whose items are batches already."""
    (batch,) = batches
    return batch


def pack(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows end to end as arguments of the model.

    Returns:
        ``input_ids`` int64 ``[1, total]``; ``shift_labels`` likewise, and again as ``labels``, which Trainer looks for
        in its place; ``cu_seq_lens_q`` int32 ``[N + 1]``.
    """
    offsets = np.cumsum([0, *(len(row.input_ids) for row in rows)])
    starts = [row.starts + offset for row, offset in zip(rows, offsets, strict=False)]
    labels = torch.from_numpy(np.concatenate([row.shift_labels for row in rows]))[None]
    return {
        "input_ids": torch.from_numpy(np.concatenate([row.input_ids for row in rows]))[None],
        "labels": labels,
        "shift_labels": labels,
        "cu_seq_lens_q": torch.from_numpy(np.concatenate([*starts, offsets[-1:]]).astype(np.int32)),
    }
