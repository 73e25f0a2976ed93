"""The loss of every token that windows predict, and the size of the states on the way, in memory."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from m2rnn.evaluation.language_model import TOKENS_PER_BATCH, LanguageModel, token_losses
from m2rnn.evaluation.spectra import recurrent_layers, rms_of_states
from m2rnn.evaluation.text import Text
from m2rnn.evaluation.windows import Windows
from m2rnn.models.loss import IGNORED

PENDING = -1.0  # no loss is negative


def losses_of(
    model: LanguageModel, text: Text, windows: Windows, *, batch: int | None = None, segment: int | None = 8192
) -> NDArray[np.float32]:
    """The loss of every token that the windows predict, in memory.

    Args:
        batch, segment: as in `PerplexitySettings`.

    Returns:
        ``[tokens of the text]``, -1 (`PENDING`) where a token is not predicted.

    Raises:
        ValueError: if a loss is not finite.
    """
    losses = np.full(len(text.tokens), PENDING, np.float32)
    for _ in fill_in(model, text, windows, losses, batch=batch, segment=segment):
        pass
    return losses


def losses_and_states(
    model: LanguageModel,
    text: Text,
    windows: Windows,
    positions: Sequence[int],
    *,
    batch: int | None = None,
    segment: int | None = 8192,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`losses_of` and `state_rms` from one reading."""
    shortest = int((windows.stop - windows.start).min()) - 1
    if not positions or sorted({*positions}) != [*positions] or positions[0] < 1 or positions[-1] > shortest:
        raise ValueError(
            f"positions {list(positions)}: expected increasing numbers from 1 to {shortest}, what the shortest window "
            "reads"
        )
    if not recurrent_layers(model.model):
        raise ValueError(f"{model.folder} has no layers of this library with a recurrent state: use losses_of")
    losses = np.full(len(text.tokens), PENDING, np.float32)
    states = np.full((len(windows), len(positions), len(recurrent_layers(model.model))), PENDING, np.float32)
    for _ in fill_in(model, text, windows, losses, states, positions, batch=batch, segment=segment):
        pass
    return losses, states


def state_rms(
    model: LanguageModel,
    text: Text,
    windows: Windows,
    positions: Sequence[int],
    *,
    batch: int | None = None,
    segment: int | None = 8192,
) -> NDArray[np.float32]:
    """Root mean square of the recurrent state after so many tokens of a window, by layer.

    Args:
        positions: numbers of tokens, in increasing order, none beyond the end of the shortest window.
        batch, segment: as in `PerplexitySettings`.

    Returns:
        ``[windows, positions, layers]``, of the layers that `recurrent_layers` names.

    Raises:
        ValueError: for positions that a window does not have, or a model without recurrent layers of this library.
    """
    return losses_and_states(model, text, windows, positions, batch=batch, segment=segment)[1]


def fill_in(
    model: LanguageModel,
    text: Text,
    windows: Windows,
    losses: NDArray[np.float32],
    states: NDArray[np.float32] | None = None,
    positions: Sequence[int] = (),
    *,
    batch: int | None = None,
    segment: int | None = None,
    title: str = "",
) -> Iterator[tuple[int, int]]:
    """Score the windows that have `PENDING` places in ``losses`` or ``states``, and write there what comes out.

    Args:
        losses: ``[tokens of the text]``.
        states: ``[windows, positions, recurrent layers]``, see `state_rms`; None not to measure them.

    Yields:
        After each batch, how many tokens were scored in it, and how many have been so far, those found there included.

    Raises:
        ValueError: if a loss is not finite.
    """
    layers = list(recurrent_layers(model.model))
    measured: list[torch.Tensor] = []
    done = 0
    for numbers in batches(windows, batch):
        places = [slice(int(windows.first[n]), int(windows.stop[n])) for n in numbers]
        done += sum(place.stop - place.start for place in places)
        known = all((losses[place] != PENDING).all() for place in places)
        if known and (states is None or bool((states[numbers] != PENDING).all())):
            continue
        ids, labels = (x.to(model.model.device) for x in rows(text, windows, numbers))
        step = segment if segment is not None and ids.shape[1] > segment else None
        measured.clear()
        found = token_losses(
            model, ids, labels, step, positions, lambda state: measured.append(rms_of_states(state, layers))
        )
        ends = np.cumsum([place.stop - place.start for place in places])
        if not bool(found.isfinite().all()):
            where = title or str(model.folder)
            raise ValueError(f"{where}: a loss is not finite: the model has diverged, or needs another dtype")
        if states is not None:
            states[numbers] = torch.stack(measured, 1).float().cpu().numpy()
        for place, values in zip(places, np.split(found.float().cpu().numpy(), ends[:-1]), strict=True):
            losses[place] = values
        yield int(ends[-1]), done


def batches(windows: Windows, size: int | None) -> list[NDArray[np.int64]]:
    """Numbers of the windows to run together: those of like length, the longest first."""
    lengths = windows.stop - windows.start
    order = np.argsort(-lengths, kind="stable")
    found, begin = [], 0
    while begin < len(order):
        count = size or max(1, TOKENS_PER_BATCH // int(lengths[order[begin]]))
        found.append(order[begin : begin + count])
        begin += count
    return found


def rows(text: Text, windows: Windows, batch: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of a batch as ids and labels ``[B, T]``, filled up on the right; -100 for what is context only."""
    length = int((windows.stop[batch] - windows.start[batch]).max()) - 1
    ids = np.zeros((len(batch), length), np.int64)
    labels = np.full((len(batch), length), IGNORED, np.int64)
    for row, number in enumerate(batch):
        start, first, stop = (int(x[number]) for x in (windows.start, windows.first, windows.stop))
        ids[row, : stop - 1 - start] = text.tokens[start : stop - 1]
        labels[row, first - 1 - start : stop - 1 - start] = text.tokens[first:stop]
    return torch.from_numpy(ids), torch.from_numpy(labels)


def losses_by_window(losses: NDArray[np.float32], windows: Windows, width: int) -> NDArray[np.float64]:
    """Mean loss of every ``width`` predictions of each window ``[windows, parts]``; the last part may be shorter.

    With windows of N times the training length (`m2rnn.evaluation.windows.whole`) and that as the width, it is the
    loss at each multiple of the training length. One window a document makes rows that pair models by document.

    Args:
        losses: of all tokens of the text.
        windows: that predict equally many tokens each.
    """
    length = int(windows.stop[0] - windows.first[0])
    table = np.stack([losses[first : first + length] for first in windows.first]).astype(np.float64)
    assert (windows.stop - windows.first == length).all()
    assert not (table == PENDING).any()
    return np.stack([table[:, start : start + width].mean(1) for start in range(0, length, width)], 1)
