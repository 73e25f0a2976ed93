"""The log of a run: a line a step, cut back to the checkpoint when the run goes on."""

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from m2rnn.runs.folder import RunFolderError


class Log(AbstractContextManager["Log"]):
    """A file of JSON lines cut back to its first ``keep_bytes`` when opened."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        if keep_bytes and (not path.exists() or path.stat().st_size < keep_bytes):
            raise RunFolderError(f"{path} is shorter than at the checkpoint: start anew with --overwrite")
        self._file = path.open("ab")
        self._file.truncate(keep_bytes)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, **values: Any) -> None:
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()  # for whoever follows the file, and for what a kill leaves

    def size_on_disk(self) -> int:
        """Force all lines to disk and return the bytes they take."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size
