"""Run `track` in children that are killed with SIGKILL, and print how often until one came through.

    python run_and_kill.py FOLDER SEED    kill each child at a random one of its file operations
    python run_and_kill.py FOLDER         let it run undisturbed

The children are forked, so that torch is imported once.
"""

import os
import random
import signal
import sys
from pathlib import Path

from m2rnn.evaluation.track import track
from m2rnn.training.track_settings import TrackSettings

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


def run_child(folder: Path, kill_at: int | None) -> int:
    """The exit status of a run in a child process: 0, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        if kill_at is not None:
            kill_at_file_operation(kill_at, folder)
        track(SETTINGS, folder, checkpoint_every=3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    folder = Path(sys.argv[1])
    dice = random.Random(int(sys.argv[2])) if len(sys.argv) > 2 else None
    kills = 0
    while True:
        status = run_child(folder, dice.randint(1, 45) if dice else None)
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        kills += 1
    sys.stdout.write(f"{kills}\n")


if __name__ == "__main__":
    main()
