"""`compare` runs every mixer with every seed and says how the results are spread."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks.state_tracking_results import runs_in
from m2rnn.runs.display import Display
from m2rnn.runs.folder import RunFolderError, run_folder
from m2rnn.tasks import compare as track_compare
from m2rnn.tasks.compare import compare
from m2rnn.tasks.report import comparison_table
from m2rnn.tasks.settings import TrackSettings

MIXERS, SEEDS = ["m2rnn", "gru"], [0, 3]
SETTINGS = TrackSettings(train_length=4, steps=2, batch_size=2, test_lengths=(4, 8), test_sequences=6)
RUNS = ["m2rnn/seed-0", "gru/seed-0", "m2rnn/seed-3", "gru/seed-3"]


def test_a_comparison_survives_a_failed_run_and_goes_on_with_it_alone(tmp_path, monkeypatch):
    with run_folder(tmp_path, SETTINGS.as_json() | {"mixer": MIXERS, "seed": SEEDS}):
        pass
    in_the_way = tmp_path / "gru" / "seed-3"
    in_the_way.mkdir(parents=True)
    (in_the_way / "notes.txt").touch()
    shown = io.StringIO()
    results = compare(SETTINGS, MIXERS, SEEDS, tmp_path, jobs=1, display=Display(shown))
    assert list(results["runs"]) == RUNS[:3]
    assert list(results["failed"]) == ["gru/seed-3"]
    assert "holds files, but no run" in results["failed"]["gru/seed-3"]["reason"]
    notes = [line for line in shown.getvalue().splitlines() if " runs ended" not in line]
    assert [note.split(":")[0] for note in notes] == [*RUNS[:3], "gru/seed-3 failed"]

    shutil.rmtree(in_the_way)
    started = []
    original = track_compare.side_by_side

    def side_by_side(runs, *rest):
        started.extend(runs)
        return original(runs, *rest)

    monkeypatch.setattr(track_compare, "side_by_side", side_by_side)
    whole = compare(SETTINGS, MIXERS, SEEDS, tmp_path)
    assert started == ["gru/seed-3"]
    assert whole["failed"] == {}
    assert list(whole["runs"]) == RUNS
    assert {name: whole["runs"][name] for name in RUNS[:3]} == results["runs"]
    assert json.loads((tmp_path / "results.json").read_text()) == whole
    for name in RUNS:
        settings = whole["runs"][name]["settings"]
        assert f"{settings['mixer']}/seed-{settings['seed']}" == name
        assert json.loads((tmp_path / name / "results.json").read_text()) == whole["runs"][name]
        assert (tmp_path / name / "model" / "model.safetensors").exists()

    image = imread(tmp_path / "accuracy-by-length.png")
    assert min(image.shape[:2]) > 400
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 10  # lines and bands of several colours
    assert compare(SETTINGS, MIXERS, SEEDS, tmp_path) == whole
    with pytest.raises(RunFolderError, match="seed"):
        compare(SETTINGS, MIXERS, [0], tmp_path)


def test_an_interrupted_comparison_that_overwrites_goes_on_without_overwriting(tmp_path, monkeypatch):
    compare(SETTINGS, MIXERS, SEEDS, tmp_path)
    other = replace(SETTINGS, steps=3)

    def press_ctrl_c(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(track_compare, "side_by_side", press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            compare(other, MIXERS, SEEDS, tmp_path, overwrite=True)
    results = compare(other, MIXERS, SEEDS, tmp_path)
    assert [run["training"]["step"] for run in results["runs"].values()] == [3, 3, 3, 3]


def test_the_table_of_the_docs_leaves_out_the_seeds_of_an_overwritten_comparison(tmp_path):
    compare(SETTINGS, ["gru"], [0, 3], tmp_path)
    results = compare(replace(SETTINGS, steps=3), ["gru"], [3], tmp_path, overwrite=True)
    assert runs_in(tmp_path) == list(results["runs"].values())


def result(mixer: str, seed: int, accuracy: float, outcome: str, steps: int) -> dict:
    return {
        "settings": {"mixer": mixer, "seed": seed, "train_length": 128},
        "parameters": 58_824,
        "chance": 1 / 6,
        "training": {"outcome": outcome, "step": steps, "length": 128, "seconds": 60.0},
        "accuracy": {"512": {"all": 1.0, "last_quarter": accuracy}},
    }


def test_the_spread_is_over_the_seeds_of_a_mixer():
    runs = [
        result("m2rnn", 0, 0.9, "solved", 700),
        result("gru", 0, 0.2, "given up", 300),
        result("m2rnn", 1, 0.6, "step limit", 3000),
        result("m2rnn", 2, 1.0, "solved", 800),
    ]
    summary = track_compare.summary({str(number): run for number, run in enumerate(runs)})
    assert summary["m2rnn"]["512"]["last_quarter"] == pytest.approx({"mean": 2.5 / 3, "least": 0.6, "greatest": 1.0})
    assert summary["gru"]["512"]["last_quarter"] == {"mean": 0.2, "least": 0.2, "greatest": 0.2}
    header, *rows, empty, sentence = comparison_table(runs).splitlines()
    assert header.split() == ["mixer", "solved", "512"]
    assert [row.split() for row in rows] == [
        ["m2rnn", "2", "of", "3", "83.33%"],
        ["least", "60.00%"],
        ["gru", "0", "of", "1", "20.00%"],
        ["least", "20.00%"],
    ]
    assert empty == ""
    assert sentence == (
        "Accuracy over the last quarter of positions, mean of 3 seeds, by length; training had up to 128 tokens, "
        "chance is 16.7%."
    )


def test_tiny_models_take_one_thread_each_and_as_many_runs_as_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    taken = []

    def side_by_side(runs, jobs, display, gpus, threads):
        taken.append((jobs, threads))
        return iter(())

    monkeypatch.setattr(track_compare, "side_by_side", side_by_side)
    for number, (cores, jobs) in enumerate([(3, None), (64, None), (64, 2)]):
        monkeypatch.setattr(track_compare, "cores", lambda cores=cores: cores)
        compare(SETTINGS, MIXERS, SEEDS, tmp_path / str(number), jobs=jobs)
    assert taken == [(3, 1), (4, 1), (2, 1)]
    with monkeypatch.context() as patch:
        patch.setattr("m2rnn.tasks.run.TINY", 1)
        compare(SETTINGS, MIXERS, SEEDS, tmp_path / "larger", jobs=1)
    assert taken[-1] == (1, None)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    compare(SETTINGS, MIXERS, SEEDS, tmp_path / "told", jobs=2)
    assert taken[-1] == (2, None)
