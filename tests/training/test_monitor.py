"""A training stops before it is damaged, says what did it, and clips and logs its gradients."""

import gc
import inspect
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.utils import get_total_norm
from transformers import Trainer

from m2rnn.data.batches import PackedBatches
from m2rnn.data.token_files import TokenDataset
from m2rnn.models import M2RNNForCausalLM
from m2rnn.runs.display import Display
from m2rnn.training import trainer
from m2rnn.training.monitor import Monitor, NonFiniteError, Step, kind_of
from m2rnn.training.throughput import Throughput
from m2rnn.training.train import build_config, build_model, train
from m2rnn.training.trainer import CheckpointingTrainer
from tests.training.train_runs import log_of, settings_of, weights_of


def test_a_nan_stops_before_the_weights_change_and_names_its_documents(tmp_path, data, monkeypatch):
    token = ord("!")  # in one document alone
    tokens = TokenDataset(data)
    place = int((tokens.tokens == token).nonzero()[0][0])
    document = tokens.document_at(place)

    def poisoned(*arguments, **options):
        model = build_model(*arguments, **options)
        with torch.no_grad():
            model.model.embed_tokens.weight[token] = float("nan")
        return model

    monkeypatch.setattr("m2rnn.training.train.build_model", poisoned)
    # One window more than an epoch, so that each is met.
    windows = PackedBatches(tokens, 24, 1).windows
    steps = windows // 2 + 1
    overrides = ["micro_batch_size=1", "batch_size=2", f"steps={steps}", "checkpoint_every=1", "valid_sequences=0"]
    with pytest.raises(NonFiniteError, match=r"step \d+: the loss of 1 of the 2 micro-batches") as caught:
        train(settings_of(data, *overrides), tmp_path)
    report = json.loads((tmp_path / "non-finite.json").read_text())
    (row,) = report["rows"]
    assert row["first_document"] <= document <= row["last_document"]
    assert row["first_token"] <= place <= row["last_token"]
    assert f"skip_steps=[{report['step']}]" in str(caught.value)
    newest = max(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert newest == f"step-{report['step'] - 1:08d}"

    assert report["step"] < steps
    train(settings_of(data, *overrides, f"skip_steps=[{report['step']}, {steps}]"), tmp_path)
    lines = log_of(tmp_path)
    assert lines[report["step"] - 1]["skipped"] is True
    weights = weights_of(tmp_path)
    assert weights.pop("model.embed_tokens.weight").isnan().any(1).sum() == 1
    assert all(weight.isfinite().all() for weight in weights.values())


def test_an_infinite_gradient_is_blamed_on_its_kind_of_layer_alone(tmp_path, data, monkeypatch):
    train_step = CheckpointingTrainer.training_step

    def poison(self, model, *arguments, **options):
        loss = train_step(self, model, *arguments, **options)
        model.model.layers[1].mixer_norm.weight.grad[0] = math.inf
        return loss

    monkeypatch.setattr(CheckpointingTrainer, "training_step", poison)
    with pytest.raises(NonFiniteError, match=r"the gradient is no finite number in attention\. Rows"):
        train(settings_of(data), tmp_path)
    norms = json.loads((tmp_path / "non-finite.json").read_text())["gradient_norms"]
    assert [kind for kind, norm in norms.items() if not math.isfinite(float(norm))] == ["attention"]


def test_a_skipped_nan_is_left_out_of_the_entries_loss(tmp_path, data, monkeypatch):
    compute = CheckpointingTrainer.compute_loss

    def spoiled(self, *arguments, **options):
        return compute(self, *arguments, **options) * (math.nan if self.state.global_step == 2 else 1)

    monkeypatch.setattr(CheckpointingTrainer, "compute_loss", spoiled)
    train(settings_of(data, "report_to=[tensorboard]", "log_every=2", "skip_steps=[3]"), tmp_path)
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert losses[2] is None
    assert "NaN" not in (tmp_path / "log.jsonl").read_text(), "which is no JSON"
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars
    expected = [(losses[0] + losses[1]) / 2, losses[3], (losses[4] + losses[5]) / 2]
    assert [event.value for event in scalars("train/loss")] == pytest.approx(expected)
    assert math.isfinite(scalars("train/train_loss")[-1].value)


def test_a_skipped_step_leaves_the_weights_alone(tmp_path, data):
    train(settings_of(data, "checkpoint_every=1", "keep_checkpoints=6", "skip_steps=[3]"), tmp_path)
    weights = [path.read_bytes() for path in sorted(tmp_path.glob("checkpoints/*/model-00000.safetensors"))]
    assert [old == new for old, new in pairwise(weights)] == [False, True, False, False, False]


def monitor_of(data: str, *overrides: str, world: int = 1, state: dict | None = None) -> Monitor:
    settings = settings_of(data, *overrides)
    tokens = TokenDataset(data)
    config = build_config(settings, tokens)
    accumulation = settings.accumulation(world)
    batches = PackedBatches(
        tokens, settings.context, settings.micro_batch_size, settings.seed, settings.steps * accumulation * world
    )
    throughput = Throughput(1, 1, None)
    return Monitor(
        settings, Path(), config, batches, accumulation, [], throughput, Display(), None, lambda: False, None, state
    )


def test_a_batch_of_any_process_is_named(data, monkeypatch):
    monkeypatch.setattr("m2rnn.training.monitor.gather_object", lambda here: here)
    order = PackedBatches(TokenDataset(data), 24, 1, seed=0, batches=24)
    for process in (0, 1):
        monitor = monitor_of(data, "micro_batch_size=1", world=2)
        args = SimpleNamespace(world_size=2, process_index=process)
        monitor.step = Step(math.nan, {}, stop=False, interrupted=False)
        # Each process's second of two: batches 2 and 3 of the third step, which begins with batch 8.
        (window,) = order.windows_of(2 * 4 + 2 + process)[1]
        with pytest.raises(NonFiniteError, match=rf"1 of the 4 micro-batches .* window {window}, "):
            monitor._stop_before_damage(args, 3, torch.tensor([1.0, math.nan]))


def test_a_spike_is_six_standard_deviations_above_the_mean(data):
    losses = [2.9, 3.1] * 32
    monitor = monitor_of(data, state={"seconds": 0.0, "losses": losses, "spikes": 0})
    assert monitor._is_spike(3.61)
    assert not monitor._is_spike(3.59)
    young = monitor_of(data, state={"seconds": 0.0, "losses": losses[1:], "spikes": 0})
    assert not young._is_spike(3.61)


def test_time_losses_and_spikes_are_counted_on_after_an_interruption(data):
    saved = {"seconds": 1000.0, "losses": [3.0, 2.0], "spikes": 5}
    state = monitor_of(data, state=saved).state()["monitor"]
    assert state.pop("seconds") >= saved.pop("seconds")
    assert state == saved


def test_a_spike_is_noted_with_its_windows(tmp_path, data, monkeypatch):
    monkeypatch.setattr("m2rnn.training.monitor.REMEMBERED", 2)
    monkeypatch.setattr("m2rnn.training.monitor.SPIKE", -1e9)  # any loss is one
    results = train(settings_of(data, "seed=3"), tmp_path)
    assert results["spikes"] == 4
    rows = [line.get("spike") for line in log_of(tmp_path)]
    assert rows[:2] == [None, None]
    # Windows of the step as one batch of four, whose order knows nothing of micro-batches.
    windows = PackedBatches(TokenDataset(data), 24, 4, seed=3, batches=6)
    for step in range(2, 6):
        assert [row["window"] for row in rows[step]] == windows.windows_of(step)[1].tolist()


def test_gradients_are_clipped_by_the_norm_of_all_together(tmp_path, data, monkeypatch):
    before_step, clipped = Monitor.on_pre_optimizer_step, []

    def clip(self, args, state, control, **kwargs):
        before_step(self, args, state, control, **kwargs)
        clipped.append(get_total_norm([parameter.grad for parameter in kwargs["model"].parameters()]).item())

    monkeypatch.setattr(Monitor, "on_pre_optimizer_step", clip)
    train(settings_of(data, "max_gradient_norm=0.7"), tmp_path)
    norms = [line["gradient_norm"] for line in log_of(tmp_path)]
    assert min(norms) < 0.7 < max(norms)
    assert clipped == pytest.approx([min(norm, 0.7) for norm in norms], rel=1e-4)


def test_the_gradient_norms_of_all_kinds_add_up(data, undisturbed):
    for number, line in enumerate(log_of(undisturbed), 1):
        assert line["tokens"] == number * 4 * 24
        assert set(line["gradient_norms"]) == {"embedding", "m2rnn", "attention", "swiglu", "norm", "head"}
        squares = sum(norm**2 for norm in line["gradient_norms"].values())
        assert line["gradient_norm"] ** 2 == pytest.approx(squares)
    config = build_config(settings_of(data), TokenDataset(data))
    model = M2RNNForCausalLM(config)
    assert {kind_of(name, config) for name, _ in model.named_parameters()} == set(line["gradient_norms"])


def test_nothing_that_the_monitor_holds_leads_to_the_trainer(tmp_path, data, monkeypatch):
    monitors = []
    begin = Monitor.on_step_begin

    def noted(self, *arguments, **options):
        monitors.append(self)
        begin(self, *arguments, **options)

    monkeypatch.setattr(Monitor, "on_step_begin", noted)
    train(settings_of(data, "steps=1", "warmup_steps=0"), tmp_path)
    waiting, seen = [vars(monitors[0])], set()
    while waiting:
        held = waiting.pop()
        assert not issubclass(type(held), Trainer)
        if id(held) in seen or issubclass(type(held), (ModuleType, type)):
            continue
        seen.add(id(held))
        # Not a function's globals: they lead to every module.
        waiting.extend(held.__closure__ or () if type(held) is FunctionType else gc.get_referents(held))


def test_the_private_methods_of_trainer_that_are_overridden_are_listed_and_exist():
    """Where this fails, transformers has changed: the docstring of trainer.py says what each override is for."""
    own = {name: method for name, method in vars(CheckpointingTrainer).items() if callable(method)}
    private = {name for name in own if name.startswith("_") and not name.startswith("__")}
    listed = set(re.findall(r"^    (_\w+)  +\w", trainer.__doc__, re.MULTILINE))
    assert listed == private
    for name, method in own.items():
        theirs = inspect.signature(getattr(Trainer, name)).parameters
        mine = inspect.signature(method).parameters
        takes_all = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in mine.values())
        assert takes_all or name == "__init__" or list(mine) == list(theirs), name
