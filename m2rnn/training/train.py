"""Train a language model of a preset on token files: one process, or many under torchrun.

    folder/
        settings.json    what decides the run; the same command goes on with it
        log.jsonl        loss, learning rate, gradient norms, tokens/s, MFU: a line a step
        checkpoints/     see ``checkpoint``
        tensorboard/     the same numbers, for TensorBoard
        model/           the trained model with its tokenizer, for ``from_pretrained``
        results.json, loss.png

The batches are a function of (seed, step), whatever the number of processes. On a CPU, stopping and going on changes no
bit as long as that number stays.
"""

import copy
import gc
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

from m2rnn.data.batches import PackedBatches, only_batch, pack
from m2rnn.data.token_files import TokenDataset
from m2rnn.data.tokenizers import save_tokenizer
from m2rnn.models import M2RNNConfig, M2RNNForCausalLM, presets
from m2rnn.models.sizes import size_of
from m2rnn.runs.display import Display, no_progress_bars
from m2rnn.runs.errors import SettingsError
from m2rnn.runs.folder import (
    CHECKPOINTS,
    LOG,
    MODEL,
    RESULTS,
    RunFolderError,
    read_json,
    run_folder,
    to_json,
    whole_folder,
    write_whole_file,
)
from m2rnn.runs.interrupts import interrupts_noted
from m2rnn.runs.log import Log
from m2rnn.runs.machine import memory_of
from m2rnn.training.checkpoint import (
    CheckpointError,
    load_state,
    newest_checkpoint,
    raise_everywhere,
    weights_on_first_process,
)
from m2rnn.training.configure import configure
from m2rnn.training.monitor import NON_FINITE, Monitor
from m2rnn.training.throughput import Throughput, peak_flops
from m2rnn.training.train_report import PLOT, check_memory, machine, plan, write_plot
from m2rnn.training.train_settings import TrainSettings
from m2rnn.training.trainer import CheckpointingTrainer

TENSORBOARD = "tensorboard"
FILES = (CHECKPOINTS, MODEL, TENSORBOARD, LOG, RESULTS, PLOT, NON_FINITE)


@dataclass
class Stopped(Exception):
    """A run was stopped after ``step`` steps and saved; by the user if ``interrupted``, else by its time limit."""

    step: int
    interrupted: bool


def train(
    settings: TrainSettings,
    folder: Path,
    *,
    minutes: float | None = None,
    overwrite: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Train in ``folder``, from its newest checkpoint if it holds one; return what results.json says.

    Args:
        minutes: stop, with a checkpoint, after that time.
        overwrite: delete the run in the folder and start anew.
        display: of the first process.

    Raises:
        SettingsError: for settings that cannot work together, or with this data or number of processes.
        RunFolderError: if the folder is another run's, or in use.
        CheckpointError: if a checkpoint cannot be written, or the newest cannot be read: nothing starts anew by itself.
        NonFiniteError: for a NaN or an infinity in the loss or a gradient; the weights stay as they were.
        Stopped: after Ctrl-C, SIGTERM or ``minutes``; the same call goes on.
    """
    with ExitStack() as stack:
        run = stack.enter_context(_open(settings, folder, overwrite, display))
        if run.is_finished:
            return _earlier_results(run)
        parts = _build(run, minutes, stack)
        _run(run, parts)
        return _finish(run, parts)


@dataclass(frozen=True)
class _Run:
    """A run whose folder is held: what it trains, on what, and from which checkpoint."""

    settings: TrainSettings
    folder: Path
    data: TokenDataset
    config: M2RNNConfig
    args: TrainingArguments
    reporters: list[TrainerCallback]
    identity: dict[str, Any]
    display: Display
    checkpoint: Path | None
    saved: dict[str, Any] | None  # the checkpoint's state

    @property
    def is_first(self) -> bool:
        return bool(self.args.process_index == 0)

    @property
    def is_finished(self) -> bool:
        done: int = 0 if self.saved is None else self.saved["step"]
        return done == self.settings.steps and (self.folder / RESULTS).exists()


@dataclass(frozen=True)
class _Parts:
    """What a run needs to train."""

    trainer: CheckpointingTrainer
    monitor: Monitor
    throughput: Throughput


@contextmanager
def _open(settings: TrainSettings, folder: Path, overwrite: bool, display: Display | None) -> Iterator[_Run]:
    """Check the settings, hold the folder and find the checkpoint to go on from."""
    data = TokenDataset(settings.data)
    config = build_config(settings, data)
    args = training_arguments(settings, folder)
    reporters = _reporters(settings)
    check_memory(settings, config, args.world_size, is_bfloat16(settings, args.device), args.device)
    first = args.process_index == 0
    identity = settings.deciding() | {"tokens": tokens_hash(data)}
    with _held(folder, identity, overwrite, first):
        found = newest_checkpoint(folder)
        saved = None if found is None else load_state(found)
        if saved is not None and saved["settings"] != identity:
            raise CheckpointError(f"{found} belongs to a run with other settings: delete it to go on without it")
        shown = display if display is not None and first else Display()
        yield _Run(settings, folder, data, config, args, reporters, identity, shown, found, saved)


def _earlier_results(run: _Run) -> dict[str, Any]:
    if run.is_first:
        _mend_use_cache(run.folder / MODEL, run.config)
    return read_json(run.folder / RESULTS, "delete it, and the same command writes it again")


def _build(run: _Run, minutes: float | None, stack: ExitStack) -> _Parts:
    """The model, its data and what watches them; ``stack`` closes the log and gives Ctrl-C back."""
    settings, folder, args = run.settings, run.folder, run.args
    first, found = run.is_first, run.checkpoint
    if settings.warmup != settings.warmup_steps:
        run.display.note(
            f"warmup_steps {settings.warmup_steps:,}: shortened to {settings.warmup:,} of {settings.steps:,}"
        )
    run.display.say(f"building {settings.preset}" + (f", to go on from {found.name}" if found else ""))
    # With a configuration of its own: Trainer sets its use_cache to False, which is not to be saved.
    model = build_model(settings, copy.deepcopy(run.config), empty=bool(args.fsdp) and not first)
    accumulation = settings.accumulation(args.world_size)
    batches = PackedBatches(
        run.data,
        settings.context,
        settings.micro_batch_size,
        settings.seed,
        batches=settings.steps * accumulation * args.world_size,
    )
    throughput = _throughput(run)
    log = stack.enter_context(Log(folder / LOG, run.saved["log_bytes"] if run.saved else 0)) if first else None
    if first and found is None:
        stack.enter_context(_free_unless_begun(folder, throughput))
    losses: list[torch.Tensor] = []
    monitor = Monitor(
        settings,
        folder,
        run.config,
        batches,
        accumulation,
        losses,
        throughput,
        run.display,
        log,
        stack.enter_context(interrupts_noted((SIGINT, SIGTERM), run.display.note)),
        minutes,
        run.saved["monitor"] if run.saved else None,
    )
    trainer = CheckpointingTrainer(
        folder=folder,
        keep_checkpoints=settings.keep_checkpoints,
        autocast=is_bfloat16(settings, args.device),
        run_state=lambda: {"settings": run.identity, **monitor.state()},
        entries=monitor.entries,
        losses=losses,
        model=model,
        args=args,
        train_dataset=batches,
        data_collator=only_batch,
        callbacks=[monitor, *run.reporters, *_tensorboard(run)],
    )
    trainer.remove_callback(PrinterCallback)
    if args.fsdp:
        if not trainer.is_fsdp_enabled:
            raise SettingsError("fsdp true: accelerate shards over GPUs only, expected false on a CPU")
        _set_fsdp_precision(trainer, settings)
    return _Parts(trainer, monitor, throughput)


def _throughput(run: _Run) -> Throughput:
    peak = peak_flops(run.args.device)
    return Throughput(
        run.settings.context * run.settings.batch_size,
        size_of(run.config, run.settings.context).training_flops,
        None if peak is None else peak * run.args.world_size,
    )


def _tensorboard(run: _Run) -> list[TrainerCallback]:
    """TensorBoard's files, of the first process, without the steps after the checkpoint that an earlier one wrote."""
    if not run.is_first or TENSORBOARD not in run.settings.report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter

    done = run.saved["step"] if run.saved else 0
    return [TensorBoardCallback(SummaryWriter(run.folder / TENSORBOARD, purge_step=done + 1))]


def _run(run: _Run, parts: _Parts) -> None:
    """All steps that are left; `Stopped` if not all were taken."""
    parts.trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    step = parts.trainer.state.global_step
    if step < run.settings.steps:
        assert parts.monitor.step is not None
        raise Stopped(step, parts.monitor.step.interrupted)


def _finish(run: _Run, parts: _Parts) -> dict[str, Any]:
    """Measure, and write the model, the results and the plot."""
    settings, args = run.settings, run.args
    monitor, throughput = parts.monitor, parts.throughput
    seconds, step = monitor.seconds, parts.trainer.state.global_step
    on_gpu = args.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(args.device) if on_gpu else None  # without what follows
    run.display.say("measuring the loss on the validation split")
    valid = validate(parts.trainer, settings, run.data)
    run.display.say("writing the model")
    _write_model(parts.trainer, run.config, run.data, run.folder)
    speed = throughput.mean if throughput.steps else None
    results = {
        "settings": settings.as_json(),
        "parameters": size_of(run.config, settings.context).parameters,
        "steps": step,
        "tokens": step * throughput.tokens,
        "loss": sum(monitor.last_losses) / len(monitor.last_losses),
        "loss_steps": len(monitor.last_losses),
        "valid": valid,
        "spikes": monitor.spikes,
        "seconds": round(seconds, 2),
        "tokens_per_second": speed,
        "mfu": None if speed is None else throughput.utilisation(speed),
        "gpu_memory_bytes": memory,
        "machine": machine(args.device, args.world_size),
    }
    if run.is_first:
        write_plot(run.folder)
        write_whole_file(run.folder / RESULTS, to_json(results))
    raise_everywhere(None)  # wait until the first process has written everything
    return results


def dry_run(settings: TrainSettings) -> str:
    """What ``train`` would do with these settings and this number of processes."""
    data = TokenDataset(settings.data)
    config = build_config(settings, data)
    args = training_arguments(settings, Path())
    return plan(settings, config, data, args.world_size, is_bfloat16(settings, args.device), memory_of(args.device))


def is_distributed() -> bool:
    """Whether torchrun's processes have found each other."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave_process_group() -> None:
    """End what torchrun's processes share, if anything; a trainer that an exception being handled still holds too.

    The group ends its threads only with the last that holds it, and the trainer does. Gloo's threads free tensors,
    which takes the interpreter's lock: where they outlive the interpreter, the process aborts.
    """
    if is_distributed():
        error = sys.exception()
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        gc.collect()
        torch.distributed.destroy_process_group()


def build_config(settings: TrainSettings, data: TokenDataset) -> M2RNNConfig:
    """The preset with the settings' overrides, and the vocabulary of the data.

    Raises:
        SettingsError: if there is no such model, or it has fewer ids than the data.
    """
    return configure(
        partial(presets.get, settings.preset),
        settings.model,
        vocab_size=data.vocab_size,
        eos_token_id=data.eos_token_id,
        pad_token_id=data.pad_token_id,
        bos_token_id=data.manifest["tokenizer"].get("bos_token_id"),
    )


def build_model(settings: TrainSettings, config: M2RNNConfig, empty: bool = False) -> M2RNNForCausalLM:
    """A new model, whose weights are determined by the seed; memory that nobody wrote if ``empty``."""
    with torch.device("meta") if empty else nullcontext(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = M2RNNForCausalLM(config)
        model.train()
    if empty:  # accelerate tells parameters apart by their addresses, which those on meta do not have
        model.to_empty(device="cpu").tie_weights()  # two weights instead of a tied one
    if settings.checkpoint_activations:
        # The older name warns in new versions of transformers, which have the newer one.
        name = "activation_checkpointing_enable"
        enable: Callable[..., None] = getattr(model, name, model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if settings.compile:
        for block in model.model.layers:
            block.compile()
    return model


def training_arguments(settings: TrainSettings, folder: Path) -> TrainingArguments:
    """Trainer's arguments; making them starts the process group under torchrun."""
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    if settings.device == "cuda" and not on_gpu:
        raise SettingsError("device 'cuda': there is none here, expected cpu or auto")
    distributed = "RANK" in os.environ  # torchrun's
    shards = settings.fsdp and distributed
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,  # an item of PackedBatches is a batch
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.min_learning_rate},
        warmup_steps=settings.warmup,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_epsilon=settings.epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=0.0,  # the monitor clips: it needs the norms from before
        use_cpu=not on_gpu,
        bf16=False,  # the trainer's own autocast
        fsdp=shards,  # type: ignore[arg-type] # its documentation: a bool
        fsdp_config={
            "version": 2,
            "transformer_layer_cls_to_wrap": ["M2RNNBlock"],
            "reshard_after_forward": settings.fsdp_reshard,
            "cpu_ram_efficient_loading": True,
        }
        if shards
        else None,
        # Otherwise FSDP2 keeps whole gradients until the step's last micro-batch, which takes a sharded model's memory.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}} if shards else None,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if distributed and not on_gpu else None,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no",  # the monitor says when
        report_to=[],  # see _reporters
        disable_tqdm=True,
        seed=settings.seed,
    )
    if not distributed and on_gpu:
        args._n_gpu = 1  # of several, Trainer would give each a part of a batch (DataParallel)
    args.gradient_accumulation_steps = settings.accumulation(args.world_size)
    return args


def is_bfloat16(settings: TrainSettings, device: torch.device) -> bool:
    return settings.precision == "bfloat16" or (settings.precision == "auto" and device.type == "cuda")


def tokens_hash(data: TokenDataset) -> str:
    """What the training tokens are, wherever their folder lies."""
    found: str = data.manifest["splits"][data.split]["tokens_sha256"]
    return found


@torch.no_grad()
def validate(trainer: CheckpointingTrainer, settings: TrainSettings, data: TokenDataset) -> dict[str, float] | None:
    """The mean loss over the first sequences of the split ``valid``; None if it has no token to predict."""
    if settings.valid_sequences == 0 or "valid" not in data.manifest["splits"]:
        return None
    valid = TokenDataset(data.folder, "valid")
    windows = PackedBatches(valid, settings.context, rows=1, seed=None)
    count = min(windows.windows, settings.valid_sequences)
    rows = settings.micro_batch_size
    processes, process, device = trainer.args.world_size, trainer.args.process_index, trainer.args.device
    model = trainer.model_wrapped
    model.eval()
    # Compiling the layers for evaluation too takes longer than these few batches.
    stance = torch.compiler.set_stance("force_eager") if settings.compile else nullcontext()
    totals = torch.zeros(2, dtype=torch.float64, device="cpu")
    for start in range(0, count, processes * rows):
        first = start + process * rows
        numbers = range(first, min(first + rows, count))
        # All take part in each forward pass, since sharded weights are gathered by all.
        batch = pack([windows.window(number) for number in numbers or [0]])
        batch = {key: value.to(device) for key, value in batch.items()}
        with stance, trainer.compute_loss_context_manager():
            loss = model(**batch, num_items_in_batch=1, logits_to_keep=1, use_cache=False).loss
        if numbers:
            totals += torch.tensor([loss.item(), (batch["labels"] != -100).sum().item()], dtype=torch.float64)
    total, tokens = trainer.accelerator.reduce(totals.to(device), "sum").tolist()
    if tokens == 0:
        return None
    loss = total / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(tokens)}


def _set_fsdp_precision(trainer: CheckpointingTrainer, settings: TrainSettings) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    gathered = torch.bfloat16 if settings.fsdp_bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32)
    trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def _reporters(settings: TrainSettings) -> list[TrainerCallback]:
    """transformers' integrations that ``report_to`` names, without TensorBoard, which writes into the run's folder."""
    names = [name for name in settings.report_to if name != TENSORBOARD]
    try:
        return [integration() for integration in get_reporting_integration_callbacks(names)]
    except (ValueError, RuntimeError) as error:  # there is none of that name, or its package is not installed
        raise SettingsError(f"report_to {settings.report_to}: {error}") from error


def _write_model(trainer: CheckpointingTrainer, config: M2RNNConfig, data: TokenDataset, folder: Path) -> None:
    assert trainer.model is not None
    weights = weights_on_first_process(trainer.model)
    failure = None
    if trainer.is_world_process_zero():
        with torch.device("meta"):
            model = M2RNNForCausalLM(config)
        try:
            with no_progress_bars(), whole_folder(folder / MODEL) as partial:
                model.save_pretrained(partial, state_dict=weights)
                save_tokenizer(data.load_tokenizer(), partial)
                if (folder / MODEL).exists():  # of an earlier end of this run
                    shutil.rmtree(folder / MODEL)
        except (OSError, SafetensorError) as error:
            failure = f"cannot write {folder / MODEL}: {error}. The checkpoint is whole: make room, run again"
    raise_everywhere(failure)


def _mend_use_cache(model: Path, config: M2RNNConfig) -> None:
    """Let the model of a finished run generate with its cache, where an earlier version saved ``use_cache: false``."""
    for path in (model / "config.json", model / "generation_config.json"):
        if config.use_cache and path.exists():
            written = read_json(path, "delete results.json, and the same command writes the model again")
            if written.get("use_cache") is False:
                write_whole_file(path, to_json(written | {"use_cache": True}))


@contextmanager
def _free_unless_begun(folder: Path, throughput: Throughput) -> Iterator[None]:
    """Leave the folder to other settings where an error ends the first step, such as one of too little memory."""
    try:
        yield
    except Exception:
        if throughput.steps == 0 and not (folder / NON_FINITE).exists():
            (folder / LOG).unlink()
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        raise


@contextmanager
def _held(folder: Path, identity: dict[str, Any], overwrite: bool, first: bool) -> Iterator[None]:
    """The run's folder, held by the first process for all."""
    with ExitStack() as stack:
        failure = None
        if first:
            try:
                stack.enter_context(run_folder(folder, identity, overwrite, FILES))
            except RunFolderError as error:
                failure = str(error)
        raise_everywhere(failure, RunFolderError)
        yield
