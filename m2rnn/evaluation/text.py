"""The text of an evaluation as tokens: a folder of token files, or files that are tokenised here."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from m2rnn.data.sources import DataError, Files, Reading, Rejected, documents, find_source, pieces
from m2rnn.data.token_files import MANIFEST, TokenDataset, read_manifest, tokens_name
from m2rnn.data.tokenizers import adds_bos, token_dtype, vocab_size_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS_BY_CHOICE = ("valid", "test", "train")
ENCODE_CHARACTERS = 2**20  # at once


@dataclass(frozen=True)
class Text:
    """Documents as tokens, end to end.

    Attributes:
        tokens: ids of all documents, ``[num_tokens]``.
        ends: index after the last token of each document, int64 ``[num_documents]``, increasing.
        vocab_size: all ids are below it.
        marks: ids that stand for no text: the one that ends documents and the one that begins them, if any.
        num_bytes: of all documents in UTF-8.
        token_bytes: how many bytes of UTF-8 each id stands for, int64 ``[ids]``.
    """

    tokens: NDArray[Any]
    ends: NDArray[np.int64]
    vocab_size: int
    marks: tuple[int, ...]
    num_bytes: int
    token_bytes: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Index of the first token of each document."""
        return np.concatenate([[0], self.ends[:-1]])

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int((self.ends - self.starts).max())

    def is_text(self, ids: NDArray[Any]) -> NDArray[np.bool_]:
        """Which ids stand for text."""
        return np.isin(ids, self.marks, invert=True)

    def bytes_after_first(self) -> int:
        """Bytes of all tokens but the first of each document, which nothing predicts."""
        firsts = np.asarray(self.tokens[self.starts], np.int64)
        return self.num_bytes - int(self.token_bytes[firsts].sum())

    def first(self, documents: int) -> "Text":
        """The first documents alone; of a tokenizer that is not one of bytes, their bytes may be off by one each."""
        if documents >= len(self.ends):
            return self
        ends = self.ends[:documents]
        tokens = self.tokens[: ends[-1]]
        num_bytes = int(self.token_bytes[np.asarray(tokens, np.int64)].sum())
        return Text(tokens, ends, self.vocab_size, self.marks, num_bytes, self.token_bytes)

    def joined(self) -> "Text":
        """All documents as one."""
        return Text(self.tokens, self.ends[-1:], self.vocab_size, self.marks, self.num_bytes, self.token_bytes)


def is_token_folder(path: Path) -> bool:
    """Whether ``m2rnn prepare`` made it, finished or not."""
    return (path / MANIFEST).is_file() or any(path.glob(tokens_name("*") + "*"))


def choose_split(folder: Path, split: str | None) -> str:
    """The split to evaluate: the one asked for, else validation, test or training text, whichever is there."""
    if split is not None:
        return split
    return next(name for name in SPLITS_BY_CHOICE if name in read_manifest(folder)["splits"])


def from_token_folder(folder: Path, split: str) -> Text:
    """The documents of a split of token files, where they lie on disk."""
    data = TokenDataset(folder, split)
    data.verify()
    tokenizer = data.load_tokenizer()
    marks = {data.eos_token_id, tokenizer.bos_token_id} - {None}
    return Text(
        data.tokens, data.ends, data.vocab_size, tuple(sorted(marks)), data.num_bytes, bytes_of_tokens(tokenizer)
    )


def from_files(
    source: str,
    reading: Reading,
    tokenizer: "PreTrainedTokenizerBase",
    update: Callable[[str], None] = lambda text: None,
) -> Text:
    """The documents of text files, JSON lines or Parquet, tokenised as ``m2rnn prepare`` does: a text's ids, then eos.

    A tokenizer that itself begins texts with bos does so here. A tokenizer without eos ends no document.

    Raises:
        DataError: naming the place, for text that cannot be read, and if there is none at all.
    """
    found = find_source(source, reading)
    if not isinstance(found, Files):
        raise DataError(f"{source}: no such file or folder; prepare a dataset of the Hub with m2rnn prepare")
    bos, eos = tokenizer.bos_token_id if adds_bos(tokenizer) else None, tokenizer.eos_token_id
    vocab_size = vocab_size_of(tokenizer)
    dtype = token_dtype(vocab_size)
    encode = _encoder(tokenizer)
    parts: list[NDArray[Any]] = []
    lengths: list[int] = []
    held: list[str] = []
    num_bytes = held_characters = 0

    def encode_held() -> None:
        nonlocal held_characters
        for ids in encode(held):
            whole = [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]
            parts.append(np.array(whole, dtype))
            lengths.append(len(whole))
        held.clear()
        held_characters = 0

    for piece in pieces([found], reading):
        for document in documents(piece, reading):
            if isinstance(document, Rejected):
                raise DataError(f"{document}. Mend or remove it, or leave it out with m2rnn prepare --on-error skip")
            if document:
                held.append(document)
                num_bytes += len(document.encode())
                held_characters += len(document)
            if held_characters > ENCODE_CHARACTERS:
                encode_held()
        encode_held()
        update(f"tokenising {source}: {piece.done or 0:.0%}")
    if not lengths:
        raise DataError(f"{source}: no text: every document is empty")
    marks = tuple(sorted({mark for mark in (bos, eos) if mark is not None}))
    ends = np.cumsum(lengths, dtype=np.int64)
    return Text(np.concatenate(parts), ends, vocab_size, marks, num_bytes, bytes_of_tokens(tokenizer))


def _encoder(tokenizer: "PreTrainedTokenizerBase") -> Callable[[list[str]], list[list[int]]]:
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True  # what looks like a special token in a text is text
    return lambda texts: [encoding.ids for encoding in copy.encode_batch_fast(texts, add_special_tokens=False)]


def bytes_of_tokens(tokenizer: "PreTrainedTokenizerBase") -> NDArray[np.int64]:
    """How many bytes of UTF-8 each id stands for: exact for byte-level tokenizers; 0 for special tokens."""
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    decoder = json.loads(backend.to_str())["decoder"] or {}
    byte_level = any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", ())))
    vocabulary = backend.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values(), default=-1) + 1, np.int64)
    for token, number in vocabulary.items():
        if number in added:
            sizes[number] = 0 if added[number].special else len(token.encode())
        elif byte_level:
            sizes[number] = len(token)  # one character stands for one byte
        elif len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">"):
            sizes[number] = 1
        else:
            sizes[number] = len(token.replace("▁", " ").encode())
    return sizes
