"""Run `train` in children that are killed with SIGKILL, and print how often until one came through.

    python train_and_kill.py FOLDER DATA SEED    kill each child at a random one of its file operations
    python train_and_kill.py FOLDER DATA         let it run undisturbed

The children are forked, so that torch is imported once.
"""

import sys
from pathlib import Path

import tensorboard  # noqa: F401 (before the fork: it takes seconds)

from m2rnn.training.train import train
from m2rnn.training.train_settings import load_settings
from tests.tasks.run_and_kill import until_done

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


if __name__ == "__main__":
    folder, data, seed = Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None
    until_done(lambda: train(load_settings(None, SETTINGS, {"data": data}), folder), folder, seed, operations=60)
