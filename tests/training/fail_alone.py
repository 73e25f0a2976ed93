"""The m2rnn command under torchrun, whose second process fails in its first step, while the first waits for it."""

import os
from typing import Any

from m2rnn.cli import app
from m2rnn.training.trainer import CheckpointingTrainer


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("of the second process alone")


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        CheckpointingTrainer.training_step = fail  # type: ignore[method-assign, assignment]
    app()
