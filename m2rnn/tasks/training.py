"""Train a model on a synthetic problem; a kill at any moment costs a few steps, nothing else.

The logits at position t classify the target at t: targets and inputs have the same positions, and targets that do not
count are left out of the loss. Batches and noise are functions of (seed, step), so weights, optimizer and `Progress`
are the whole state of a run.
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from m2rnn.layers.state_weight import bound_state_weights
from m2rnn.models import M2RNNConfig, M2RNNForCausalLM, presets
from m2rnn.runs.display import Display
from m2rnn.runs.folder import LOG
from m2rnn.runs.interrupts import interrupts_noted
from m2rnn.runs.log import Log
from m2rnn.tasks.curriculum import Progress
from m2rnn.tasks.problems.contract import Batch
from m2rnn.tasks.settings import RunSettings
from m2rnn.training.checkpoint import load_checkpoint, save_checkpoint
from m2rnn.training.configure import configure

ADAM_BETAS = (0.9, 0.98)
MAX_GRADIENT_NORM = 1.0

Outcome = Literal["solved", "given up", "step limit", "time limit"]


class DivergedError(Exception):
    """The loss or its gradient is no finite number: the weights stay as they were."""


@dataclass(frozen=True)
class TrainingResult:
    """A trained model and how it came about; ``seconds`` add up over interruptions."""

    model: M2RNNForCausalLM
    outcome: Outcome
    progress: Progress
    seconds: float


def build_config(settings: RunSettings) -> M2RNNConfig:
    """The state-tracking preset with the settings' overrides; `SettingsError` if there is no such model."""
    preset = partial(presets.state_tracking, settings.mixer)
    return configure(preset, settings.model, vocab_size=settings.problem().vocab_size)


def build_model(settings: RunSettings) -> M2RNNForCausalLM:
    """A new model, whose weights are determined by the seed; the caller's random state is left alone."""
    config = build_config(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = M2RNNForCausalLM(config)
    model.to(settings.device)  # type: ignore[arg-type] # transformers' decorator hides the signature
    return model


def train(
    settings: RunSettings,
    folder: Path,
    *,
    checkpoint_every: int = 100,
    minutes: float | None = None,
    display: Display | None = None,
) -> TrainingResult:
    """Train in ``folder``, from its newest checkpoint if it holds one.

    ``minutes`` ends the training after that much time, at a step that depends on the machine. Ctrl-C and SIGTERM save a
    checkpoint, then raises ``KeyboardInterrupt``.
    """
    display = display or Display()
    model = build_model(settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=ADAM_BETAS, weight_decay=0.0)
    problem, curriculum = settings.problem(), settings.plan()
    saved = load_checkpoint(folder, model, optimizer)
    progress = Progress(**saved["progress"]) if saved else curriculum.start()
    earlier_seconds: float = saved["seconds"] if saved else 0.0
    # Read once a step: a checkpoint has the very time that decides whether to go on, resumed or not.
    seconds, began = earlier_seconds, time.monotonic()

    def save() -> None:
        state = {"progress": asdict(progress), "seconds": seconds, "log_bytes": log.size_on_disk()}
        save_checkpoint(folder, progress.step, model, optimizer, state)

    display.say(f"compiling kernels, then from step {progress.step} on")
    log_bytes = saved["log_bytes"] if saved else 0
    noted = interrupts_noted((SIGINT, SIGTERM), display.note)
    with noted as interrupted, Log(folder / LOG, keep_bytes=log_bytes) as log:
        while not curriculum.is_finished(progress) and (minutes is None or seconds < 60 * minutes):
            batch = settings.train_batch(problem, progress)
            rate = settings.learning_rate * curriculum.learning_rate(progress)
            noise = None
            if settings.noise:
                noise = draw_noise(settings, progress.step, (*batch.inputs.shape, model.config.hidden_size))
            try:
                loss, gradient_norm = train_step(model, optimizer, batch, rate, noise)
            except DivergedError as error:
                hint = "Try a smaller learning rate, or another seed, in a new folder or with --overwrite"
                raise DivergedError(f"step {progress.step + 1}: {error}. {hint}") from None
            length, inputs, progress = progress.length, progress.inputs, curriculum.after(progress, loss)
            seconds = earlier_seconds + time.monotonic() - began
            log.write(
                step=progress.step,
                length=length,
                inputs=inputs,
                loss=loss,
                smoothed_loss=progress.smoothed_loss,
                learning_rate=rate,
                gradient_norm=gradient_norm,
            )
            display.update(
                f"step {progress.step} of at most {settings.steps}, length {length}, {inputs} inputs, "
                f"loss {progress.smoothed_loss:.4f}, {seconds:.0f} s"
            )
            if progress.step % checkpoint_every == 0:
                save()
            if interrupted():
                save()
                raise KeyboardInterrupt
        save()
    outcome: Outcome = "step limit"
    if progress.solved_at is not None:
        outcome = "solved"
    elif curriculum.is_given_up(progress):
        outcome = "given up"
    elif not curriculum.is_finished(progress):
        outcome = "time limit"
    return TrainingResult(model.eval(), outcome, progress, seconds)


def draw_noise(settings: RunSettings, step: int, shape: tuple[int, ...]) -> Tensor:
    """Noise ``[B, T, hidden_size]`` for the embeddings of a step: the same whenever this step of this run is taken.

    Its standard deviation is drawn for each sequence, from 0 to ``settings.noise``: a model that has always had noise
    comes to need it.
    """
    (seed,) = np.random.SeedSequence((settings.seed, step)).generate_state(1)
    generator = torch.Generator(settings.device).manual_seed(int(seed))
    deviation = settings.noise * torch.rand((shape[0], 1, 1), generator=generator, device=settings.device)
    return deviation * torch.randn(shape, generator=generator, device=settings.device)


def train_step(
    model: M2RNNForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    learning_rate: float,
    noise: Tensor | None = None,
) -> tuple[float, float]:
    """One step on ``batch``: its loss (nats per answer) and the gradient's norm before clipping.

    ``noise`` is added to the embeddings. It pushes the state at every token, so what is right at the end of a sequence
    is a state that is pulled back to where it belongs, and that holds far beyond the training's lengths.

    Raises:
        DivergedError: before the weights change, if the gradient is no finite number.
    """
    device = model.device
    embedded = model.get_input_embeddings()(torch.from_numpy(batch.inputs).to(device))
    if noise is not None:
        embedded = embedded + noise
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1).float(), torch.from_numpy(batch.targets).to(device).flatten())
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    if not norm.isfinite():
        raise DivergedError(f"the loss is {loss.item():.4g} and the norm of its gradient {norm.item():.4g}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    bound_state_weights(model)  # nothing, unless a mixer has a bound
    return loss.item(), norm.item()
