"""What training saves beside the weights is what the preset says, whatever Trainer changes in between."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from m2rnn.data.token_files import TokenDataset
from m2rnn.models import M2RNNForCausalLM
from m2rnn.training.monitor import Monitor
from m2rnn.training.train import Stopped, build_config, train
from m2rnn.training.trainer import CheckpointingTrainer
from tests.training.train_runs import settings_of

FILES = ("config.json", "generation_config.json")


def saved(folder: Path) -> list[dict]:
    return [json.loads((folder / name).read_text()) for name in FILES]


def untrained(data: str, folder: Path, *overrides: str) -> list[dict]:
    """What the same model saves without a training."""
    M2RNNForCausalLM(build_config(settings_of(data, *overrides), TokenDataset(data))).save_pretrained(folder)
    return saved(folder)


def assert_same_fields(found: list[dict], expected: list[dict]) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert mine.keys() == other.keys()
        for field, value in other.items():
            assert mine[field] == value, field


def stop_after_three_steps(patch: pytest.MonkeyPatch) -> None:
    end = Monitor.on_step_end

    def end_step(self, args, state, control, **kwargs):
        self.step.stop |= state.global_step == 3
        end(self, args, state, control, **kwargs)

    patch.setattr(Monitor, "on_step_end", end_step)


def test_a_trained_model_has_the_configuration_of_the_preset(tmp_path, data, undisturbed):
    expected = untrained(data, tmp_path)
    assert_same_fields(saved(undisturbed / "model"), expected)
    assert [fields["use_cache"] for fields in expected] == [True, True]


def test_a_trained_model_generates_from_its_cache(undisturbed):
    model = AutoModelForCausalLM.from_pretrained(undisturbed / "model")
    lengths = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    model.generate(torch.tensor([[97, 98, 99]]), max_new_tokens=3, min_new_tokens=3)
    assert lengths == [3, 1, 1]


def test_so_has_one_that_was_stopped_and_went_on(tmp_path, data, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after_three_steps(patch)
        with pytest.raises(Stopped):
            train(settings_of(data), folder)
    train(settings_of(data), folder)
    assert_same_fields(saved(folder / "model"), untrained(data, tmp_path / "expected"))


def test_a_preset_without_a_cache_keeps_its_word(tmp_path, data):
    train(settings_of(data, "model.use_cache=false", "steps=2"), tmp_path / "run")
    expected = untrained(data, tmp_path / "expected", "model.use_cache=false")
    assert_same_fields(saved(tmp_path / "run" / "model"), expected)
    assert expected[0]["use_cache"] is False


def test_a_run_of_before_that_had_ended_is_mended(tmp_path, data, undisturbed):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    right = saved(folder / "model")
    for name, fields in zip(FILES, right, strict=True):
        (folder / "model" / name).write_text(json.dumps(fields | {"use_cache": False}))
    train(settings_of(data), folder)
    assert_same_fields(saved(folder / "model"), right)


def test_use_cache_is_all_that_trainer_changes(data, tmp_path, monkeypatch):
    """If it changes more one day, this says what; nothing of it is saved."""
    seen = []
    write = CheckpointingTrainer._save_checkpoint

    def save(self, model, trial):
        seen.append((copy.deepcopy(self.model.config), copy.deepcopy(self.model.generation_config)))
        write(self, model, trial)

    monkeypatch.setattr(CheckpointingTrainer, "_save_checkpoint", save)
    train(settings_of(data, "steps=2"), tmp_path)
    model = M2RNNForCausalLM(build_config(settings_of(data), TokenDataset(data)))
    config, generation = seen[-1]
    assert config.to_dict() | {"use_cache": True} == model.config.to_dict()
    assert generation.to_dict() == model.generation_config.to_dict()
