"""The CPU kernels' threads: PyTorch's OpenMP threads, or a pool where there is no GNU OpenMP."""

import signal
import threading
import time

import pytest
import torch

from m2rnn.ops.backends import threads as shared
from tests.ops.cases import Case, make_problem, run


@pytest.fixture(params=["openmp", "pool"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pool":
        monkeypatch.setattr(shared, "_openmp", lambda: None)
    elif shared._openmp() is None:
        pytest.skip("this PyTorch does not run on GNU OpenMP")
    return str(request.param)


def test_same_bits_on_either_kind_of_thread(threads: str) -> None:
    problem = make_problem(Case(batch=3, time=40, heads=(1, 1, 4, 4, 4)))
    alone = run(problem, "cpu")
    torch.set_num_threads(3)
    for name, x in run(problem, "cpu").items():
        assert torch.equal(x, alone[name]), name


def test_an_error_on_any_thread_reaches_the_caller(threads: str) -> None:
    both_started = threading.Barrier(2, timeout=30)

    def work() -> None:
        both_started.wait()
        if threading.current_thread() is not threading.main_thread():
            raise ZeroDivisionError("on the other thread")

    with pytest.raises(ZeroDivisionError, match="on the other thread"):
        shared._on_threads(2, work)


def test_an_interrupt_waits_for_the_other_threads(threads: str) -> None:
    """They read and write memory that the caller's exception frees."""
    main, finished = threading.main_thread(), []

    def work() -> None:
        if threading.current_thread() is not main:
            for _ in range(2):
                time.sleep(0.2)
                signal.pthread_kill(main.ident, signal.SIGINT)
            time.sleep(0.2)
            finished.append(True)

    with pytest.raises(KeyboardInterrupt):
        shared._on_threads(2, work)
    assert finished
