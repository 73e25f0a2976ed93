"""The map of tasks and mixers counts every seed, those that failed too."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m2rnn import cli
from m2rnn.runs.errors import SettingsError
from m2rnn.tasks.map import accuracy_beyond, draw_map, holds, map_table, read_map


def run(task: str, mixer: str, seed: int, **accuracy: float) -> dict:
    return {
        "settings": {"task": task, "mixer": mixer, "seed": seed, "train_length": 16},
        "title": task,
        "chance": 0.5,
        "accuracy": {name[1:]: {"all": value} for name, value in accuracy.items()},
    }


def write(folder: Path, results: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "settings.json").write_text(json.dumps({"task": "parity", "mixer": ["gru"]}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A comparison on parity with a failed seed, its single runs below it, and a run of its own elsewhere."""
    good = run("parity", "m2rnn", 0, n16=1.0, n32=1.0, n64=0.995, n128=0.9)
    bad = run("parity", "m2rnn", 1, n16=1.0, n32=0.7, n64=0.6, n128=0.5)
    comparison = {"runs": {"m2rnn/seed-0": good, "m2rnn/seed-1": bad}, "failed": {"gru/seed-0": {}, "m2rnn/seed-2": {}}}
    write(tmp_path / "parity", comparison)
    write(tmp_path / "parity/m2rnn/seed-0", good)
    write(tmp_path / "parity/m2rnn/seed-1", bad)
    write(tmp_path / "copying", run("copying", "gru", 0, n8=0.25, n16=0.75))
    return tmp_path


def test_accuracy_beyond_leaves_out_the_lengths_of_training():
    assert accuracy_beyond(run("", "", 0, n16=0.0, n32=1.0, n64=0.5)) == 0.75
    assert accuracy_beyond(run("", "", 0, n8=0.0, n16=1.0)) == 1.0
    assert holds(run("", "", 0, n32=0.0, n64=0.99, n128=0.0))
    assert not holds(run("", "", 0, n32=1.0, n64=0.98, n128=1.0))
    assert holds(run("", "", 0, n32=1.0))


def test_every_seed_is_counted_once(runs):
    cells = read_map([runs])
    assert list(cells) == ["copying", "parity"]
    cell = cells["parity"]["m2rnn"]
    assert (cell.seeds, cell.failed, cell.holding) == (3, 1, 1)
    assert cell.beyond == pytest.approx((0.965 + 0.6 + 0.5) / 3)
    assert cells["parity"]["gru"].as_json() == {"beyond": None, "holding": 0, "seeds": 1, "failed": 1, "by_seed": {}}
    assert cells["copying"]["gru"].beyond == 0.75
    assert read_map([runs / "parity"])["parity"]["m2rnn"].seeds == 3


def test_the_table_has_a_line_for_each_task(runs):
    head, copying, parity, *_ = map_table(read_map([runs])).splitlines()
    assert head.split() == ["gru", "m2rnn"]
    assert copying.split() == ["copying", "75.0%", "0/1"]
    assert parity.split() == ["parity", "failed", "0/1", "68.8%", "1/3"]


def test_the_command_prints_and_draws(runs, tmp_path):
    done = CliRunner().invoke(cli.app, ["tasks", "report", str(runs), "--out", str(tmp_path / "maps/map.png")])
    assert done.exit_code == 0, done.output
    assert "at least 99% at 4 times" in done.stdout
    assert (tmp_path / "maps/map.png").read_bytes().startswith(b"\x89PNG")
    told = CliRunner().invoke(cli.app, ["tasks", "report", str(runs), "--json"])
    assert json.loads(told.stdout)["parity"]["m2rnn"]["by_seed"] == {"0": pytest.approx(0.965), "1": pytest.approx(0.6)}


def test_the_labels_of_a_map_of_one_cell_lie_within_it(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("m2rnn.tasks.map.save_figure", lambda figure, path: drawn.append(figure))
    draw_map(tmp_path / "map.png", read_map([runs / "copying"]))
    (figure,) = drawn
    figure.draw_without_rendering()
    axes, bar = figure.axes
    for label in (axes.xaxis.label, bar.yaxis.label):
        corners = label.get_window_extent().corners()
        assert all(figure.bbox.contains(x, y) for x, y in corners), label


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"no results\.json in it"):
        read_map([tmp_path])
    done = CliRunner().invoke(cli.app, ["tasks", "report", str(tmp_path)])
    assert done.exit_code == 2
    assert "Traceback" not in done.output
