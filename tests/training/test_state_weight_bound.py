"""A training holds W to its bound, stopped or not, in one process or more, compiled or not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from m2rnn.layers.state_weight import bound_state_weights
from m2rnn.models.model import M2RNNBlock
from m2rnn.runs.errors import SettingsError
from m2rnn.training.monitor import Monitor
from m2rnn.training.train import Stopped, train
from m2rnn.training.train_settings import TrainSettings
from tests.training.test_train import assert_same_loss, stop_after, train_in_two_processes
from tests.training.train_runs import assert_same_run, log_of, settings_of

BOUND, EVERY = 0.9, 4  # of 6 steps: at step 4, and at the last
OPTIONS = "{num_heads: 3, key_dim: 4, value_dim: 4, state_weight_bound: 0.9, bounded_heads: 2}"
BOUNDED = (f"model.mixer_options.m2rnn={OPTIONS}", f"bound_every={EVERY}")


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A run with a bound that nothing disturbed."""
    folder = tmp_path_factory.mktemp("bounded")
    train(settings_of(data, *BOUNDED), folder)
    return folder


def largest(file: Path) -> Tensor:
    """The largest singular value of each head of the one M2RNN layer."""
    return torch.linalg.matrix_norm(load_file(file)["model.layers.0.mixer.state_weight"].double(), 2)


def model_of(folder: Path) -> Tensor:
    return largest(folder / "model" / "model.safetensors")


def checkpoint_of(folder: Path, step: int) -> Tensor:
    return largest(folder / "checkpoints" / f"step-{step:08d}" / "model-00000.safetensors")


def test_bounded_heads_are_within_the_bound_after_training_and_free_ones_are_not(bounded: Path) -> None:
    for values in (model_of(bounded), checkpoint_of(bounded, 4), checkpoint_of(bounded, 6)):
        assert (values[:2] < BOUND * (1 + 1e-6)).all()
        assert values[2] > 1
    config = json.loads((bounded / "model" / "config.json").read_text())
    assert config["mixer_options"]["m2rnn"]["state_weight_bound"] == BOUND


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_run_stopped_between_two_cuts_goes_on_to_the_same_bits(tmp_path, data, bounded, monkeypatch, step) -> None:
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(Stopped):
            train(settings_of(data, *BOUNDED), tmp_path)
    assert (checkpoint_of(tmp_path, step)[:2].max() > BOUND * (1 + 1e-5)) == (step != 4), "a cut is not for stopping"
    train(settings_of(data, *BOUNDED), tmp_path)
    assert_same_run(tmp_path, bounded)


def test_w_is_cut_after_every_bound_everyth_step_and_after_the_last(tmp_path, data, monkeypatch) -> None:
    cuts, steps = [], []
    end = Monitor.on_step_end

    def end_step(self, args, state, control, **kwargs) -> None:
        steps.append(state.global_step)
        end(self, args, state, control, **kwargs)

    def cut(model: nn.Module) -> int:
        cuts.append(len(steps) + 1)
        return bound_state_weights(model)

    monkeypatch.setattr(Monitor, "on_step_end", end_step)
    monkeypatch.setattr("m2rnn.training.monitor.bound_state_weights", cut)
    train(settings_of(data, *BOUNDED, "steps=5", "bound_every=2", "micro_batch_size=1"), tmp_path)
    assert steps == [1, 2, 3, 4, 5]
    assert cuts == [2, 4, 5]


def test_the_cut_changes_the_next_step_and_no_earlier_one(tmp_path, data, bounded) -> None:
    # Cut at the end alone: the same until the first cut, which is after step 4.
    train(settings_of(data, *BOUNDED, "bound_every=6"), tmp_path)
    found, expected = log_of(tmp_path), log_of(bounded)
    assert found[:4] == expected[:4]
    assert found[4]["gradient_norms"]["m2rnn"] != expected[4]["gradient_norms"]["m2rnn"]
    assert checkpoint_of(tmp_path, 4)[:2].max() > BOUND * (1 + 1e-5)
    assert (model_of(tmp_path)[:2] < BOUND * (1 + 1e-6)).all()


def test_accumulated_gradients_train_the_same(tmp_path, data, bounded) -> None:
    train(settings_of(data, *BOUNDED, "micro_batch_size=1"), tmp_path)
    assert_same_loss(tmp_path, bounded)
    assert (model_of(tmp_path)[:2] < BOUND * (1 + 1e-6)).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's compiler
def test_compiled_layers_train_the_same(tmp_path, data, bounded, monkeypatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(M2RNNBlock, "compile", lambda block: nn.Module.compile(block, backend="aot_eager"))
    train(settings_of(data, *BOUNDED, "compile=true"), tmp_path)
    assert_same_loss(tmp_path, bounded)
    assert (model_of(tmp_path)[:2] < BOUND * (1 + 1e-6)).all()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_two_processes_do_what_one_does(tmp_path, data, bounded, sharded) -> None:
    # Three heads of W: sharded, one process has two of them.
    train_in_two_processes(tmp_path, 60, f"data={data}", f"fsdp={sharded}", *BOUNDED)
    assert_same_loss(tmp_path, bounded)
    assert (model_of(tmp_path)[:2] < BOUND * (1 + 1e-6)).all()


def test_a_run_without_a_bound_does_not_care_how_often(tmp_path, data, undisturbed) -> None:
    train(settings_of(data, "bound_every=1"), tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_a_run_of_before_the_setting_goes_on(tmp_path, data, undisturbed) -> None:
    # bound_every is a setting of the run only where it is not the default.
    assert "bound_every" not in TrainSettings("tiny-m2rnn", data).deciding()
    assert TrainSettings("tiny-m2rnn", data, bound_every=2).deciding()["bound_every"] == 2
    assert "bound_every" not in json.loads((undisturbed / "settings.json").read_text())
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    train(settings_of(data, "bound_every=4"), tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_wrong_settings_are_named(tmp_path, data) -> None:
    with pytest.raises(SettingsError, match="bound_every 0: expected a whole number of at least 1"):
        settings_of(data, "bound_every=0")
    for option, message in (
        ("state_weight_bound=0", "state_weight_bound 0: expected a number above 0"),
        ("bounded_heads=1", "bounded_heads 1: expected a state_weight_bound with it"),
    ):
        with pytest.raises(SettingsError, match=message):
            train(settings_of(data, f"model.mixer_options.m2rnn.{option}"), tmp_path)
