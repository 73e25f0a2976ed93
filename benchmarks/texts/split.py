"""Training and validation text out of a pile of documents: no near-copies, and nothing held out stands in training.

What two documents share is measured by long lines: of 60 characters and more, each run of blanks made one space, since
tables repeat rows at other widths. A share is in characters of long lines. Everything is decided by hashes of the text,
so that the order of the documents changes nothing.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2rnn.runs.folder import write_whole_file

LONG_LINE = 60
NEAR_COPY = 0.5  # share of a document that earlier ones have said: above it, the document is dropped
KNOWN = 0.1  # share of a document that the other side may hold
LOCK = Path(__file__).with_name("texts.lock")


@dataclass(frozen=True)
class Document:
    """A text and where it came from."""

    path: str
    text: str


@dataclass(frozen=True)
class HeldOut:
    """What to hold out.

    Attributes:
        long: how many documents of ``long_bytes`` and more.
        ordinary: how many documents of any size besides.
        fewest_long: how many long ones must be left; fewer is an error.
    """

    long: int
    long_bytes: int
    ordinary: int
    fewest_long: int


class TextError(ValueError):
    """Texts that cannot be made, or that are not the ones in the lock."""


def digest(text: str, purpose: str = "") -> str:
    """SHA-256 of a text, another one for each purpose."""
    return hashlib.sha256((purpose + text).encode()).hexdigest()


def long_lines(text: str) -> list[str]:
    """The long lines of a text, in order and with repetitions, their runs of blanks made one space."""
    return [line for line in (" ".join(line.split()) for line in text.splitlines()) if len(line) >= LONG_LINE]


def share(lines: Sequence[str], known: set[str]) -> float:
    """The share of the lines' characters that stands in ``known``; 0 without lines."""
    return sum(len(line) for line in lines if line in known) / max(1, sum(map(len, lines)))


def without_near_copies(documents: Iterable[Document]) -> list[Document]:
    """The documents in the order of their hashes, less those of which earlier ones have said more than half."""
    seen: set[str] = set()
    kept, before = [], ""
    for document in sorted(documents, key=lambda document: (digest(document.text), document.path)):
        lines = long_lines(document.text)
        if document.text != before and share(lines, seen) <= NEAR_COPY:
            kept.append(document)
            seen.update(lines)
        before = document.text
    return kept


def split(documents: Iterable[Document], held_out: HeldOut) -> tuple[list[Document], list[Document]]:
    """The training and the held-out documents.

    A training document of which more than a tenth is held out is dropped. Then a held-out document of which more than a
    tenth still stands in the training text is dropped: it is spread over many training documents.

    Raises:
        TextError: if too few long documents are left.
    """
    kept = without_near_copies(documents)
    # Only documents that can be checked: they have long lines.
    candidates = sorted(
        (document for document in kept if long_lines(document.text)),
        key=lambda document: digest(document.text, "held out"),
    )
    long = [document for document in candidates if len(document.text.encode()) >= held_out.long_bytes][: held_out.long]
    chosen = set(long)
    chosen.update([document for document in candidates if document not in chosen][: held_out.ordinary])
    wanted = {line for document in chosen for line in long_lines(document.text)}
    train = [
        document for document in kept if document not in chosen and share(long_lines(document.text), wanted) <= KNOWN
    ]
    known = {line for document in train for line in long_lines(document.text)} & wanted
    valid = [document for document in kept if document in chosen and share(long_lines(document.text), known) <= KNOWN]
    left = len(set(valid) & set(long))
    if left < held_out.fewest_long:
        raise TextError(
            f"{left} of {len(long)} held-out documents of {held_out.long_bytes:,} bytes do not stand in the training "
            f"text, expected at least {held_out.fewest_long}: give it more text, or hold out more long documents"
        )
    return train, valid


def write_texts(
    corpus: str, documents: Iterable[Document], held_out: HeldOut, folder: Path, *, update_lock: bool, lock: Path = LOCK
) -> None:
    """Split, check against the lock, write ``train.jsonl`` and ``valid.jsonl``, and print what they hold.

    Args:
        update_lock: write the hashes into the lock instead of checking them.

    Raises:
        TextError: if the texts are not those of the lock; nothing is written then.
    """
    found = list(documents)
    progress(f"splitting {len(found):,} documents")
    splits = dict(zip(("train", "valid"), split(found, held_out), strict=True))
    contents = {name: json_lines(held) for name, held in splits.items()}
    held = {
        name: {
            "documents": len(splits[name]),
            "bytes": sum(len(document.text.encode()) for document in splits[name]),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        for name, content in contents.items()
    }
    locked = json.loads(lock.read_bytes()) if lock.exists() else {}
    if update_lock:
        write_whole_file(lock, (json.dumps({**locked, corpus: held}, indent=2) + "\n").encode())
    elif locked.get(corpus) != held:
        raise TextError(
            f"{corpus}: {lock.name} expects\n  {locked.get(corpus)}\nfound\n  {held}\n"
            "Nothing is written. Are the sources the pinned ones, and whole? If these are the texts you want,\n"
            "--update-lock makes them the expected ones"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_whole_file(folder / f"{name}.jsonl", content)
    progress("")
    print(f"{'split':<8}{'documents':>12}{'bytes':>14}{'long':>7}  SHA-256 of the file")
    for name, of in held.items():
        long = sum(len(document.text.encode()) >= held_out.long_bytes for document in splits[name])
        print(f"{name:<8}{of['documents']:>12,}{of['bytes']:>14,}{long:>7,}  {of['sha256']}")
    print(
        f"{len(found):,} documents found; long: of {held_out.long_bytes:,} bytes and more. Next:\n"
        f"  m2rnn prepare {folder}/train.jsonl --valid {folder}/valid.jsonl --tokenizer train-bpe --vocab-size 8192"
        f" --out {folder}/tokens"
    )


def json_lines(documents: Iterable[Document]) -> bytes:
    """An object a line, with ``path`` and ``text``."""
    return "".join(json.dumps({"path": document.path, "text": document.text}) + "\n" for document in documents).encode()


def progress(text: str) -> None:
    """Say what is going on, over what was said before; nothing where nobody reads it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
