"""Several runs at a time: processes that take one run after the other, one display and one Ctrl-C for all.

A run that fails takes its process with it, since a GPU's error can spoil what comes after; the others go on.
"""

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from m2rnn.runs.display import Display

Run = Callable[..., Any]

STATUS_SECONDS = 0.5
STOPPING_SECONDS = 60.0

_processes = get_context("spawn")  # a forked process cannot use a GPU that its parent has used


@dataclass(frozen=True)
class Failure:
    """Why a run ended without a result: in a line, and where in the code if it was an exception."""

    reason: str
    traceback: str = ""


@dataclass(frozen=True)
class Warned:
    """A warning that a run gave."""

    text: str


@dataclass(frozen=True)
class Done:
    """What a run returned."""

    result: Any


def side_by_side(
    runs: Mapping[str, Run], jobs: int, display: Display, gpus: int = 0, threads: int | None = None
) -> Iterator[tuple[str, Any]]:
    """Call ``run(display=…)`` for each of ``runs``, ``jobs`` at a time, and yield name and result or `Failure` of each
    as it ends.

    Ctrl-C, SIGTERM, or leaving the loop over the results, interrupts the runs as Ctrl-C would and waits for them; a
    second one ends them at once.

    Args:
        runs: what to call, by name; functions and arguments go through pickle.
        jobs: most processes.
        display: shows all that are running, and their warnings, each once.
        gpus: processes take the GPUs in turn; 0 if there is none to choose.
        threads: of each process; default its share of this one's.
    """
    waiting = list(runs.items())[::-1]
    places = list(range(jobs))[::-1]
    busy: list[_Worker] = []
    idle: list[_Worker] = []
    warned: set[str] = set()
    ended = failed = 0
    before = signal.getsignal(signal.SIGTERM)
    set_handler(signal.default_int_handler, signal.SIGTERM)
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                busy.append(idle.pop() if idle else _Worker(places.pop(), jobs, gpus, threads))
                busy[-1].take(*waiting.pop())
            for worker in ready(busy):
                outcome = worker.receive()
                if isinstance(outcome, Warned) and outcome.text not in warned:
                    warned.add(outcome.text)  # once, however many processes give it
                    display.note(f"{worker.run}: {outcome.text}")
                if outcome is None or isinstance(outcome, Warned):
                    continue
                busy.remove(worker)
                ended += 1
                if isinstance(outcome, Failure):
                    failed += 1
                    places.append(worker.place)
                    worker.end()
                    yield worker.run, outcome
                else:
                    idle.append(worker)
                    yield worker.run, outcome.result
            failures = f", {failed} failed" if failed else ""
            lines = [f"{worker.run}: {worker.status}" for worker in busy]
            display.update(f"{ended} of {len(runs)} runs ended{failures}", lines)
    finally:
        if busy:
            running = (
                "a run, which saves where it stands"
                if len(busy) == 1
                else f"{len(busy)} runs, which save where they stand"
            )
            display.say(f"stopping {running}")
        try:
            stop(busy, idle)
        finally:
            set_handler(before, signal.SIGTERM)


class _Worker:
    """A process and this side of its connection."""

    def __init__(self, place: int, jobs: int, gpus: int, threads: int | None) -> None:
        self.place = place
        self.run = ""
        self.status = ""
        self._interruptible = False
        self.connection, theirs = _processes.Pipe()
        threads = threads or max(1, torch.get_num_threads() // jobs)
        gpu = place % gpus if gpus else None
        self._process = _processes.Process(target=_work, args=(theirs, threads, gpu), daemon=True)
        before = signal.getsignal(signal.SIGINT)
        try:  # the process inherits this: a Ctrl-C in the midst of its imports would be a traceback
            set_handler(signal.SIG_IGN)
            self._process.start()
        finally:
            set_handler(before)
        theirs.close()

    def take(self, name: str, run: Run) -> None:
        self.run, self.status = name, "starting"
        with suppress(BrokenPipeError):  # the process is dead, as its next message will say
            self.connection.send(run)

    def receive(self) -> Done | Failure | Warned | None:
        """How the run ended; None if the message was on its progress. A process that has died is a failure."""
        try:
            message: Done | Failure | Warned | str = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            return Failure(f"its process ended with {how}")
        self._interruptible = True
        if not isinstance(message, str):
            return message
        self.status = message
        return None

    def interrupt(self) -> None:
        """Ctrl-C, or the end if the process is still starting."""
        if not self._interruptible:
            self._process.terminate()
        elif self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGINT)

    def end(self, seconds: float = STOPPING_SECONDS) -> None:
        """Wait for the process to end; kill it after ``seconds``."""
        self._process.join(seconds)
        self._process.kill()
        self._process.join()
        self.connection.close()


def ready(workers: list[_Worker]) -> list[_Worker]:
    """Those that have something to say, after at most a second."""
    connections = wait([worker.connection for worker in workers], timeout=1.0)
    return [worker for worker in workers if worker.connection in connections]


def stop(busy: list[_Worker], idle: list[_Worker]) -> None:
    """Interrupt and end all; at once if Ctrl-C comes meanwhile."""
    try:
        for worker in busy:
            worker.interrupt()
        for worker in idle:
            worker.connection.close()
        for worker in (*idle, *busy):
            worker.end()
    except KeyboardInterrupt:
        for worker in (*idle, *busy):
            worker.end(0)
        raise


def set_handler(handler: Any, number: signal.Signals = signal.SIGINT) -> None:
    with suppress(ValueError):  # signals are the main thread's business
        signal.signal(number, handler)


class Relay(Display):
    """The display of a process that has none: what is to be seen goes to the one that has."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._next = 0.0

    def update(self, text: str, details: Sequence[str] = ()) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + STATUS_SECONDS
        try:
            self._connection.send(text)
        except BrokenPipeError:  # the first process is dead: save and end, as with Ctrl-C
            signal.raise_signal(signal.SIGINT)

    def say(self, text: str) -> None:
        self._next = 0.0
        self.update(text)


def _work(connection: Connection, threads: int, gpu: int | None) -> None:
    """Take runs from the first process until one fails or it closes the connection."""
    os.setpgrp()  # the terminal's Ctrl-C goes to the first process alone, which passes it on once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    with suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        if gpu is not None:
            torch.cuda.set_device(gpu)
        warnings.showwarning = lambda message, *_: connection.send(Warned(str(message)))
        relay = Relay(connection)
        relay.say("starting")
        outcome: Done | Failure = Done(None)
        while isinstance(outcome, Done):
            run = connection.recv()
            try:
                outcome = Done(run(display=relay))
            except Exception as error:
                outcome = Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
            connection.send(outcome)
