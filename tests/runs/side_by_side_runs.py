"""What `test_side_by_side` runs in processes, which import it from here."""

import os
import signal
import time
import warnings
from pathlib import Path

import torch

from m2rnn.runs.display import Display


def threads(display: Display) -> int:
    return torch.get_num_threads()


def meet(mine: Path, other: Path, display: Display) -> None:
    """Return once ``other`` is there, which is made at the same time or never."""
    warnings.warn("slow", stacklevel=1)
    mine.touch()
    deadline = time.monotonic() + 60
    while not other.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fail(display: Display) -> None:
    raise RuntimeError("the gradient is not finite")


def die(display: Display) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
