"""Run `prepare` in children that are killed with SIGKILL, and print how often until one came through,
for each of some seeds of the moments.

    python prepare_and_kill.py SOURCE FOLDER SEED…      into FOLDER/SEED

Each child but the last is killed at a random one of its file operations in FOLDER or after a random one of its blocks.
It is forked, so that everything is imported once.
"""

import os
import random
import signal
import sys
import tempfile
from pathlib import Path

from m2rnn.data import prepare as preparing
from m2rnn.data import sources
from m2rnn.data.prepare import Settings, prepare
from m2rnn.data.tokenizers import byte_tokenizer, load_tokenizer

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.truncate", "shutil.rmtree"}


def kill_at_operation(number: int, folder: Path) -> None:
    """Kill this process just before its operation of this number: on a file in ``folder``, or on a block."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event == "block" or (event in FILE_OPERATIONS and str(arguments[0]).startswith(str(folder))):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_child(source: str, folder: Path, kill_at: int, commit_seconds: float) -> int:
    child = os.fork()
    if child == 0:
        kill_at_operation(kill_at, folder)
        prepare(
            Settings({"train": [source]}, valid_fraction=0.3),
            folder,
            processes=1,
            commit_seconds=commit_seconds,
            update=lambda text: sys.audit("block"),
        )
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills_until_done(source: str, folder: Path, dice: random.Random) -> int:
    kills = 0
    while (status := run_child(source, folder, dice.randint(1, 50), dice.choice([0, 0.001]))) != 0:
        assert status == -signal.SIGKILL, status
        kills += 1
    return kills


def main() -> None:
    source, folder, *seeds = sys.argv[1:]
    sources.PIECE_BYTES = preparing.BLOCK_BYTES = 100
    with tempfile.TemporaryDirectory() as unused:  # imports what it takes, before the forks
        byte_tokenizer().save_pretrained(unused)
        load_tokenizer(unused)
    for seed in seeds:
        sys.stdout.write(f"{kills_until_done(source, Path(folder) / seed, random.Random(int(seed)))}\n")


if __name__ == "__main__":
    main()
