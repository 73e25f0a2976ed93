"""Pieces of text to token ids, in as many processes as one likes, in order."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2rnn.data.sources import Piece, Reading, Rejected, documents
from m2rnn.data.tokenizers import Encode, encoder, token_dtype

ENCODE_CHARACTERS = 2**20  # at once: what a tokenizer returns takes far more memory than the ids


@dataclass(frozen=True)
class Encoding:
    """How documents become ids.

    Attributes:
        reading: how to find documents in a piece.
        tokenizer: the folder with its ``tokenizer.json``; ``is_bytes`` if that is the byte tokenizer.
        tokenizer_hash: see ``tokenizers.tokenizer_hash``.
        vocab_size, eos: of the tokenizer.
        bos: the id to begin documents with, if any.
        valid_fraction: of the training documents that go to ``valid``.
    """

    reading: Reading
    tokenizer: Path
    tokenizer_hash: str
    is_bytes: bool
    vocab_size: int
    eos: int
    bos: int | None
    valid_fraction: float

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.vocab_size)


@dataclass(frozen=True)
class Block:
    """Some pieces of one split's sources: what a process takes at a time."""

    split: str
    pieces: list[Piece]


@dataclass(frozen=True)
class EncodedSplit:
    """Documents of a split: their ids end to end, the length of each, and the bytes of their texts."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    bytes: int


@dataclass(frozen=True)
class EncodedBlock:
    """What a block holds; ``done`` is the share of the split's sources read up to its end, if known."""

    split: str
    done: float | None
    splits: dict[str, EncodedSplit]
    empty: int
    rejected: list[Rejected]


def encode_all(blocks: Iterable[Block], encoding: Encoding, processes: int) -> Iterator[EncodedBlock]:
    """The blocks encoded, in their order; by this process alone if ``processes`` is 1.

    Raises:
        ChildProcessError: if a process was killed.
    """
    if processes == 1:
        yield from (encode_block(block, encoding) for block in blocks)
        return
    # Spawned: a fork would copy the threads' locks of tokenizers and torch, without the threads.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_process)
    pending: deque[Future[EncodedBlock]] = deque()
    try:
        for block in blocks:
            pending.append(pool.submit(encode_block, block, encoding))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            f"one of the {processes} processes was killed, perhaps for want of memory: use fewer processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent closes no queue: its children would wait for work forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_block(block: Block, encoding: Encoding) -> EncodedBlock:
    """The documents of a block as ids, each document ending with eos."""
    texts: dict[str, list[str]] = {}
    empty, rejected = 0, []
    for piece in block.pieces:
        for document in documents(piece, encoding.reading):
            if isinstance(document, Rejected):
                rejected.append(document)
            elif not document:
                empty += 1
            else:
                moved = block.split == "train" and is_valid(document, encoding.valid_fraction)
                texts.setdefault("valid" if moved else block.split, []).append(document)
    splits = {split: _encode_texts(given, encoding) for split, given in texts.items()}
    return EncodedBlock(block.split, block.pieces[-1].done, splits, empty, rejected)


def is_valid(text: str, fraction: float) -> bool:
    """Whether a text of the training sources goes to ``valid``."""
    return fraction > 0 and share_of(text, "valid") < fraction


def share_of(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text and the purpose alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=7, person=purpose.encode()).digest()
    return int.from_bytes(digest) / 2**56


def _encode_texts(texts: list[str], encoding: Encoding) -> EncodedSplit:
    encode = _encoder(encoding.tokenizer, encoding.tokenizer_hash, encoding.is_bytes, encoding.dtype)
    begin = [] if encoding.bos is None else [np.array([encoding.bos], encoding.dtype)]
    end = np.array([encoding.eos], encoding.dtype)
    parts, lengths = [], []
    for some in _batches(texts):
        for ids in encode(some):
            parts += [*begin, ids, end]
            lengths.append(len(begin) + len(ids) + 1)
    size = sum(len(text.encode()) for text in texts)
    return EncodedSplit(np.concatenate(parts), np.array(lengths, np.int64), size)


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= ENCODE_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# A process encodes many blocks with one tokenizer. The hash tells it from one that the folder held before.
@lru_cache(maxsize=1)
def _encoder(folder: Path, tokenizer_hash: str, is_bytes: bool, dtype: np.dtype[Any]) -> Encode:
    return encoder(folder, is_bytes, dtype)
