"""How well a model recalls what it has read: text that repeats itself, random tokens to copy, and without attention.

A recurrent state is of fixed size, attention keeps every token. Where text repeats itself, that is what differs.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from m2rnn.evaluation.language_model import TOKENS_PER_BATCH, LanguageModel, read
from m2rnn.evaluation.spectra import recurrent_layers
from m2rnn.evaluation.text import Text
from m2rnn.layers import Attention
from m2rnn.models.loss import chunked_token_losses

TOKENS_PER_PART = 2**22  # of n-grams that are sorted together
CODES = 2**63  # how many n-grams an int64 can tell apart


def repeated(tokens: NDArray[Any], ends: NDArray[np.int64], ngram: int = 3) -> NDArray[np.bool_]:
    """Which tokens repeat an earlier n-gram of their document.

    Token t of a document is repeated if some s < t in the same document has
    ``tokens[s - ngram : s + 1] == tokens[t - ngram : t + 1]``: the ``ngram`` tokens before t stood earlier, with this
    same token after them. Both stretches of ``ngram + 1`` tokens lie wholly in the document, and may overlap. The first
    ``ngram + 1`` tokens of a document are never repeated. Marks such as eos count like any token.

    Args:
        tokens: ids of all documents, ``[num_tokens]``.
        ends: index after the last token of each document, increasing.
        ngram: n, at least 1.

    Returns:
        ``[num_tokens]``.

    Raises:
        ValueError: for an n below 1.
    """
    if ngram < 1:
        raise ValueError(f"ngram {ngram}: expected at least 1, the number of tokens before a repeated one")
    found = np.zeros(len(tokens), bool)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    # Whole documents, as many as fit, at a time: no n-gram reaches from one into another.
    first = 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + TOKENS_PER_PART, "right")))
        part = slice(int(starts[first]), int(ends[last - 1]))
        found[part] = _repeated(tokens[part], starts[first:last] - part.start, ngram)
        first = last
    return found


def _repeated(tokens: NDArray[Any], starts: NDArray[np.int64], ngram: int) -> NDArray[np.bool_]:
    found = np.zeros(len(tokens), bool)
    document = np.zeros(len(tokens), np.int64)
    document[starts[1:]] = 1
    document = document.cumsum()
    place = np.flatnonzero(np.arange(len(tokens)) - starts[document] >= ngram)
    codes = _codes(tokens, ngram + 1)[place - ngram]
    # Equal codes side by side, in the order of the text: if the one before is of the same document, it is the nearest.
    order = np.argsort(codes, kind="stable")
    codes, place = codes[order], place[order]
    again = (codes[1:] == codes[:-1]) & (document[place[1:]] == document[place[:-1]])
    found[place[1:][again]] = True
    return found


def _codes(tokens: NDArray[Any], length: int) -> NDArray[np.int64]:
    """A number for each stretch of ``length`` tokens, by where it starts: equal for equal ones, and only for these."""
    count = max(0, len(tokens) - length + 1)
    ids = np.asarray(tokens, np.int64)
    base = int(ids.max(initial=0)) + 1
    codes, kinds = ids[:count], base
    for later in range(1, length):
        if kinds * base > CODES:
            distinct, codes = np.unique(codes, return_inverse=True)
            kinds = len(distinct)
        codes = codes * base + ids[later : later + count]
        kinds *= base
    return codes


def split_losses(losses: NDArray[np.float32], again: NDArray[np.bool_]) -> dict[str, dict[str, Any]]:
    """Count, mean loss and perplexity of the scored tokens (loss ≥ 0) that are ``repeated``, and of the ``others``."""
    found = {}
    for name, members in (("repeated", again), ("others", ~again)):
        values = np.asarray(losses)[members & (np.asarray(losses) >= 0)].astype(np.float64)
        loss = float(values.mean()) if len(values) else None
        perplexity = None if loss is None else math.exp(min(loss, 700.0))
        found[name] = {"tokens": len(values), "loss": loss, "perplexity": perplexity}
    return found


@dataclass(frozen=True)
class Copying:
    """What `copying` measures on the second half of each sequence.

    Attributes:
        losses: ``-log p`` of each token, float64 ``[sequences, length]``.
        right: whether it was the most probable one, bool of the same shape.
    """

    losses: NDArray[np.float64]
    right: NDArray[np.bool_]

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def text_ids(text: Text) -> NDArray[np.int64]:
    """The ids that stand for text."""
    ids = np.flatnonzero(text.token_bytes > 0)
    return ids[text.is_text(ids)]


def copying(
    model: LanguageModel,
    ids: Sequence[int] | NDArray[np.int64],
    length: int,
    *,
    sequences: int = 64,
    seed: int = 0,
    batch: int | None = None,
    segment: int | None = 8192,
) -> Copying:
    """Read ``length`` random tokens twice over, and score the second time.

    Nothing but the first half tells what follows in the second, whose first token no model can know: chance is a loss
    of log(number of ids), and copying without a mistake has an accuracy of ``1 - 1 / length`` or more.

    Args:
        ids: to draw from, uniformly and independently; see `text_ids`.
        length: tokens of one half.
        seed: of the draw, which is the same for every model with these ids.
        batch: sequences at a time; None for as many as 16,384 tokens make.
        segment: longer sequences are read so many tokens at a time.

    Raises:
        ValueError: for a length or number of sequences below 1, or ids that the model does not have.
    """
    if length < 1 or sequences < 1:
        raise ValueError(f"copying {sequences} sequences of {length} tokens: expected at least 1 of each")
    if not len(ids) or not 0 <= min(ids) <= max(ids) < model.vocab_size:
        raise ValueError(f"ids to copy: expected some, from 0 to {model.vocab_size - 1}, the model's last one")
    half = np.random.default_rng(seed).choice(np.asarray(ids, np.int64), (sequences, length))
    tokens = torch.from_numpy(np.concatenate([half, half], 1)).to(model.model.device)
    step = 2 * length - 1 if segment is None else segment
    stops = [*range(step, 2 * length - 1, step), 2 * length - 1]
    guesses: list[Tensor] = []

    def to_logits(hidden: Tensor) -> Tensor:
        logits: Tensor = model.to_logits(hidden)
        guesses.append(logits.argmax(-1))
        return logits

    losses = torch.zeros(sequences, length, dtype=torch.float64)
    right = torch.zeros(sequences, length, dtype=torch.bool)
    size = batch or max(1, TOKENS_PER_BATCH // (2 * length))
    for begin in range(0, sequences, size):
        rows = tokens[begin : begin + size]
        for part, hidden, _ in read(model, rows[:, :-1], stops):
            first = max(part.start, length - 1)  # place of the last token before those to score
            if first < part.stop:
                labels = rows[:, first + 1 : part.stop + 1]
                scored = hidden[:, first - part.start :].flatten(0, 1)
                guesses.clear()
                loss = chunked_token_losses(scored, labels.flatten(), to_logits, model.vocab_size)
                where = slice(begin, begin + size), slice(first + 1 - length, part.stop + 1 - length)
                losses[where] = loss.view_as(labels).double().cpu()
                right[where] = (torch.cat(guesses).view_as(labels) == labels).cpu()
    return Copying(losses.numpy(), right.numpy())


def is_hybrid(model: nn.Module) -> bool:
    """Whether it is of this library and has both attention and recurrent layers."""
    has_attention = any(isinstance(module, Attention) for module in model.modules())
    return has_attention and bool(recurrent_layers(model))


@contextmanager
def attention_off(model: nn.Module) -> Iterator[None]:
    """Inside it, what the attention mixers of ``model`` (`m2rnn.layers.Attention`) add is zero; MLPs go on as before.

    Not for layers that ``torch.compile`` has compiled: their graphs may leave hooks out.
    """

    def silence(module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return torch.zeros_like(output[0]), output[1]

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, Attention):
                hooks.callback(module.register_forward_hook(silence).remove)
        yield
