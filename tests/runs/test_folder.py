"""A run folder has one user and one set of settings, and its files are whole or absent."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from m2rnn.runs.folder import CHECKPOINTS, RunFolderError, run_folder, saved_step, whole_folder, write_whole_file

ROOT = Path(__file__).parents[2]
SETTINGS = {"group": "S3", "seed": 0, "test_lengths": [8, 16]}

HOLD = """
import sys, time
from pathlib import Path
from m2rnn.runs.folder import run_folder
with run_folder(Path(sys.argv[1]), {"group": "S3", "seed": 0, "test_lengths": [8, 16]}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match="another run is using"), run_folder(tmp_path, SETTINGS):
            pass
        with pytest.raises(RunFolderError), run_folder(tmp_path, SETTINGS, overwrite=True):
            pass
        os.kill(first.pid, signal.SIGKILL)
    with run_folder(tmp_path, SETTINGS):
        pass


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed = 0, not 1"),
        ({"test_lengths": [8]}, "test_lengths"),
        ({"new": True}, "another command or version"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, changed, message):
    with run_folder(tmp_path, SETTINGS):
        (tmp_path / "log.jsonl").write_text("a line")
    with pytest.raises(RunFolderError, match=message), run_folder(tmp_path, SETTINGS | changed):
        pass
    assert (tmp_path / "log.jsonl").read_text() == "a line"
    with run_folder(tmp_path, SETTINGS | changed, overwrite=True):
        assert not (tmp_path / "log.jsonl").exists()
        (tmp_path / "log.jsonl").write_text("another")
    with pytest.raises(RunFolderError), run_folder(tmp_path, SETTINGS):
        pass


def test_a_mistake_before_anything_is_written_leaves_the_folder_free(tmp_path):
    with suppress(ValueError), run_folder(tmp_path, SETTINGS | {"group": "a mistake"}):
        raise ValueError
    with run_folder(tmp_path, SETTINGS):
        (tmp_path / "log.jsonl").write_text("a line")
    with pytest.raises(RunFolderError), run_folder(tmp_path, SETTINGS | {"seed": 1}):
        pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path, overwrite):
    (tmp_path / "results.json").write_text("someone else's")
    with pytest.raises(RunFolderError, match="no run"), run_folder(tmp_path, SETTINGS, overwrite):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_overwriting_deletes_only_what_a_run_wrote(tmp_path):
    with run_folder(tmp_path, SETTINGS):
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
        (tmp_path / "model.partial").mkdir()
    with run_folder(tmp_path, SETTINGS, overwrite=True):
        assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "lock", "settings.json"}


def test_a_file_in_place_of_the_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"cannot write to .*Choose another"
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunFolderError, match=message), run_folder(path, SETTINGS):
            pass


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "model"
    with suppress(KeyboardInterrupt), whole_folder(path) as partial:
        (partial / "weights").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with whole_folder(path) as partial:
        (partial / "config").write_text("whole")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["config"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_file_is_replaced_in_one_go(tmp_path):
    path = tmp_path / "results.json"
    write_whole_file(path, b"one")
    write_whole_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_the_step_that_a_run_has_saved_is_that_of_its_newest_whole_checkpoint(tmp_path):
    assert saved_step(tmp_path) is None
    for name in ("step-00000900", "step-00001000", "step-00002000.partial"):
        (tmp_path / CHECKPOINTS / name).mkdir(parents=True)
    assert saved_step(tmp_path) == 1000
