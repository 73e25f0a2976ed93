"""`m2rnn tasks`: every problem is trained and tested as the word problems are."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m2rnn import cli
from m2rnn.runs.errors import SettingsError
from m2rnn.tasks import run as tracking
from m2rnn.tasks.curriculum import Progress
from m2rnn.tasks.problems import PROBLEMS
from m2rnn.tasks.settings import RunSettings, TaskSettings, TrackSettings, task_settings
from m2rnn.tasks.training import build_config, train

TINY = {"hidden_size": 8, "mixer_options": {"m2rnn": {"value_dim": 4}}}
QUICK = {"model": TINY, "steps": 2, "batch_size": 2, "test_sequences": 4}


def quick(task: str, **choices) -> TaskSettings:
    return task_settings(task, train_length=16, test_lengths=(16, 24), **{**QUICK, **choices})


@pytest.mark.parametrize("task", PROBLEMS)
def test_lengths_are_those_of_the_task_unless_others_are_given(task):
    settings = task_settings(task)
    problem = settings.problem()
    assert settings.train_length == problem.train_lengths[1]
    assert settings.test_lengths == problem.test_lengths
    assert task_settings(task, train_length=64, test_lengths=(64, 99)).test_lengths == (64, 99)
    assert build_config(settings).vocab_size == problem.vocab_size
    assert settings.plan().start().length >= problem.min_length


def test_a_batch_follows_from_seed_and_step_its_length_too_where_it_is_drawn():
    settings = quick("parity", seed=3)
    problem = settings.problem()
    lengths = [settings.train_batch(problem, Progress(step, length=10)).inputs.shape[1] for step in range(200)]
    assert set(lengths) == set(range(1, 11))
    again = settings.train_batch(problem, Progress(7, length=10))
    assert (again.inputs == settings.train_batch(problem, Progress(7, length=10)).inputs).all()
    fixed = quick("dyck")
    assert {fixed.train_batch(fixed.problem(), Progress(step, length=10)).inputs.shape[1] for step in range(20)} == {10}


@pytest.mark.parametrize("task", ["flip_flop", "mqar", "fuzzy_recall", "boxes", "S3"])
def test_a_run_leaves_model_results_and_plot(tmp_path, task):
    settings = quick(task)
    results = tracking.track(settings, tmp_path)
    assert (tmp_path / "model/model.safetensors").exists()
    assert (tmp_path / "accuracy-by-length.png").exists()
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert written == results == tracking.track(settings, tmp_path)
    assert results["title"] == task
    assert 0 < results["chance"] < 1
    for accuracy in [*results["accuracy"].values(), *results.get("variants", {}).values()]:
        assert accuracy["sequences"] == 4
        assert accuracy["errors"] == round((1 - accuracy["all"]) * accuracy["answers"])
        assert 0 <= accuracy["last_quarter"] <= 1
    assert set(results.get("variants", {})) == set(settings.problem().variants())


def test_a_task_is_learnt(tmp_path):
    settings = task_settings(
        "even_pairs", {"answers": "all"}, train_length=8, test_lengths=(8, 16), steps=600, batch_size=32
    )
    results = tracking.track(settings, tmp_path)
    assert results["training"]["outcome"] == "solved"
    assert results["title"] == "even_pairs, answers all"
    assert results["accuracy"]["8"]["errors"] == 0
    assert results["accuracy"]["8"]["sequences_right"] == 256


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path):
    settings = quick("copying", steps=6, seed=5)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = train(settings, tmp_path / "whole")
    train(settings, tmp_path / "parts", checkpoint_every=1, minutes=1e-9)  # one step
    parts = train(settings, tmp_path / "parts", checkpoint_every=1)
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        assert (a == b).all(), name


def test_word_problems_of_both_commands_are_the_same():
    track = TrackSettings(group="S3", seed=2, train_length=16)
    task = task_settings("S3", seed=2, train_length=16)
    assert isinstance(track, RunSettings)
    ours, theirs = (settings.train_batch(settings.problem(), Progress(4, 12, inputs=6)) for settings in (track, task))
    assert (ours.inputs == theirs.inputs).all()
    assert (ours.targets == theirs.targets).all()


@pytest.mark.parametrize(
    ("task", "options", "choices", "message"),
    [
        ("partiy", {}, {}, "task 'partiy': expected parity"),
        ("dyck", {"colours": 3}, {}, "colours"),
        ("dyck", {"depth": 0}, {}, "depth 0"),
        ("none.py", {}, {}, r"none\.py: no such file"),
        ("phonebook", {}, {"train_length": 11}, "train_length 11: phonebook needs at least 12"),
        ("phonebook", {}, {"test_lengths": (4, 64)}, "test_lengths 4: phonebook needs at least 12"),
        ("parity", {}, {"steps": 0}, "steps 0"),
        ("parity", {}, {"test_lengths": ()}, "test_lengths ''"),
    ],
)
def test_mistakes_are_named(task, options, choices, message):
    with pytest.raises(SettingsError, match=message):
        task_settings(task, options, **choices)


def test_no_setting_of_a_task_is_lost_on_the_way_to_a_file(tmp_path):
    settings = quick("traces", seed=4)
    assert json.loads(json.dumps(replace(settings, options={"variables": 2}).as_json()))["options"] == {"variables": 2}


def command(*arguments: object):
    return CliRunner().invoke(cli.app, ["tasks", *map(str, arguments)])


def test_tasks_are_listed():
    listed = command()
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["task", *PROBLEMS]
    assert all(len(line) < 150 for line in listed.stdout.splitlines())
    assert command("list").stdout == listed.stdout
    told = json.loads(command("list", "--json").stdout)
    assert [task["name"] for task in told] == list(PROBLEMS)
    assert all(task["source"] and task["summary"].endswith(".") for task in told)
    assert len({task["summary"] for task in told}) == len(told), "a variant is told apart from its task"


OPTIONS = [
    "--steps=2",
    "--batch-size=2",
    "--train-length=8",
    "--test-lengths=8,12",
    "--test-sequences=4",
    "--model=hidden_size=8",
    "--device=cpu",
]


def test_a_comparison_runs_every_mixer_and_seed(tmp_path):
    options = ["--option=places=3", "--compare=m2rnn,gru", "--seeds=0,1"]
    done = command("run", "cycle_navigation", "--out", tmp_path, *OPTIONS, *options)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["runs"]) == {f"{mixer}/seed-{seed}" for mixer in ("m2rnn", "gru") for seed in (0, 1)}
    assert results["runs"]["gru/seed-1"]["settings"]["options"] == {"places": 3}
    assert results["runs"]["gru/seed-1"]["title"] == "cycle_navigation, places 3"
    for word in ("m2rnn", "gru"):
        assert word in done.stdout


def test_a_problem_of_ones_own_is_a_task(tmp_path):
    path: Path = tmp_path / "own.py"
    path.write_text("from m2rnn.tasks.problems.automata import EvenPairs as problem\n")
    done = command("run", path, "--out", tmp_path / "run", *OPTIONS)
    assert done.exit_code == 0, done.output
    assert "last quarter" in done.stdout
    path.write_text(path.read_text() + "# changed\n")
    changed = command("run", path, "--out", tmp_path / "run", *OPTIONS)
    assert changed.exit_code == 2
    assert "holds a run with task_sha256" in changed.stderr
    told = CliRunner().invoke(cli.app, ["generate", str(tmp_path / "run/model"), "text"])
    assert told.exit_code == 2
    assert "has no tokenizer: m2rnn tasks trained it on the tokens of" in told.stderr


DOCS = (Path(__file__).parents[2] / "docs/tasks.md").read_text(encoding="utf-8")


def test_the_example_of_the_documentation_is_a_task(tmp_path):
    (tmp_path / "maximum.py").write_text(DOCS.partition("```python\n")[2].partition("```")[0])
    settings = task_settings(str(tmp_path / "maximum.py"), {"numbers": 4})
    batch = settings.problem().batch("test", 0, 3, 12)
    assert [max(row[: t + 1]) for row in batch.inputs.tolist() for t in range(12)] == batch.targets.ravel().tolist()


def test_the_documentation_has_every_task_with_its_lengths():
    rows = [line.split("|") for line in DOCS.splitlines() if line.startswith("| `")]
    told = {name: tuple(map(int, row[2].split(","))) for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert told == {
        name: (problem.train_lengths[1], problem.test_lengths[-1])
        for name, problem in ((name, task_settings(name).problem()) for name in PROBLEMS)
    }


def test_a_mistake_in_the_command_is_one_line(tmp_path):
    for arguments, message in [
        (["nothing"], "m2rnn: task 'nothing': expected parity"),
        (["parity", "--option=answers"], "m2rnn: option 'answers': expected NAME=VALUE, such as modulus=7"),
        (["parity", "--option=answers=some"], "m2rnn: answers 'some': expected 'last' or 'all'"),
        (["parity", "--mixer=lstm"], "mixer 'lstm'"),
    ]:
        done = command("run", *arguments, "--out", tmp_path, *OPTIONS)
        assert done.exit_code == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
