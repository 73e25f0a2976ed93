"""A training that was stopped, killed or moved goes on as if nothing had happened; what is wrong is named."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from m2rnn.cli import app
from m2rnn.data.batches import PackedBatches, pack
from m2rnn.data.token_files import TokenDataset
from m2rnn.layers import M2RNN
from m2rnn.models.model import M2RNNBlock
from m2rnn.runs.folder import RunFolderError, run_folder
from m2rnn.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from m2rnn.training.monitor import Monitor
from m2rnn.training.train import Stopped, build_config, build_model, is_bfloat16, train, training_arguments
from m2rnn.training.train_report import table
from m2rnn.training.trainer import CheckpointingTrainer
from tests.training.train_and_kill import SETTINGS
from tests.training.train_runs import assert_same_run, log_of, settings_of, weights_of

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FILES = (
    "model-00000.safetensors",
    "optimizer-00000.safetensors",
    "state.json",
    "trainer_state.json",
    "checkpoint.json",
)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the user had pressed Ctrl-C during this step."""
    end = Monitor.on_step_end

    def end_step(self, args, state, control, **kwargs):
        self.step.stop |= state.global_step == step
        end(self, args, state, control, **kwargs)

    monkeypatch.setattr(Monitor, "on_step_end", end_step)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_run_stopped_at_any_step_goes_on_to_the_same_bits(tmp_path, data, undisturbed, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(Stopped):
            train(settings_of(data), tmp_path)
    assert len(log_of(tmp_path)) == step
    train(settings_of(data, "micro_batch_size=2"), tmp_path)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's compiler
def test_layers_are_compiled_once_a_kind_whatever_the_number_of_documents(tmp_path, data, undisturbed, monkeypatch):
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(M2RNNBlock, "compile", lambda block: nn.Module.compile(block, backend=count))
    settings = settings_of(data, "compile=true", "micro_batch_size=4")  # one document at least fills its window
    batches = PackedBatches(TokenDataset(data), settings.context, settings.micro_batch_size, settings.seed)
    assert len({len(batch["cu_seq_lens_q"]) for batch in batches}) > 1
    train(settings, tmp_path)
    assert len(graphs) == len(set(build_config(settings, TokenDataset(data)).mixers))
    results, expected = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, undisturbed))
    assert results["valid"]["loss"] == pytest.approx(expected["valid"]["loss"], abs=1e-5)


def test_a_finished_run_is_finished(tmp_path, data, undisturbed):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    results = json.loads((undisturbed / "results.json").read_text())
    assert train(settings_of(data), tmp_path) == results
    (tmp_path / "results.json").unlink()  # as after a kill just before the end
    shutil.rmtree(tmp_path / "model")
    assert train(settings_of(data), tmp_path)["valid"] == results["valid"]
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_the_table_says_how_much_gpu_memory_was_taken_where_that_is_known(tmp_path, undisturbed):
    results = json.loads((undisturbed / "results.json").read_text())
    assert "memory" not in table(results, tmp_path), "there is none on a CPU"
    assert "12.5 GiB of a GPU" in table(results | {"gpu_memory_bytes": 25 << 29}, tmp_path)
    del results["gpu_memory_bytes"]  # a run that ended before it was noted
    assert "memory" not in table(results, tmp_path)


def test_killed_runs_end_with_the_same_bits(tmp_path, data, undisturbed):
    command = [sys.executable, str(Path(__file__).with_name("train_and_kill.py")), str(tmp_path), data, "0"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) >= 3
    assert_same_run(tmp_path, undisturbed)


def test_other_micro_batches_give_the_same_loss_also_from_the_middle_on(tmp_path, data, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            train(settings_of(data, "micro_batch_size=4"), tmp_path)
    train(settings_of(data, "micro_batch_size=1"), tmp_path)
    assert_same_loss(tmp_path, undisturbed)


def assert_same_loss(folder: Path, expected: Path) -> None:
    for mine, other in zip(log_of(folder), log_of(expected), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    other_weights = weights_of(expected)
    for name, weight in weights_of(folder).items():
        torch.testing.assert_close(weight, other_weights[name], rtol=1e-3, atol=1e-4)


def train_in_two_processes(folder: Path, minutes: float, *overrides: str, **environment: str) -> str:
    """Train, and return what the processes printed."""
    script = str(Path(__file__).with_name("train_together.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    arguments = [str(folder), str(minutes), *SETTINGS, *overrides]
    done = subprocess.run([*command, *arguments], env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_stop_and_go_on_and_do_what_one_does(tmp_path, data, undisturbed):
    for minutes in (0, 60):  # a step, then the others
        train_in_two_processes(tmp_path, minutes, f"data={data}")
    assert_same_loss(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_for_the_same_reason(tmp_path, data):
    printed = train_in_two_processes(tmp_path, 60, f"data={data}", SIGNALLED="1")
    assert printed.count("Stopped(step=1, interrupted=True)") == 2


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_training(tmp_path, data):
    script = str(Path(__file__).with_name("fail_alone.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    arguments = ["train", *SETTINGS, "--data", data, "--out", str(tmp_path)]
    done = subprocess.run([*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "RuntimeError: of the second process alone" in done.stderr
    assert "m2rnn: process 1: failed" in done.stderr


@pytest.mark.slow
def test_two_sharded_processes_do_what_one_does_and_one_goes_on_from_them(tmp_path, data, undisturbed):
    # Of micro-batches of 1, so that each process has two in a step, and with gradients that are clipped in each.
    clipped = ("micro_batch_size=1", "max_gradient_norm=0.1")
    train(settings_of(data, *clipped), tmp_path / "one")
    assert all(line["gradient_norm"] > 0.1 for line in log_of(tmp_path / "one"))
    train_in_two_processes(tmp_path / "two", 60, f"data={data}", "checkpoint_every=4", "fsdp=true", *clipped)
    assert_same_loss(tmp_path / "two", tmp_path / "one")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000006")
    shutil.rmtree(tmp_path / "two" / "model")
    train(settings_of(data, *clipped), tmp_path / "two")
    assert_same_loss(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_sharded_processes_share_a_tied_weight(tmp_path, data):
    tied = "model.tie_word_embeddings=true"
    train_in_two_processes(tmp_path / "two", 60, f"data={data}", "fsdp=true", tied)
    train(settings_of(data, tied), tmp_path / "one")
    assert_same_loss(tmp_path / "two", tmp_path / "one")


def test_tensorboard_has_each_step_once_after_a_kill_and_entries_as_often_as_wanted(tmp_path, data, monkeypatch):
    end = Monitor.on_step_end

    def killed_in_step_5(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise MemoryError
        end(self, args, state, control, **kwargs)

    every = ["report_to=[tensorboard]", "checkpoint_every=2", "keep_checkpoints=3"]
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "on_step_end", killed_in_step_5)
        with pytest.raises(MemoryError):
            train(settings_of(data, *every), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")  # steps 3 and 4 are logged, but not saved
    train(settings_of(data, *every, "log_every=2"), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    losses = [line["loss"] for line in log_of(tmp_path)]
    expected = [(1, losses[0]), (2, losses[1]), (4, sum(losses[2:4]) / 2), (6, sum(losses[4:]) / 2)]
    assert [event.step for event in events] == [step for step, _ in expected]
    assert [event.value for event in events] == pytest.approx([loss for _, loss in expected])


def test_one_process_uses_one_of_several_gpus(tmp_path, data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    args = training_arguments(settings_of(data, "device=cuda"), tmp_path)
    assert (args.n_gpu, args.train_batch_size) == (1, 1)


def test_a_step_without_labels_has_no_loss(tmp_path, data):
    tokens = TokenDataset(data)
    alone = tokens.num_tokens - 1  # so that the last eos has a window of its own
    overrides = [f"context={alone}", "batch_size=1", "micro_batch_size=1", "steps=2", "valid_sequences=0"]
    train(settings_of(data, *overrides), tmp_path)
    lines = log_of(tmp_path)
    assert sorted(line["loss"] == 0 for line in lines) == [False, True]
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path).values())


def test_the_validation_loss_is_of_as_many_sequences_as_wanted(tmp_path, data):
    # 3 of micro-batches of 2 and of 4.
    results = [
        train(settings_of(data, "steps=2", "valid_sequences=3", f"micro_batch_size={size}"), tmp_path / str(size))
        for size in (2, 4)
    ]
    windows = PackedBatches(TokenDataset(data, "valid"), 24, 3, seed=None)
    assert windows.windows > 4
    for result in results:
        assert result["valid"]["tokens"] == int((windows[0]["labels"] != -100).sum())
        assert result["valid"]["loss"] == pytest.approx(results[0]["valid"]["loss"], rel=1e-5)


def test_a_validation_split_without_labels_has_no_loss(tmp_path, data, monkeypatch):
    monkeypatch.setattr("m2rnn.training.train.pack", without_labels)
    assert train(settings_of(data, "steps=2"), tmp_path)["valid"] is None


def without_labels(windows):
    batch = pack(windows)
    return batch | {"labels": batch["labels"].fill_(-100)}


def test_a_model_for_which_there_is_no_room_is_named(tmp_path, data, undisturbed):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results.json").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*model: .*File too large.*make room"):
            train(settings_of(data), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    train(settings_of(data), tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_damaged_results_are_named(tmp_path, data, undisturbed):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results.json").write_text('{"loss"')
    with pytest.raises(RunFolderError, match=r"results\.json is damaged .*: delete it"):
        train(settings_of(data), tmp_path)


def test_a_checkpoint_holds_no_pickle(undisturbed):
    for path in sorted((undisturbed / "checkpoints").iterdir()):
        assert {file.name for file in path.iterdir()} == set(FILES)
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["missing", "truncated", "damaged", "foreign"])
def test_a_harmed_checkpoint_is_named_and_the_one_before_it_works(tmp_path, data, undisturbed, file, harm):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "step-00000006"
    content = bytearray((newest / file).read_bytes())
    if harm == "missing":
        (newest / file).unlink()
    elif harm == "truncated":
        (newest / file).write_bytes(content[:-1])
        if file == "checkpoint.json":  # whose last byte is a line's end
            (newest / file).write_bytes(content[:-3])
    elif harm == "damaged":
        content[len(content) // 2] ^= 1
        (newest / file).write_bytes(content)
    else:
        shutil.copy(tmp_path / "checkpoints" / "step-00000004" / file, newest / file)
    with pytest.raises(CheckpointError, match=r"step-00000006.*go on from step-00000004") as caught:
        train(settings_of(data), tmp_path)
    if not (file == "checkpoint.json" and harm in ("damaged", "foreign")):
        assert file in str(caught.value)
    if (file, harm) == ("optimizer-00000.safetensors", "damaged"):
        shutil.rmtree(newest)
        train(settings_of(data), tmp_path)
        assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("file", ["state.json", "model-00000.safetensors", "optimizer-00000.safetensors"])
def test_a_file_that_a_checkpoint_does_not_list_is_named(tmp_path, data, undisturbed, file):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "checkpoints" / "step-00000006" / "checkpoint.json"
    content = json.loads(manifest.read_text())
    del content["files"][file]
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"{re.escape(file)}.*go on from step-00000004"):
        train(settings_of(data), tmp_path)


def test_another_runs_checkpoint_is_refused(tmp_path, data, undisturbed):
    train(settings_of(data, "seed=1"), tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "other" / "checkpoints")
    with pytest.raises(CheckpointError, match="a run with other settings"):
        train(settings_of(data, "seed=1"), tmp_path / "other")


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, data, undisturbed):
    # Files of more than some KB cannot be written, as on a disk that is full.
    limit = (undisturbed / "checkpoints" / "step-00000006" / "optimizer-00000.safetensors").stat().st_size - 100
    script = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from m2rnn.training.train import train\nfrom m2rnn.training.train_settings import load_settings\n"
        "from m2rnn.training.checkpoint import CheckpointError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n    train(load_settings(None, sys.argv[2:]), Path(sys.argv[1]))\n"
        "except CheckpointError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), *SETTINGS, f"data={data}"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert "cannot write the checkpoint" in done.stdout, done.stderr
    assert "step-00000002" in done.stdout
    assert not list((tmp_path / "checkpoints").iterdir())  # half of one would take the room that is asked for
    train(settings_of(data), tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_half_a_checkpoint_of_a_killed_process_is_deleted_with_the_next(tmp_path, data, undisturbed):
    half = tmp_path / "checkpoints" / "step-00000005.partial"
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")
    half.mkdir()
    (half / "model-00000.safetensors").write_bytes(b"half")
    train(settings_of(data), tmp_path)
    assert not half.exists()
    assert_same_run(tmp_path, undisturbed)


def test_a_second_trainer_in_the_folder_is_refused(tmp_path, data):
    settings = settings_of(data)
    identity = settings.deciding() | {"tokens": TokenDataset(data).manifest["splits"]["train"]["tokens_sha256"]}
    with run_folder(tmp_path, identity), pytest.raises(RunFolderError, match="another run is using"):
        train(settings, tmp_path)


def test_other_settings_do_not_go_on_with_a_run(tmp_path, data, undisturbed):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    with pytest.raises(RunFolderError, match="learning_rate"):
        train(settings_of(data, "learning_rate=2e-2"), tmp_path)


def test_the_trained_model_is_a_hugging_face_model(undisturbed, data):
    tokenizer = AutoTokenizer.from_pretrained(undisturbed / "model")
    model = AutoModelForCausalLM.from_pretrained(undisturbed / "model").eval()
    ids = tokenizer("abc", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)
    results = json.loads((undisturbed / "results.json").read_text())
    # The validation loss is that of the saved model, over each window of the split.
    batches = PackedBatches(TokenDataset(data, "valid"), 24, 1, seed=None)
    total = count = 0
    for batch in (batches[n] for n in range(len(batches))):
        with torch.no_grad():
            total += model(**batch, num_items_in_batch=1).loss.item()
        count += int((batch["labels"] != -100).sum())
    assert results["valid"]["tokens"] == count
    assert results["valid"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert results["tokens"] == 6 * 4 * 24


def test_the_schedule_is_a_cosine_after_a_warm_up(tmp_path, data):
    train(settings_of(data, "steps=9", "warmup_steps=4", "min_learning_rate=0.25"), tmp_path)
    assert (tmp_path / "checkpoints" / "step-00000009").exists(), "of the last step, whatever checkpoint_every is"
    rates = [line["learning_rate"] for line in log_of(tmp_path)]
    expected = [n / 4 if n < 4 else 0.25 + 0.75 * (1 + math.cos(math.pi * (n - 4) / 5)) / 2 for n in range(9)]
    assert rates == pytest.approx([1e-2 * rate for rate in expected])


def test_weight_decay_spares_vectors_and_what_the_model_spares(tmp_path, data, monkeypatch):
    groups = {}
    make = CheckpointingTrainer.create_optimizer

    def made(self, *arguments):
        optimizer = make(self, *arguments)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group in optimizer.param_groups:
            groups[group["weight_decay"]] = {names[parameter] for parameter in group["params"]}
            assert (group["betas"], group["eps"]) == ((0.8, 0.7), 1e-9)
        return optimizer

    monkeypatch.setattr(CheckpointingTrainer, "create_optimizer", made)
    stop_after(1, monkeypatch)
    with pytest.raises(Stopped):
        train(settings_of(data, "beta1=0.8", "beta2=0.7", "epsilon=1e-9", "weight_decay=0.3"), tmp_path)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mixer.state_weight"} <= groups[0.3]
    spared = {name.rpartition(".")[2] for name in groups[0.0] if "norm" not in name}
    assert spared == {"A_log", "dt_bias", "D"}
    assert not any("norm" in name for name in groups[0.3])


@pytest.mark.parametrize("option", ["checkpoint_activations=true", "precision=bfloat16"])
def test_options_of_the_computation_change_the_loss_little(tmp_path, data, undisturbed, monkeypatch, option):
    forward, computed = M2RNN.forward, []

    def counted(self, hidden, *arguments, **options):
        if hidden.device.type != "meta":  # as when the configuration is tried
            computed.append(self)
        return forward(self, hidden, *arguments, **options)

    monkeypatch.setattr(M2RNN, "forward", counted)
    train(settings_of(data, option, "valid_sequences=0"), tmp_path)
    again = option.startswith("checkpoint")
    assert len(computed) == 6 * 2 * (1 + again)  # steps, micro-batches
    tolerance = 1e-6 if again else 2e-2
    mine, other = ([line["loss"] for line in log_of(folder)] for folder in (tmp_path, undisturbed))
    assert mine == pytest.approx(other, rel=tolerance)
    if option.startswith("precision"):
        assert mine != pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("auto", "cuda", True),
        ("auto", "cpu", False),
        ("bfloat16", "cpu", True),
        ("float32", "cuda", False),
    ],
)
def test_auto_is_bfloat16_on_a_gpu_alone(data, precision, device, expected):
    assert is_bfloat16(settings_of(data, f"precision={precision}"), torch.device(device)) is expected


def test_the_seed_decides_the_weights_and_the_callers_random_state_is_left_alone(data):
    before = torch.get_rng_state()
    config = build_config(settings_of(data), TokenDataset(data))
    first, again, other = (build_model(settings_of(data, f"seed={n}"), config).lm_head.weight for n in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_has_the_special_tokens_of_the_data(data):
    tokens = TokenDataset(data)
    tokens.eos_token_id, tokens.pad_token_id = 5, 6
    tokens.manifest["tokenizer"]["bos_token_id"] = 7
    config = build_config(settings_of(data), tokens)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (5, 6, 7)


def test_a_checkpoint_of_many_files_is_the_same(tmp_path, data, monkeypatch):
    monkeypatch.setattr("m2rnn.training.checkpoint.FILE_BYTES", 2000)
    model = build_model(settings_of(data), build_config(settings_of(data), TokenDataset(data)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    assert len(list(tmp_path.glob("checkpoints/*/optimizer-*"))) > len(list(tmp_path.glob("checkpoints/*/model-*"))) > 2
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    moments = [{key: each.clone() for key, each in state.items()} for state in optimizer.state.values()]
    for tensor in (*model.parameters(), *(each for state in optimizer.state.values() for each in state.values())):
        tensor.data.zero_()
    load_checkpoint(tmp_path, model, optimizer)
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)
    torch.testing.assert_close(list(map(dict, optimizer.state.values())), moments, rtol=0, atol=0)


def test_an_error_in_the_first_step_leaves_the_folder_to_other_settings(tmp_path, data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointingTrainer, "compute_loss", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            train(settings_of(data), tmp_path)
    train(settings_of(data, "context=12", "steps=2"), tmp_path)
    assert len(log_of(tmp_path)) == 2


def test_too_little_gpu_memory_is_one_line(tmp_path, data, monkeypatch):
    monkeypatch.setattr(CheckpointingTrainer, "compute_loss", out_of_memory)
    done = CliRunner().invoke(app, ["train", *SETTINGS, "--data", data, "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "m2rnn: CUDA out of memory: the same command goes on with a smaller micro_batch_size" in done.stderr
    assert "Traceback" not in done.output


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")


def test_the_laptop_recipe_runs_short(tmp_path, data):
    options = ["--data", data, "--out", str(tmp_path), "steps=2", "warmup_steps=1", "context=32", "device=cpu"]
    done = CliRunner().invoke(app, ["train", str(ROOT / "recipes/laptop.yaml"), *options])
    assert done.exit_code == 0, done.output
    assert "validation" in done.output
    assert {"model", "results.json", "loss.png", "tensorboard"} <= {path.name for path in tmp_path.iterdir()}


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, data):
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "m2rnn", "train", *SETTINGS, "--data", data, "--out", str(tmp_path)]
    with subprocess.Popen([*command, "steps=100000"], env=ENVIRONMENT, text=True, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while (not log.exists() or log.stat().st_size == 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    newest = max(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert f"step {int(newest.removeprefix('step-')):,} of 100,000 is saved, and the same command goes on" in error
    assert "Traceback" not in error


def test_a_second_ctrl_c_says_what_is_saved_and_the_first_is_answered_at_once(tmp_path, data, monkeypatch):
    monkeypatch.setattr("m2rnn.runs.interrupts.SAME_REQUEST", -1.0)  # else it would be one request that comes twice
    end = Monitor.on_step_end

    def press_twice(self, args, state, control, **kwargs):
        end(self, args, state, control, **kwargs)
        if state.global_step == steps[-1]:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Monitor, "on_step_end", press_twice)
    steps = []
    for step, kept in ((1, "its beginning: no checkpoint was saved"), (3, "step 2, which is saved")):
        steps.append(step)
        done = CliRunner().invoke(app, ["train", *SETTINGS, "--data", data, "--out", str(tmp_path)])
        assert done.exit_code == 130
        assert "stopping after this step, with a checkpoint; Ctrl-C again to quit without saving" in done.stdout
        assert f"interrupted; the same command resumes the run in {tmp_path}, from {kept}" in done.stderr
