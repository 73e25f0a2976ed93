"""Run `track` in children that are killed with SIGKILL, and print how often until one came through.

    python run_and_kill.py FOLDER SEED    kill each child at a random one of its file operations
    python run_and_kill.py FOLDER         let it run undisturbed

The children are forked, so that torch is imported once.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from m2rnn.tasks.run import track
from m2rnn.tasks.settings import TrackSettings

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
SETTINGS = TrackSettings(
    group="parity",
    mixer="m2rnn",
    model={"hidden_size": 8, "mixer_options": {"m2rnn": {"value_dim": 4}}},
    train_length=6,
    steps=12,
    batch_size=4,
    test_lengths=(8,),
    test_sequences=4,
)


def kill_at_file_operation(number: int, folder: Path) -> None:
    """Kill this process just before its file operation of this number in ``folder``."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in FILE_OPERATIONS and str(arguments[0]).startswith(str(folder)):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_child(run: Callable[[], object], folder: Path, kill_at: int | None) -> int:
    """The exit status of a run in a child process: 0, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        if kill_at is not None:
            kill_at_file_operation(kill_at, folder)
        run()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def until_done(run: Callable[[], object], folder: Path, seed: str | None, operations: int) -> None:
    """Kill each child at a random one of its first ``operations``, or none without a seed; print how many were."""
    dice = random.Random(int(seed)) if seed is not None else None
    kills = 0
    while status := run_child(run, folder, dice.randint(1, operations) if dice else None):
        assert status == -signal.SIGKILL, status
        kills += 1
    sys.stdout.write(f"{kills}\n")


if __name__ == "__main__":
    folder, seed = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    until_done(lambda: track(SETTINGS, folder, checkpoint_every=3), folder, seed, operations=45)
