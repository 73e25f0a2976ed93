"""The folder of a run: one run at a time, one set of settings, and files that are either whole or absent.

Whatever a kill or a power cut leaves behind, a file or folder with its final name is complete: it is written
under another name, forced to disk, then renamed.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SETTINGS, LOCK, LOG, CHECKPOINTS = "settings.json", "lock", "log.jsonl", "checkpoints"
MODEL, RESULTS, PLOT = "model", "results.json", "accuracy-by-length.png"
RUN_FILES = (CHECKPOINTS, MODEL, LOG, RESULTS, PLOT)
PARTIAL = ".partial"


class RunFolderError(Exception):
    """The folder cannot be used for this run: the message says why and what to do."""


@contextmanager
def run_folder(
    path: Path, settings: Mapping[str, Any], overwrite: bool = False, files: Iterable[str] = RUN_FILES
) -> Iterator[None]:
    """Hold ``path`` for a run with these settings; what an earlier run with the same settings left is kept.

    A run writes ``files``: names of files and folders, its own to delete.

    A run that ended before it wrote anything, such as one with a mistake in its settings, leaves the folder free.

    `RunFolderError` if another process holds it, if it belongs to a run with other settings (``overwrite``
    deletes that run's files), if it holds something that is no run, or if it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not (path / SETTINGS).exists() and _is_begun(path):
            raise RunFolderError(f"{path} holds files, but no run: choose a new or empty folder")
        lock = (path / LOCK).open("a")
    except OSError as error:
        raise RunFolderError(f"cannot write to {path}: {error.strerror}. Choose another folder") from error
    with lock:
        _lock_or_refuse(lock, path)
        if _is_begun(path) and not overwrite:
            _check_settings(path, settings)
        else:
            _clear(path, files)
            write_whole_file(path / SETTINGS, to_json(settings))
        yield


def _is_begun(path: Path) -> bool:
    return any(file.name not in (LOCK, SETTINGS, SETTINGS + PARTIAL) for file in path.iterdir())


def _lock_or_refuse(lock: IO[str], path: Path) -> None:
    # Imported here because Windows has no fcntl, and everything else in the library runs there.
    import fcntl

    # The kernel drops the lock with the process, however it ends: there are no stale locks.
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunFolderError(f"another run is using {path}: wait for it, or choose another folder") from None


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    saved = read_json(path / SETTINGS)
    wanted = json.loads(to_json(settings))
    if saved.keys() != wanted.keys():
        raise RunFolderError(f"{path} holds a run of another command or version of m2rnn: choose another folder")
    for name in sorted(wanted):
        there, here = json.dumps(saved[name]), json.dumps(wanted[name])
        if there != here:
            raise RunFolderError(
                f"{path} holds a run with {name} = {there}, not {here}: "
                "choose another folder, or start anew with --overwrite"
            )


def _clear(path: Path, files: Iterable[str]) -> None:
    # The settings go last: until then the folder still tells whose files these are.
    for name in (*files, SETTINGS):
        for file in (path / name, path / (name + PARTIAL)):
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)


def read_json(path: Path, mend: str = "bring it back, or start anew with --overwrite") -> dict[str, Any]:
    """What ``to_json`` made of the file; `RunFolderError`, which ends with ``mend``, if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}")
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged ({error}): {mend}") from None
    return content


def to_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def write_whole_file(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there, also after a power cut."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(content)
    force_to_disk(partial)
    partial.replace(path)
    force_to_disk(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write into, which gets its name ``path`` once everything in it is on disk."""
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # room, if the disk is full
        raise
    for file in (*partial.iterdir(), partial):
        force_to_disk(file)
    partial.replace(path)
    force_to_disk(path.parent)


def saved_step(folder: Path) -> int | None:
    """The step of a run's newest checkpoint; None if nothing was saved."""
    steps = [path.name.removeprefix("step-") for path in (folder / CHECKPOINTS).glob("step-*")]
    return max((int(step) for step in steps if step.isdecimal()), default=None)


def force_to_disk(path: Path) -> None:
    """fsync a file, or a folder's list of files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
