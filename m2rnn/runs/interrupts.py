"""Ctrl-C, noted for the end of the step."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

STOPPING = "stopping after this step, with a checkpoint; Ctrl-C again to quit without saving"
SAME_REQUEST = 1.0  # seconds: timeout and schedulers signal a process and its group, so it comes twice


@contextmanager
def interrupts_noted(
    signals: Sequence[signal.Signals] = (signal.SIGINT,), tell: Callable[[str], None] = lambda text: None
) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed, or another of ``signals`` came.

    The first one is answered at once: ``tell`` is called with what will happen. One that comes more than a second after
    the first does what it did before, as soon as Python code runs.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's business
        yield noted.is_set
        return
    first: float | None = None

    def note(signal_number: int, frame: object) -> None:
        nonlocal first
        noted.set()
        now = time.monotonic()
        if first is None:
            first = now
            with suppress(RuntimeError):  # the signal came while the same stream was being written
                tell(STOPPING)
        if now - first > SAME_REQUEST:
            signal.signal(signal_number, previous[signal_number])
            signal.raise_signal(signal_number)

    previous: dict[int, Any] = {number: signal.signal(number, note) for number in signals}
    try:
        yield noted.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
