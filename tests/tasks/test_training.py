"""A run that was killed or interrupted goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import get_total_norm

from m2rnn.runs.errors import SettingsError
from m2rnn.runs.folder import RunFolderError, run_folder
from m2rnn.tasks import training as track
from m2rnn.tasks.curriculum import Curriculum, Progress
from m2rnn.tasks.settings import TrackSettings
from m2rnn.tasks.training import DivergedError, build_config, build_model, draw_noise, train, train_step

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TINY = {"hidden_size": 8, "mixer_options": {"m2rnn": {"value_dim": 4}}}


def run_and_kill(folder: Path, *seed: str) -> int:
    """How many kills it took until the run in ``folder`` was done."""
    command = [sys.executable, str(Path(__file__).with_name("run_and_kill.py")), str(folder), *seed]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_and_kill(folder) == 0
    return folder


@pytest.mark.parametrize("seed", ["0", "1"])
def test_killed_runs_end_with_the_same_bytes(tmp_path, undisturbed, seed):
    kills = run_and_kill(tmp_path, seed)
    assert kills >= 3
    assert (tmp_path / "log.jsonl").read_bytes() == (undisturbed / "log.jsonl").read_bytes()
    weights = Path("model", "model.safetensors")
    assert (tmp_path / weights).read_bytes() == (undisturbed / weights).read_bytes()
    results = [json.loads((folder / "results.json").read_text()) for folder in (tmp_path, undisturbed)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    leftovers = [file for file in tmp_path.rglob("*.partial") if "checkpoints" not in file.parts]
    assert not leftovers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_says_how_to_resume(tmp_path, number):
    settings = TrackSettings(group="parity", model=TINY, train_length=6, steps=2000, batch_size=4)
    log = tmp_path / "log.jsonl"
    options = "--group parity --train-length 6 --steps 2000 --batch-size 4 --device cpu"
    sizes = [f"--model={name}={json.dumps(value)}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "m2rnn", "track", "--out", str(tmp_path), *options.split(), *sizes]
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command resumes" in errors
    assert "Traceback" not in errors
    stopped_at = len(log.read_text().splitlines())
    assert 0 < stopped_at < 2000
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{stopped_at:08d}"]
    with run_folder(tmp_path, settings.as_json()):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_comparison_saves_every_run(tmp_path, number):
    options = (
        "--compare m2rnn,gru --jobs 2 --train-length 6 --steps 100000 --batch-size 4 --device cpu --model hidden_size=8"
    )
    command = [sys.executable, "-m", "m2rnn", "track", "--out", str(tmp_path), *options.split()]
    logs = [tmp_path / mixer / "seed-0" / "log.jsonl" for mixer in ("m2rnn", "gru")]
    # A group of its own, all of which gets the signal, as from a terminal
    with subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not all(log.exists() and log.stat().st_size for log in logs) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command resumes" in errors
    assert "Traceback" not in errors
    for log in logs:
        stopped_at = len(log.read_text().splitlines())
        assert [path.name for path in (log.parent / "checkpoints").iterdir()] == [f"step-{stopped_at:08d}"]
        with run_folder(log.parent, json.loads((log.parent / "settings.json").read_text())):
            pass  # nobody holds it any more


def test_an_interrupted_run_resumes_to_the_same_log_and_weights(tmp_path, monkeypatch):
    settings = TrackSettings(group="parity", model=TINY, train_length=6, steps=9, batch_size=4, noise=0.5)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    expected = train(settings, whole)

    original = Curriculum.after

    def press_ctrl_c(curriculum: Curriculum, progress: Progress, loss: float) -> Progress:
        if progress.step == 4:
            signal.raise_signal(signal.SIGINT)
        return original(curriculum, progress, loss)

    monkeypatch.setattr(Curriculum, "after", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        train(settings, stopped)
    monkeypatch.undo()
    assert len((stopped / "log.jsonl").read_text().splitlines()) == 5
    resumed = train(settings, stopped)
    assert resumed.progress == expected.progress
    assert (stopped / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    for a, b in zip(resumed.model.parameters(), expected.model.parameters(), strict=True):
        assert (a == b).all()


def test_a_log_shorter_than_the_checkpoint_is_refused(tmp_path):
    settings = TrackSettings(model=TINY, steps=2, batch_size=2, train_length=4)
    train(settings, tmp_path, checkpoint_every=1)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="shorter"):
        train(settings, tmp_path)


def test_a_diverged_run_is_named_before_the_weights_change(tmp_path, monkeypatch):
    settings = TrackSettings(model=TINY, steps=2, batch_size=2, train_length=4)
    monkeypatch.setattr("m2rnn.tasks.training.cross_entropy", lambda logits, targets: logits.sum() * float("inf"))
    with pytest.raises(DivergedError, match=r"step 1: the loss is -?(inf|nan) .*nan\. Try a smaller learning rate"):
        train(settings, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_the_log_tells_every_step_and_no_time(tmp_path):
    settings = TrackSettings(model=TINY, steps=5, batch_size=2, train_length=4)
    result = train(settings, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert set(lines[0]) == {"step", "length", "inputs", "loss", "smoothed_loss", "learning_rate", "gradient_norm"}
    assert result.outcome == "step limit"
    # The first loss is the untrained model's on the first batch: targets stand where their inputs stand.
    batch = settings.problem().batch("train", 0, 2, 4)
    with torch.no_grad():
        logits = build_model(settings).train()(torch.from_numpy(batch.inputs)).logits
    likelihood = logits.log_softmax(-1).gather(-1, torch.from_numpy(batch.targets)[..., None])
    np.testing.assert_allclose(lines[0]["loss"], -likelihood.mean().item(), rtol=1e-5)


def test_the_optimizer_takes_the_rate_of_the_log_and_gradients_that_are_clipped(tmp_path, monkeypatch):
    monkeypatch.setattr("m2rnn.tasks.training.MAX_GRADIENT_NORM", 0.01)
    take, rates = torch.optim.AdamW.step, []

    def step(self):
        (group,) = self.param_groups
        rates.append(group["lr"])
        assert (group["betas"], group["weight_decay"]) == ((0.9, 0.98), 0.0)
        assert get_total_norm([weight.grad for weight in group["params"]]).item() == pytest.approx(0.01, rel=1e-3)
        take(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(TrackSettings(model=TINY, steps=5, batch_size=2, train_length=4), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rates == [line["learning_rate"] for line in lines]
    assert len(set(rates)) > 1


def test_seconds_add_up_over_interruptions(tmp_path, monkeypatch):
    settings = TrackSettings(model=TINY, steps=5, batch_size=2, train_length=4)
    assert train(settings, tmp_path, minutes=1e-9).progress.step < 5
    load = track.load_checkpoint
    monkeypatch.setattr(track, "load_checkpoint", lambda *arguments: load(*arguments) | {"seconds": 1000.0})
    assert 1000 < train(settings, tmp_path).seconds < 1060


def test_a_time_limit_ends_the_training(tmp_path):
    settings = TrackSettings(model=TINY, steps=10_000, batch_size=2, train_length=4)
    result = train(settings, tmp_path, minutes=0.01)
    assert result.outcome == "time limit"
    assert result.progress.step < 10_000
    assert train(settings, tmp_path, minutes=0.01).progress == result.progress


def test_a_run_that_stays_at_one_length_is_given_up(tmp_path):
    settings = TrackSettings(model=TINY, steps=10_000, patience=7, batch_size=2, train_length=5)
    result = train(settings, tmp_path)
    assert (result.outcome, result.progress.step, result.progress.length) == ("given up", 7, 4)
    assert train(settings, tmp_path).progress == result.progress


def test_noise_is_of_every_strength_and_the_same_for_a_step():
    settings = TrackSettings(noise=0.5, seed=1)
    noise = draw_noise(settings, 7, (200, 32, 60))
    assert noise.equal(draw_noise(settings, 7, (200, 32, 60)))
    others = [draw_noise(settings, 8, (200, 32, 60)), draw_noise(replace(settings, seed=2), 7, (200, 32, 60))]
    deviations = noise.std((1, 2))
    for other in others:
        assert abs(np.corrcoef(deviations, other.std((1, 2)))[0, 1]) < 0.3  # 4 standard errors
    # Uniform from 0 to 0.5: a mean and a deviation within 4 standard errors
    np.testing.assert_allclose(deviations.mean(), 0.25, atol=0.042)
    np.testing.assert_allclose(deviations.std(), 0.5 / 12**0.5, atol=0.02)


def test_noise_is_added_to_the_embeddings():
    settings = TrackSettings(model=TINY)
    batch = settings.problem().batch("train", 0, 2, 4)
    model = build_model(settings)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding.weight, torch.Tensor)
    # With the noise that makes every token an identity, the loss is the one of identities
    noise = (embedding.weight[0] - embedding(torch.from_numpy(batch.inputs))).detach()
    with torch.no_grad():
        logits = model(torch.zeros(2, 4, dtype=torch.long)).logits
    likelihood = logits.log_softmax(-1).gather(-1, torch.from_numpy(batch.targets)[..., None])
    loss, _ = train_step(model, torch.optim.SGD(model.parameters()), batch, 0.0, noise)
    np.testing.assert_allclose(loss, -likelihood.mean().item(), rtol=1e-5)


def test_building_a_model_leaves_the_random_state_alone():
    settings = TrackSettings(model=TINY, seed=3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_model(settings)
    assert (torch.rand(3) == expected).all()
    for a, b in zip(first.parameters(), build_model(settings).parameters(), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": "S9"}, "group 'S9'.*expected S3"),
        ({"inputs": "some"}, "inputs 'some'"),
        ({"seed": -1}, "seed -1"),
        ({"steps": 0}, "steps 0"),
        ({"patience": 0}, "patience 0"),
        ({"grow_below": 0.0}, "grow_below 0.0"),
        ({"decay_steps": 0}, "decay_steps 0"),
        ({"grow_inputs": True, "inputs": "generators"}, "grow_inputs with inputs 'generators'"),
        ({"train_length": -4}, "train_length -4"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"test_lengths": ()}, "test_lengths ''"),
        ({"test_lengths": (64, 32)}, "test_lengths '64,32'"),
        ({"test_lengths": (0, 32)}, "test_lengths '0,32'"),
        ({"mixer": "lstm"}, "mixer 'lstm'.*attention"),
        ({"model": {"hiden_size": 8}}, "model.hiden_size"),
        ({"model": {"mixer_options": {"m2rnn": {"value_size": 4}}}}, "value_size"),
        ({"model": {"hidden_size": "wide"}}, "hidden_size.* expected int, got str .*'wide'"),
        ({"model": {"hidden_size": 33}, "mixer": "attention"}, r"must divide hidden_size \(33\)"),
        ({"model": {"num_hidden_layers": 2}}, "model.num_hidden_layers: expected a field"),
        ({"model": {"vocab_size": 3}}, "model.vocab_size 3: expected at least 6"),
        ({"learning_rate": float("inf")}, "learning_rate inf"),
        ({"noise": -0.5}, "noise -0.5"),
        ({"noise": float("inf")}, "noise inf"),
    ],
)
def test_settings_that_cannot_work_are_named(change, message):
    with pytest.raises(SettingsError, match=message):
        build_config(TrackSettings(**change))


def test_bounded_heads_stay_within_their_bound_and_the_others_do_not(tmp_path):
    options = {"value_dim": 4, "state_weight_bound": 0.5, "bounded_heads": 3}
    settings = TrackSettings(model=TINY | {"mixer_options": {"m2rnn": options}}, steps=5, batch_size=2, train_length=4)
    (layer,) = train(settings, tmp_path).model.model.layers
    largest = torch.linalg.matrix_norm(layer.mixer.state_weight.detach().double(), 2)
    assert largest[:3].max() <= 0.5 + 1e-6
    assert largest[3:].max() > 0.6


def test_the_curriculum_can_be_left_out(tmp_path):
    settings = TrackSettings(model=TINY, steps=1, batch_size=2, train_length=9, curriculum=False)
    train(settings, tmp_path)
    assert json.loads((tmp_path / "log.jsonl").read_text())["length"] == 9
    assert Curriculum(9, 1, grow=False).start().length == 9


def test_inputs_can_begin_with_the_generators(tmp_path):
    settings = TrackSettings(group="S4", model=TINY, steps=3, batch_size=50, train_length=6, grow_inputs=True)
    train(settings, tmp_path)
    assert {json.loads(line)["inputs"] for line in (tmp_path / "log.jsonl").read_text().splitlines()} == {3}


def test_settings_survive_json(tmp_path):
    settings = TrackSettings(model=TINY, test_lengths=(8, 16))
    for _ in range(2):
        with run_folder(tmp_path, settings.as_json()):
            pass
