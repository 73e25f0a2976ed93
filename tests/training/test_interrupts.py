"""Signals that ask for an end."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from m2rnn.training import interrupts
from m2rnn.training.interrupts import SAME_REQUEST, interrupts_noted


def test_one_request_that_comes_twice_is_noted_and_a_later_one_ends_the_process(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(interrupts, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    before = signal.getsignal(signal.SIGINT)
    with interrupts_noted() as interrupted:
        assert not interrupted()
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            clock[0] += SAME_REQUEST / 2
        assert interrupted()
        clock[0] += SAME_REQUEST
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not hasattr(signal, "SIGTERM") or sys.platform == "win32", reason="needs POSIX signals")
def test_a_second_sigterm_kills(tmp_path):
    program = """if True:
        import signal, sys, time
        from m2rnn.training.interrupts import interrupts_noted
        with interrupts_noted((signal.SIGTERM,)) as interrupted:
            print("ready", flush=True)
            while True:
                time.sleep(0.01)
    """
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    for wait in (0.2, SAME_REQUEST, 0.0):
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        time.sleep(wait)
    assert process.wait(10) == -signal.SIGTERM
    process.stdout.close()
