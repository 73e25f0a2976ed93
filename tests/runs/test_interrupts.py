"""Signals that ask for an end."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from m2rnn.runs import interrupts
from m2rnn.runs.interrupts import SAME_REQUEST, interrupts_noted


def test_one_request_that_comes_twice_is_noted_and_a_later_one_ends_the_process(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(interrupts, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    before = signal.getsignal(signal.SIGINT)
    told = []
    with interrupts_noted(tell=told.append) as interrupted:
        assert not interrupted()
        assert told == []
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            clock[0] += SAME_REQUEST / 2
        assert interrupted()
        assert told == ["stopping after this step, with a checkpoint; Ctrl-C again to quit without saving"]
        clock[0] += SAME_REQUEST
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_later_sigterm_ends_the_process():
    program = """if True:
        import signal, time
        from m2rnn.runs.interrupts import interrupts_noted
        with interrupts_noted((signal.SIGTERM,)) as interrupted:
            print("ready", flush=True)
            while not interrupted():
                time.sleep(0.01)
            print("noted", flush=True)
            while True:
                time.sleep(0.01)
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            for line in (b"ready", b"noted"):
                assert process.stdout.readline().strip() == line
                process.send_signal(signal.SIGTERM)
                time.sleep(SAME_REQUEST + 0.2 if line == b"ready" else 0)
            assert process.wait(10) == -signal.SIGTERM
        finally:
            process.kill()
