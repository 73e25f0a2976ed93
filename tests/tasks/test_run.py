"""`track` leaves a model that others can use, results that can be read, and a plot."""

import json
from importlib.metadata import version
from itertools import pairwise, permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from m2rnn.models import M2RNNForCausalLM
from m2rnn.runs.errors import SettingsError
from m2rnn.tasks import run as tracking
from m2rnn.tasks.compare import compare
from m2rnn.tasks.report import draw
from m2rnn.tasks.settings import TrackSettings

TINY = {"hidden_size": 8, "mixer_options": {"m2rnn": {"value_dim": 4}}}
QUICK = TrackSettings(model=TINY, train_length=4, steps=2, batch_size=2, test_lengths=(4, 8), test_sequences=6)


SOLVED = TrackSettings(
    inputs="generators", train_length=3, batch_size=32, steps=600, test_lengths=(3, 40), test_sequences=50
)


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt S3 on sequences of 3 generators, few enough to have seen them all."""
    folder = tmp_path_factory.mktemp("solved")
    results = tracking.track(SOLVED, folder)
    assert results["training"]["outcome"] == "solved"
    assert results["hardware"]["threads"] == torch.get_num_threads()  # here: each test has another number
    return folder


def test_the_saved_model_predicts_sequences_that_others_made(solved):
    elements = list(permutations(range(3)))
    sequences = list(product(SOLVED.problem().alphabet.tolist(), repeat=3))
    expected = []
    for sequence in sequences:
        points, targets = (0, 1, 2), []
        for number in sequence:
            points = tuple(elements[number][point] for point in points)
            targets.append(elements.index(points))
        expected.append(targets)
    for model_class in (M2RNNForCausalLM, AutoModelForCausalLM):
        model = model_class.from_pretrained(solved / "model").eval()
        with torch.no_grad():
            predictions = model(torch.tensor(sequences)).logits.argmax(-1)
        assert (predictions == torch.tensor(expected)).all()


def test_results_hold_what_is_needed_to_judge_and_repeat_a_run(solved):
    results = json.loads((solved / "results.json").read_text())
    assert results["settings"]["group"] == "S3"
    model = M2RNNForCausalLM.from_pretrained(solved / "model")
    assert results["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert results["chance"] == 1 / 6
    assert results["versions"]["torch"] == version("torch")
    assert results["training"]["step"] < 600
    for length in (3, 40):
        accuracy = results["accuracy"][str(length)]
        buckets = accuracy["by_position"]
        assert [buckets[0]["start"], buckets[-1]["stop"]] == [0, length]
        assert all(a["stop"] == b["start"] for a, b in pairwise(buckets))
        sizes = np.array([bucket["stop"] - bucket["start"] for bucket in buckets])
        values = np.array([bucket["accuracy"] for bucket in buckets])
        assert accuracy["all"] == pytest.approx((sizes * values).sum() / length)
    assert results["accuracy"]["3"]["all"] == 1


def test_a_finished_run_is_read_and_not_repeated(solved, monkeypatch):
    monkeypatch.setattr(tracking, "train", None)
    assert tracking.track(SOLVED, solved) == json.loads((solved / "results.json").read_text())


def test_the_score_is_that_of_the_test_split_in_batches_of_any_size(solved, monkeypatch):
    model = M2RNNForCausalLM.from_pretrained(solved / "model").eval()
    settings = TrackSettings(group="S3", test_sequences=50)
    whole = tracking.score_model(model, settings, 40)
    for tokens in (7 * 40, 1):  # no fewer than a sequence, however long it is
        monkeypatch.setattr(tracking, "TOKENS_PER_BATCH", tokens)
        assert tracking.score_model(model, settings, 40).by_position() == pytest.approx(whole.by_position())
    inputs, targets = settings.problem().batch("test", 0, 50, 40)
    with torch.no_grad():
        right = model(torch.from_numpy(inputs)).logits.argmax(-1).numpy() == targets
    assert whole.accuracy() == pytest.approx(right.mean())
    assert whole.sequences == 50


def test_the_model_is_the_one_tested_after_a_training_ended_by_minutes_went_on(tmp_path, monkeypatch):
    tested = []

    def press_ctrl_c(trained, *rest):
        tested.append(trained.model)
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking, "evaluate", press_ctrl_c)
    for minutes in (0, None):
        with pytest.raises(KeyboardInterrupt):
            tracking.track(QUICK, tmp_path, minutes=minutes)
    saved = M2RNNForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    weights = [[model.state_dict()[name] for name in saved] for model in tested]
    assert not all(map(torch.equal, *weights))
    assert all(map(torch.equal, saved.values(), weights[1]))


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(SettingsError, match="compare 'gru,gru'"):
        compare(QUICK, ["gru", "gru"], [0], folder)
    with pytest.raises(SettingsError, match="seeds '1,2,1'"):
        compare(QUICK, ["gru"], [1, 2, 1], folder)
    with pytest.raises(SettingsError, match="jobs 0"):
        compare(QUICK, ["gru"], [0], folder, jobs=0)
    with pytest.raises(SettingsError, match="mixer 'lstm'"):
        compare(TrackSettings(), ["gru", "lstm"], [0], folder)
    for device in ("abacus", "meta"):
        with pytest.raises(SettingsError, match=f"device '{device}'"):
            tracking.track(TrackSettings(device=device), folder)
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'm2rnn\[plot\]'"):
        tracking.track(QUICK, folder)
    assert not folder.exists()


def test_one_length_is_drawn_without_a_warning():
    figure = Figure()
    settings = {"mixer": "m2rnn", "seed": 0, "train_length": 3, "test_lengths": [3]}
    run = {"settings": settings, "chance": 0.5, "accuracy": {"3": {"last_quarter": 1.0}}}
    axes = figure.subplots()
    draw(axes, [run], {"m2rnn": ("C0", "o")})
    figure.draw_without_rendering()
    assert axes.get_xlim() == (1.5, 6)


def test_lengths_close_together_do_not_run_into_one_another():
    lengths = (64, 100, 110, 120, 128, 256, 1024)
    accuracy = {str(length): {"last_quarter": 1.0} for length in lengths}
    settings = {"mixer": "m2rnn", "seed": 0, "train_length": 128, "test_lengths": lengths}
    axes = Figure().subplots()
    draw(axes, [{"settings": settings, "chance": 0.5, "accuracy": accuracy}], {"m2rnn": ("C0", "o")})
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "100", "", "", "128", "256", "1024"]
