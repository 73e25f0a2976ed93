"""Text to token files: one process reads and writes, many parse and tokenise.

The result is the documents in the order of the sources, whatever the number of processes and however often it was
interrupted.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import m2rnn
from m2rnn.data.encode import Block, EncodedBlock, Encoding, encode_all, is_valid, share_of
from m2rnn.data.sources import DataError, Files, HubDataset, Reading, Rejected, documents, find_source, pieces
from m2rnn.data.token_files import (
    FORMAT,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    TokenDataset,
    checksums,
    checksums_name,
    documents_name,
    file_hash,
    read_manifest,
    tokens_name,
)
from m2rnn.data.token_writer import PROGRESS, Progress, TokenWriter
from m2rnn.data.tokenizers import (
    TOKENIZER_FILE,
    adds_bos,
    byte_tokenizer,
    load_tokenizer,
    save_tokenizer,
    set_bos,
    tokenizer_hash,
    train_bpe,
    vocab_size_of,
)
from m2rnn.runs.cores import cores
from m2rnn.runs.errors import check_sizes
from m2rnn.runs.folder import run_folder, to_json, whole_folder, write_whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = (tokens_name, checksums_name, documents_name)
FILES = (TOKENIZER, PROGRESS, MANIFEST, *(name(split) for split in SPLITS for name in NAMES))
# What a tokenizer is loaded from: its own file or older ones that it is converted from, and its special tokens.
VERSIONED = (
    TOKENIZER_FILE,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
BLOCK_BYTES = 2**22
SHOWN = 10  # rejected documents that the table names
BYTES, BPE = "bytes", "train-bpe"

Say = Callable[[str], None]
Sources = dict[str, list[Files | HubDataset]]


@dataclass(frozen=True)
class Settings:
    """What decides the token files, besides the text.

    Attributes:
        sources: for each split (``train``, ``valid``, ``test``), files, folders, globs or datasets of the Hub.
        reading: how to find documents in them.
        tokenizer: ``"bytes"``, ``"train-bpe"`` (on the training split), or what ``load_tokenizer`` takes.
        vocab_size: of ``"train-bpe"``.
        bpe_fraction: of the training documents to train it on.
        valid_fraction: of the documents of ``train`` to put into ``valid`` instead, chosen by a hash of the text, so
            that copies of a document are on the same side.
        bos: whether documents begin with the tokenizer's bos; None for as the tokenizer itself begins texts. The
            tokenizer that is written, and that of a model trained on the tokens, begins texts likewise.

    Raises:
        DataError: for a value that cannot be.
    """

    sources: Mapping[str, Sequence[str]]
    reading: Reading = field(default_factory=Reading)
    tokenizer: str = BYTES
    vocab_size: int = 32000
    bpe_fraction: float = 1.0
    valid_fraction: float = 0.0
    bos: bool | None = None

    def __post_init__(self) -> None:
        check_sizes(vars(self))
        if not self.sources.get("train"):
            raise DataError("no source: name files, folders or a dataset of the Hub")
        if not 0 <= self.valid_fraction < 1:
            raise DataError(f"valid_fraction {self.valid_fraction}: expected at least 0 and less than 1")
        if not 0 < self.bpe_fraction <= 1:
            raise DataError(f"bpe_fraction {self.bpe_fraction}: expected more than 0 and at most 1")
        if self.valid_fraction and self.sources.get("valid"):
            raise DataError("valid_fraction and sources for valid: expected only one of them")
        if self.reading.separator == "":
            raise DataError("separator '': expected at least one character")

    @property
    def splits(self) -> list[str]:
        """The splits to write."""
        return [split for split in SPLITS if self.sources.get(split) or (split == "valid" and self.valid_fraction)]


def prepare(
    settings: Settings,
    folder: Path,
    *,
    processes: int | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    overwrite: bool = False,
    commit_seconds: float = 5.0,
    say: Say = lambda text: None,
    update: Say = lambda text: None,
) -> dict[str, Any]:
    """Write the token files of ``settings`` into ``folder`` and return their manifest.

    Run again, it goes on where it stopped; finished, it only returns the manifest.

    Args:
        processes: how many parse and tokenise; default one a core. With more than one, a script that calls this
            needs ``if __name__ == "__main__"``.
        on_error: whether to stop at the first text that cannot be read, or to leave all such out and count them.
        overwrite: delete what other settings made in the folder.
        commit_seconds: how often to force what is written to disk.
        say, update: called with what is going on: something new, or the same a little later.

    Raises:
        DataError: for sources or text that cannot be used.
        RunFolderError: if the folder belongs to other settings or to something else, or another process uses it.
        OSError: if a file cannot be written, or one of the processes was killed.
    """
    if on_error not in ("fail", "skip"):
        raise DataError(f"on_error {on_error!r}: expected 'fail' or 'skip'")
    if processes is not None and processes < 1:
        raise DataError(f"processes {processes}: expected at least 1")
    sources: Sources = {
        split: [_without(folder, find_source(name, settings.reading)) for name in settings.sources.get(split, ())]
        for split in settings.splits
    }
    settings = replace(settings, bos=_begins_with_bos(settings))
    versions = {split: [_version(source) for source in found] for split, found in sources.items()}
    tokenizer_version = _tokenizer_version(settings.tokenizer)
    settled = {**asdict(settings), "versions": versions, "tokenizer_version": tokenizer_version}
    with run_folder(folder, settled, overwrite, FILES):
        if (folder / MANIFEST).exists():
            (folder / PROGRESS).unlink(missing_ok=True)  # killed just before the end
            manifest = read_manifest(folder)
            for split in manifest["splits"]:
                TokenDataset(folder, split)  # or says what is missing
            return manifest
        if not (folder / TOKENIZER).exists():
            say(f"tokenizer: {settings.tokenizer}")
            tokenizer = _make_tokenizer(settings, sources["train"], on_error, update)
            with whole_folder(folder / TOKENIZER) as unfinished:
                save_tokenizer(tokenizer, unfinished)
        described = _describe_tokenizer(settings, folder / TOKENIZER)
        encoding = _encoding(settings, folder / TOKENIZER, described)
        with TokenWriter(folder, settings.splits, encoding.dtype) as writer:
            blocks = islice(_blocks(sources, settings.reading), writer.progress.blocks, None)
            _write(writer, encode_all(blocks, encoding, processes or cores()), on_error, commit_seconds, update)
            writer.finish()
        _check_not_empty(writer.progress)
        say("reading the files again, for their hashes")
        manifest = _manifest(settings, sources, writer, described)
        write_whole_file(folder / MANIFEST, to_json(manifest))
        (folder / PROGRESS).unlink()
        return manifest


def table(manifest: Mapping[str, Any]) -> str:
    """What the token files hold, one row a split, and what was left out."""
    lines = [f"{'split':<8}{'documents':>14}{'tokens':>18}{'bytes':>18}{'bytes/token':>13}"]
    for split, held in manifest["splits"].items():
        lines.append(
            f"{split:<8}{held['documents']:>14,}{held['tokens']:>18,}{held['bytes']:>18,}"
            f"{held['bytes'] / held['tokens']:>13.2f}"
        )
    tokenizer = manifest["tokenizer"]
    begun = "; documents begin with bos" if manifest["bos"] else ""
    lines += [
        "",
        f"tokenizer {tokenizer['name']}: {tokenizer['vocab_size']:,} ids, stored as {manifest['dtype']}{begun}",
    ]
    if manifest["empty"]:
        lines.append(f"{manifest['empty']:,} empty documents left out")
    if manifest["rejected"]:
        shown = manifest["first_rejected"][:SHOWN]
        more = len(manifest["first_rejected"]) > SHOWN
        lines.append(f"{manifest['rejected']:,} that cannot be read left out:")
        lines += [f"  {reason}" for reason in shown] + ([f"  and more, see {MANIFEST}"] if more else [])
    return "\n".join(lines)


def _without(folder: Path, source: Files | HubDataset) -> Files | HubDataset:
    """The source less what is written, which may lie in it."""
    if isinstance(source, HubDataset):
        return source
    written = os.path.join(os.path.abspath(folder), "")
    return replace(source, paths=[path for path in source.paths if not os.path.abspath(path).startswith(written)])


def _version(source: Files | HubDataset) -> dict[str, Any]:
    """What tells that a source is not what it was."""
    if isinstance(source, HubDataset):
        return {}
    content = hashlib.sha256()
    for path in source.paths:
        found = path.stat()
        content.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return {"files": len(source.paths), "names_sizes_and_times": content.hexdigest()}


def _tokenizer_version(name: str) -> str | None:
    """SHA-256 of a tokenizer's file on this machine, or of the files of its folder: they also say which id is eos."""
    path = Path(name)
    if name in (BYTES, BPE) or not path.exists():
        return None
    if path.is_file():
        return file_hash(path)
    files = [path / file for file in VERSIONED if (path / file).is_file()]
    return hashlib.sha256("".join(f"{file.name}\0{file_hash(file)}\0" for file in files).encode()).hexdigest()


def _make_tokenizer(
    settings: Settings, sources: Sequence[Files | HubDataset], on_error: str, update: Say
) -> "PreTrainedTokenizerBase":
    if settings.tokenizer == BYTES:
        tokenizer = byte_tokenizer()
    elif settings.tokenizer == BPE:
        tokenizer = train_bpe(_bpe_texts(settings, sources, on_error, update), settings.vocab_size)
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {settings.tokenizer!r} has no eos token to end documents with: give it one")
    if settings.bos and tokenizer.bos_token_id is None:
        raise DataError(f"tokenizer {settings.tokenizer!r} has no bos token to begin documents with")
    set_bos(tokenizer, bool(settings.bos))
    return tokenizer


def _begins_with_bos(settings: Settings) -> bool:
    if settings.bos is None and settings.tokenizer not in (BYTES, BPE):
        return adds_bos(load_tokenizer(settings.tokenizer))
    return bool(settings.bos)


def _bpe_texts(settings: Settings, sources: Sequence[Files | HubDataset], on_error: str, update: Say) -> Iterator[str]:
    characters = 0
    for piece in pieces(sources, settings.reading):
        for document in documents(piece, settings.reading):
            if isinstance(document, Rejected):
                _refuse(document, on_error)
            elif is_valid(document, settings.valid_fraction) or share_of(document, "bpe") >= settings.bpe_fraction:
                continue
            else:
                yield document
                characters += len(document)
        update(f"tokenizer: training on {characters / 1e6:,.0f} M characters{_percent(piece.done)}")


def _describe_tokenizer(settings: Settings, folder: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder)
    return {
        "name": settings.tokenizer,
        "sha256": tokenizer_hash(folder),
        "vocab_size": vocab_size_of(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _encoding(settings: Settings, folder: Path, described: Mapping[str, Any]) -> Encoding:
    return Encoding(
        reading=settings.reading,
        tokenizer=folder,
        tokenizer_hash=described["sha256"],
        is_bytes=described["sha256"] == tokenizer_hash(byte_tokenizer()),
        vocab_size=described["vocab_size"],
        eos=described["eos_token_id"],
        bos=described["bos_token_id"] if settings.bos else None,
        valid_fraction=settings.valid_fraction,
    )


def _blocks(sources: Sources, reading: Reading) -> Iterator[Block]:
    for split, found in sources.items():
        held, size = [], 0
        for piece in pieces(found, reading):
            held.append(piece)
            size += piece.size
            if size >= BLOCK_BYTES:
                yield Block(split, held)
                held, size = [], 0
        if held:
            yield Block(split, held)


def _write(
    writer: TokenWriter, blocks: Iterator[EncodedBlock], on_error: str, commit_seconds: float, update: Say
) -> None:
    started = committed = time.monotonic()
    bytes_before = sum(written.bytes for written in writer.progress.splits.values())
    for block in blocks:
        for rejected in block.rejected:
            _refuse(rejected, on_error)
        writer.write(block)
        now = time.monotonic()
        if now - committed >= commit_seconds:
            writer.commit()
            committed = now
        written = writer.progress.splits.values()
        size = sum(split.bytes for split in written)
        update(
            f"{block.split}: {size / 1e6:,.1f} MB of text{_percent(block.done)}, "
            f"{sum(split.tokens for split in written) / 1e6:,.1f} M tokens, "
            f"{(size - bytes_before) / 1e6 / max(1e-3, now - started):,.1f} MB/s"
        )


def _refuse(rejected: Rejected, on_error: str) -> None:
    if on_error == "fail":
        raise DataError(f"{rejected}. Mend or remove it, or leave such text out with on_error (--on-error) 'skip'")


def _percent(done: float | None) -> str:
    return "" if done is None else f" ({done:.0%} read)"


def _check_not_empty(progress: Progress) -> None:
    lost = ""
    if progress.rejected:
        first = "".join(f"\n  {reason}" for reason in progress.first_rejected[:SHOWN])
        lost = f"\n{progress.rejected:,} that cannot be read were left out, first:{first}"
    for split, written in progress.splits.items():
        if not written.documents:
            raise DataError(
                f"no document for {split}: give it more text, or a larger fraction (--valid-fraction), "
                f"and --overwrite{lost}"
            )


def _manifest(
    settings: Settings, sources: Sources, writer: TokenWriter, described: Mapping[str, Any]
) -> dict[str, Any]:
    import tokenizers

    progress = writer.progress
    splits = {}
    for split, written in progress.splits.items():
        tokens = writer.folder / tokens_name(split)
        write_whole_file(writer.folder / checksums_name(split), checksums(tokens).tobytes())
        splits[split] = {
            **asdict(written),
            "tokens_sha256": file_hash(tokens),
            "documents_sha256": file_hash(writer.folder / documents_name(split)),
            "sources": [_describe_source(source) for source in sources[split]],
        }
    return {
        "format": FORMAT,
        "dtype": writer.dtype.name,
        "tokenizer": described,
        "bos": settings.bos,
        "splits": splits,
        "valid_fraction": settings.valid_fraction,
        "reading": asdict(settings.reading),
        "empty": progress.empty,
        "rejected": progress.rejected,
        "first_rejected": progress.first_rejected,
        "versions": {"m2rnn": m2rnn.__version__, "tokenizers": tokenizers.__version__},
    }


def _describe_source(source: Files | HubDataset) -> dict[str, Any]:
    if isinstance(source, HubDataset):
        return {"source": source.source}
    size = sum(path.stat().st_size for path in source.paths)
    return {"source": source.source, "files": len(source.paths), "bytes": size}
