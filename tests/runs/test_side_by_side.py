"""Runs in processes of their own: as many at a time as wanted, and what happens to one happens to no other."""

import io
from functools import partial
from multiprocessing import Pipe

import pytest
import torch

from m2rnn.runs.display import Display
from m2rnn.runs.side_by_side import Failure, Relay, side_by_side
from tests.runs import side_by_side_runs as runs


@pytest.fixture
def six_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("six_threads")
def test_runs_go_side_by_side_and_the_others_go_on_when_one_fails_or_dies(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    several = {
        "a": partial(runs.meet, a, b),
        "b": partial(runs.meet, b, a),
        "fails": runs.fail,
        "dies": runs.die,
        "threads": runs.threads,
    }
    shown = io.StringIO()
    results = dict(side_by_side(several, 2, Display(shown)))
    assert "0 of 5 runs ended; a: starting; b: starting" in shown.getvalue()
    assert [line for line in shown.getvalue().splitlines() if "slow" in line] in (["a: slow"], ["b: slow"])
    failed = results.pop("fails")
    assert failed.reason == "RuntimeError: the gradient is not finite"
    assert "side_by_side_runs.py" in failed.traceback
    assert results == {
        "a": None,
        "b": None,
        "dies": Failure("its process ended with signal SIGKILL"),
        "threads": 3,
    }


def test_a_terminal_shows_brackets_as_they_are():
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with Display(terminal) as display:
        display.say("reading runs[2]/[/old]")
    assert "reading runs[2]/[/old]" in terminal.getvalue()


def test_a_run_whose_first_process_is_dead_stops_as_on_ctrl_c():
    ours, theirs = Pipe()
    relay = Relay(theirs)
    relay.say("step 1")
    assert ours.recv() == "step 1"
    ours.close()
    with pytest.raises(KeyboardInterrupt):
        relay.say("step 2")
