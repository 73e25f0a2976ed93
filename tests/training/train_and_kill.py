"""Run `train` in children that are killed with SIGKILL, and print how often until one came through.

    python train_and_kill.py FOLDER DATA SEED    kill each child at a random one of its file operations
    python train_and_kill.py FOLDER DATA         let it run undisturbed

The children are forked, so that torch is imported once.
"""

import os
import random
import signal
import sys
from pathlib import Path

import tensorboard  # noqa: F401 (before the fork: it takes seconds)

from m2rnn.training.train import train
from m2rnn.training.train_settings import load_settings
from tests.training.run_and_kill import kill_at_file_operation

SETTINGS = (
    "preset=tiny-hybrid-m2rnn",
    "model.mixers=[m2rnn, attention]",
    "model.mlps=[swiglu, swiglu]",
    "model.hidden_size=16",
    "model.mixer_options={m2rnn: {num_heads: 2, key_dim: 4, value_dim: 4}}",
    "context=24",
    "batch_size=4",
    "micro_batch_size=2",
    "steps=6",
    "warmup_steps=1",
    "learning_rate=1e-2",
    "checkpoint_every=2",
    "device=cpu",
    "report_to=[]",
)


def run_child(folder: Path, data: str, kill_at: int | None) -> int:
    """The exit status of a run in a child process: 0, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        if kill_at is not None:
            kill_at_file_operation(kill_at, folder)
        train(load_settings(None, SETTINGS, {"data": data}), folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    folder, data = Path(sys.argv[1]), sys.argv[2]
    dice = random.Random(int(sys.argv[3])) if len(sys.argv) > 3 else None
    kills = 0
    while True:
        status = run_child(folder, data, dice.randint(1, 60) if dice else None)
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        kills += 1
    sys.stdout.write(f"{kills}\n")


if __name__ == "__main__":
    main()
