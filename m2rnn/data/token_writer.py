"""Token files that grow: whatever happens, what ``progress.json`` counts is on disk, and nothing else is kept."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from m2rnn.data.encode import EncodedBlock
from m2rnn.data.sources import DataError
from m2rnn.data.token_files import ENDS, documents_name, tokens_name
from m2rnn.runs.folder import PARTIAL, force_to_disk, read_json, to_json, write_whole_file

PROGRESS = "progress.json"
REPORTED = 100  # rejected documents that are named, not only counted


@dataclass
class Written:
    """How much of a split is written."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0


@dataclass
class Progress:
    """The first ``blocks`` blocks of the sources are written; this is what they held."""

    blocks: int = 0
    splits: dict[str, Written] = field(default_factory=dict)
    empty: int = 0
    rejected: int = 0
    first_rejected: list[str] = field(default_factory=list)


def load_progress(path: Path) -> Progress:
    """What is in the file; nothing if there is none."""
    if not path.exists():
        return Progress()
    saved = read_json(path)
    splits = {split: Written(**written) for split, written in saved.pop("splits").items()}
    return Progress(splits=splits, **saved)


class TokenWriter:
    """Appends encoded blocks to the token files of some splits.

    On entering, the files are cut back to what ``progress`` counts. ``commit`` makes everything written since then
    last; ``finish`` gives the files their names.

    Raises:
        DataError: if the files hold less than ``progress`` counts.
        OSError: naming the file that cannot be written.
    """

    def __init__(self, folder: Path, splits: Iterable[str], dtype: np.dtype[Any]) -> None:
        self.folder, self.dtype = folder, dtype
        self.progress = load_progress(folder / PROGRESS)
        for split in splits:
            self.progress.splits.setdefault(split, Written())
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            for split, written in self.progress.splits.items():
                self._open(tokens_name(split), written.tokens * self.dtype.itemsize)
                self._open(documents_name(split), written.documents * ENDS.itemsize)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # what was not committed is cut off anyway
                file.close()

    def write(self, block: EncodedBlock) -> None:
        """Append the documents of the next block."""
        for split, encoded in block.splits.items():
            written = self.progress.splits[split]
            self._append(tokens_name(split), encoded.tokens)
            self._append(documents_name(split), (written.tokens + encoded.lengths.cumsum()).astype(ENDS))
            written.tokens += len(encoded.tokens)
            written.documents += len(encoded.lengths)
            written.bytes += encoded.bytes
        self.progress.blocks += 1
        self.progress.empty += block.empty
        self.progress.rejected += sum(rejected.documents for rejected in block.rejected)
        room = REPORTED - len(self.progress.first_rejected)
        self.progress.first_rejected += [str(rejected) for rejected in block.rejected[:room]]

    def commit(self) -> None:
        """Force to disk what was written, then that it was."""
        for name, file in self._files.items():
            with self._naming(name):
                file.flush()
                os.fsync(file.fileno())
        write_whole_file(self.folder / PROGRESS, to_json(asdict(self.progress)))

    def finish(self) -> None:
        """Commit, and give the files their names."""
        self.commit()
        for name in self._files:
            self._partial(name).replace(self.folder / name)
        force_to_disk(self.folder)

    def _partial(self, name: str) -> Path:
        return self.folder / (name + PARTIAL)

    def _open(self, name: str, size: int) -> None:
        path = self._partial(name)
        with self._naming(name):
            if (self.folder / name).exists():  # killed between finishing and the manifest
                (self.folder / name).replace(path)
            self._files[name] = path.open("ab")
            found = path.stat().st_size
            if found < size:
                raise DataError(
                    f"{path} has {found:,} bytes, but {size:,} were written: it was damaged. "
                    "Start anew by overwriting the folder (--overwrite)"
                )
            os.truncate(path, size)

    def _append(self, name: str, content: NDArray[Any]) -> None:
        with self._naming(name):
            self._files[name].write(content.data)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._partial(name))) from error
