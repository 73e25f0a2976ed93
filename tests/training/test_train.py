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
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from m2rnn.cli import app
from m2rnn.data.batches import PackedBatches, pack
from m2rnn.data.prepare import Settings, prepare
from m2rnn.data.run_folder import RunFolderError, run_folder
from m2rnn.data.token_files import TokenDataset
from m2rnn.layers import M2RNN
from m2rnn.models import M2RNNForCausalLM
from m2rnn.models.model import M2RNNBlock
from m2rnn.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from m2rnn.training.display import Display
from m2rnn.training.monitor import Monitor, NonFiniteError, Step, kind_of
from m2rnn.training.throughput import Throughput, peak_of
from m2rnn.training.train import Stopped, build_config, build_model, dry_run, is_bfloat16, train, training_arguments
from m2rnn.training.train_report import memory_per_process, table
from m2rnn.training.train_settings import SettingsError, load_settings
from m2rnn.training.trainer import CheckpointingTrainer
from tests.training.train_and_kill import SETTINGS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FILES = (
    "model-00000.safetensors",
    "optimizer-00000.safetensors",
    "state.json",
    "trainer_state.json",
    "checkpoint.json",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for n in range(24):
        text = "".join(chr(97 + (n * i) % 23) for i in range(10 + 3 * n))
        (folder / "text" / f"{n}.txt").write_text("!" + text if n == 7 else text)
    prepare(Settings({"train": [str(folder / "text")]}, valid_fraction=0.2), folder / "tokens", processes=1)
    return str(folder / "tokens")


def settings_of(data: str, *overrides: str):
    return load_settings(None, [*SETTINGS, *overrides], {"data": data})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(settings_of(data), folder)
    return folder


def log_of(folder: Path) -> list[dict]:
    """The log without what the clock writes."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def assert_same_run(folder: Path, expected: Path) -> None:
    assert log_of(folder) == log_of(expected)
    weights = Path("model", "model.safetensors")
    assert (folder / weights).read_bytes() == (expected / weights).read_bytes()


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


def test_tensorboard_has_each_step_once_after_a_kill_and_entries_come_as_often_as_now_wanted(
    tmp_path, data, monkeypatch
):
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
        settings, Path(), config, batches, accumulation, throughput, Display(), None, lambda: False, None, state
    )


def test_a_batch_of_any_process_is_named(data, monkeypatch):
    monkeypatch.setattr("m2rnn.training.monitor.gather_object", lambda here: here)
    order = PackedBatches(TokenDataset(data), 24, 1, seed=0, batches=24)
    for process in (0, 1):
        monitor = monitor_of(data, "micro_batch_size=1", world=2)
        args = SimpleNamespace(world_size=2, process_index=process)
        monitor.trainer = SimpleNamespace(args=args)
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", r"unknown key 'stepz'; known: preset, data, .*steps"),
        ("steps=many", r"steps 'many': expected a whole number"),
        ("steps=2.5", r"steps 2.5: expected a whole number"),
        ("learning_rate=[1]", r"learning_rate \[1\]: expected a number"),
        ("compile=1", r"compile 1: expected true or false"),
        ("learning_rate=-1", r"learning_rate -1.0: expected a number above 0"),
        ("warmup_steps=6", r"warmup_steps 6: expected at least 0 and less than steps"),
        ("precision=float16", r"precision 'float16': expected one of"),
        ("nonsense", r"'nonsense': expected KEY=VALUE"),
        ("steps.x=1", r"key 'steps.x': only model has parts"),
        ("preset=none", r"unknown preset 'none'"),
        ("model.hidden_sizes=3", r"model.hidden_sizes: expected a field of M2RNNConfig"),
        ("model.vocab_size=8", r"model.vocab_size 8: expected at least 256, the token ids"),
        ("model.hidden_size=wide", r"hidden_size.* expected int, got str .*'wide'"),
        ("model.hidden_size=15", r"must divide hidden_size \(15\)"),
        ("report_to=[tensorbord]", r"report_to \['tensorbord'\]: tensorbord is not supported, only .*tensorboard"),
        ("model.hidden_size=-16", r"'hidden_size': -16.*negative dimension -16"),
        ("model.mixer_options.m2rnn.state_clip=-1", r"state_clip is -1 \(int\), expected a positive number or None"),
        ("model.mixer_options.m2rnn.backend=cpp", r"backend is 'cpp', expected one of 'reference', 'cpu'"),
        ("model.mixer_options=8", r"model.mixer_options 8: expected names with options"),
        ("model.mixer_options.m2rnn=8", r"model.mixer_options \{'m2rnn': 8\}: expected names with options"),
        ("fsdp_bfloat16=true precision=float32", r"fsdp_bfloat16 True: expected false with precision float32"),
        ("seed=-1", r"seed -1: expected a whole number of at least 0"),
        ("seed=4294967296", r"seed 4294967296: expected a whole number of .* less than 2\*\*32"),
        ("batch_size=3", r"batch_size 3: expected a multiple of 2"),
        ("keep_checkpoints=1", r"keep_checkpoints 1: expected at least 2"),
        ("valid_sequences=-1", r"valid_sequences -1: expected a whole number of at least 0"),
        ("steps=true", r"steps True: expected a whole number"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path, data, override, message):
    with pytest.raises(SettingsError, match=message):
        train(settings_of(data, *override.split()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_are_numbers_with_and_without_a_dot(data):
    settings = settings_of(data, "learning_rate=1e-3", "epsilon=1.0e-9", "model.rms_norm_eps=1e-4", "weight_decay=1e+2")
    assert (settings.learning_rate, settings.epsilon, settings.weight_decay) == (1e-3, 1e-9, 100.0)
    config = build_config(settings_of(data, "model.rms_norm_eps=1e-4", "model.embedding_range=1"), TokenDataset(data))
    assert (config.rms_norm_eps, config.embedding_range) == (1e-4, 1.0)
    assert build_config(settings_of(data, "model.rms_norm_eps=1"), TokenDataset(data)).rms_norm_eps == 1.0


def test_an_override_changes_one_of_two_parts_that_a_recipe_shares(tmp_path, data):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: tiny-m2rnn\nmodel: {mixer_options: {m2rnn: &heads {num_heads: 4}, attention: *heads}}\n")
    settings = load_settings(recipe, ["model.mixer_options.m2rnn.num_heads=8"], {"data": data})
    assert settings.model["mixer_options"] == {"m2rnn": {"num_heads": 8}, "attention": {"num_heads": 4}}


def test_the_planned_memory_of_attention_grows_with_the_context_alone(data):
    def planned(context: int) -> float:
        settings = settings_of(data, "preset=tiny-transformer", f"context={context}")
        return memory_per_process(settings, build_config(settings, TokenDataset(data)), 1, False)["activations"]

    assert planned(512) == pytest.approx(4 * planned(128), rel=0.01)


def test_the_planned_memory_is_of_float32_weights_gradients_and_two_moments(data):
    def planned(processes: int, *overrides: str) -> dict[str, float]:
        settings = settings_of(data, *overrides)
        return memory_per_process(settings, build_config(settings, TokenDataset(data)), processes, False)

    config = build_config(settings_of(data), TokenDataset(data))
    amount = 4 * sum(weight.numel() for weight in M2RNNForCausalLM(config).parameters())
    one = planned(1)
    assert (one["weights"], one["gradients"], one["moments"]) == (amount, amount, 2 * amount)
    assert one["together"] == 4 * amount + one["activations"]
    assert planned(2)["weights"] == amount
    assert planned(2, "fsdp=true")["moments"] == amount
    assert planned(1, "micro_batch_size=4")["activations"] == pytest.approx(2 * one["activations"], rel=0.01)
    assert planned(1, "checkpoint_activations=true")["activations"] < 0.7 * one["activations"]


def test_the_mean_speed_leaves_out_the_first_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("m2rnn.training.throughput.time.monotonic", lambda: clock[0])
    throughput = Throughput(tokens=100, flops=6, peak=1200.0)
    for seconds in (50, 20, 10, 10, 10, 2, 4):  # of a step
        clock[0] += seconds
        throughput.step()
        assert throughput.last == 100 / seconds
    assert throughput.mean == 200 / 6
    assert throughput.utilisation(100.0) == 0.5
    assert Throughput(100, 6, None).utilisation(100.0) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H20", None),
    ],
)
def test_the_peak_is_that_of_the_gpu_itself(name, peak):
    assert peak_of(name) == peak


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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_make_a_model_a_schedule_and_a_plan(data, recipe):
    settings = load_settings(recipe, ["device=cpu"], {"data": data})
    config = build_config(settings, TokenDataset(data))
    with torch.device("meta"):
        model = M2RNNForCausalLM(config)
    assert settings.steps > settings.warmup_steps > 0
    assert settings.accumulation(1) * settings.micro_batch_size == settings.batch_size
    if recipe.stem in ("410m", "7b"):
        assert 4e6 < settings.batch_size * settings.context < 4.3e6
        assert (settings.steps, settings.warmup_steps, settings.learning_rate) == (25000, 2500, 3e-4)
        assert model.num_parameters() == {"410m": 512_951_624, "7b": 6_948_251_800}[recipe.stem]
        for processes in (8, 32, 64):
            settings.accumulation(processes)
    text = dry_run(settings)
    assert f"{model.num_parameters():,} parameters" in text
    assert "GiB" in text


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
