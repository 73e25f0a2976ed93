"""What a long run tells its user: a live line on a terminal, a plain line every few seconds anywhere else."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import IO, Self

PLAIN_LINE_SECONDS = 5.0


class Display(AbstractContextManager["Display"]):
    """Shows what the run is doing on ``stream``; None shows nothing."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream
        self._next_line = 0.0
        self._status = None
        if stream is not None and stream.isatty():
            from rich.console import Console

            self._status = Console(file=stream).status("")

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, text: str) -> None:
        """Show ``text`` at once: a new phase."""
        self._next_line = 0.0
        self.update(text)

    def update(self, text: str, details: Sequence[str] = ()) -> None:
        """Show ``text``, and ``details`` in lines below, in place of the last update; where that cannot be replaced,
        in one line, and only now and then."""
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text("\n  ".join([text, *details])))  # a string's brackets would be rich's markup
        elif self._stream is not None and time.monotonic() >= self._next_line:
            self._write("; ".join([text, *details]))
            self._next_line = time.monotonic() + PLAIN_LINE_SECONDS

    def note(self, text: str) -> None:
        """Show a line that stays."""
        if self._status is not None:
            self._status.console.print(text, markup=False, highlight=False)
        elif self._stream is not None:
            self._write(text)

    def _write(self, line: str) -> None:
        assert self._stream is not None
        self._stream.write(line + "\n")
        self._stream.flush()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which would break into the display."""
    from transformers import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
